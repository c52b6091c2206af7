"""The live page: running trainings in the browser, on 127.0.0.1 only."""

import asyncio
import html
import importlib
import json
import socket
import string
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import altair as alt
import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route

from dynascope.record import Record, RecordError, open_record
from dynascope.report.charts import draw, plan, sections
from dynascope.report.page import asset, document, findings_html, policy, vega
from dynascope.report.rows import Rows, finding_rows
from dynascope.report.terminal import sparkline, state_of

HOST = "127.0.0.1"
INTERVAL = 1.0
"""Seconds between two looks at a record."""
MAX_ROWS = 10_000
"""New rows that a chart may grow by before the page is drawn anew, thinned."""


def serve(folder: str | Path, port: int) -> None:
    """Serve the live page of a run, or of every run below a folder, until Ctrl-C.

    It listens on 127.0.0.1 and answers nobody who came under another name. Port 0 takes a free one. Raises ValueError
    when the folder does not exist or the port is taken.

    >>> serve("runs", 8787)  # doctest: +SKIP
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give a run's directory, or a folder of runs")
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
            listener.listen()  # whoever reads the address below may call at once
        except (OSError, OverflowError):
            raise ValueError(f"port {port} cannot be had; try another, or --port 0 for a free one") from None
        _warm_up()
        print(f"http://{HOST}:{listener.getsockname()[1]}  (Ctrl-C ends it)", file=sys.stderr, flush=True)
        server = uvicorn.Server(uvicorn.Config(application(folder), log_level="warning", timeout_graceful_shutdown=1))
        server.run(sockets=[listener])


def _warm_up() -> None:
    """What the first page would wait for: the renderer, which is bundled beside us, arrays, and a first chart."""
    bundling = threading.Thread(target=vega)
    bundling.start()
    importlib.import_module("xarray")
    draw("", "", [], alt.Chart().mark_line().encode(x=alt.X("step:Q"), y=alt.Y("value:Q")))
    bundling.join()


def application(folder: Path) -> Starlette:
    """The pages as an ASGI application: `/` lists runs, `/run/…` shows one, `/stream/…` follows it."""

    def record_at(request: Request) -> Record:
        path = (folder / request.path_params["path"]).resolve()
        try:
            if not path.is_relative_to(folder.resolve()):
                raise RecordError("outside the folder")
            return open_record(path)
        except RecordError as error:
            raise HTTPException(404, str(error)) from None

    def index(request: Request) -> Response:
        return HTMLResponse(_index_page(folder))

    def run(request: Request) -> Response:
        record = record_at(request)
        records = {record.path.name: record}
        seen = ",".join(map(str, last_steps(record).values()))  # before drawing: what comes meanwhile is sent again
        address = f"/stream/{quote(request.path_params['path'])}?seen={seen}"
        return HTMLResponse(document(records, sections(records), stream=address))

    def stream(request: Request) -> Response:
        # A browser that was cut off says with which event.
        seen = request.headers.get("last-event-id") or request.query_params.get("seen", "")
        try:
            follower = Follower(record_at(request), [int(step) for step in seen.split(",") if step])
        except ValueError:
            raise HTTPException(400, "`seen` is a list of steps, parted by commas") from None
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(_events(follower, request), media_type="text/event-stream", headers=headers)

    routes = [Route("/", index), Route("/run/{path:path}", run), Route("/stream/{path:path}", stream)]
    # A page of another site that resolves its own name to this machine must not be answered.
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])])


class Follower:
    """What is new in a record since the last look, as events of a page.

    `seen` is the last step of each series, in the order of `Record.names`, that the page has (-1: none).
    """

    def __init__(self, record: Record, seen: Sequence[int]) -> None:
        self._record = record
        self._records = {record.path.name: record}
        self._names = record.names()
        self._seen = dict(zip(self._names, seen, strict=False))
        self._is_outdated = len(seen) != len(self._names)
        self._charts = [chart for charts in plan(self._records).values() for chart in charts]
        self._num_rows = Counter[int]()
        self._findings: int | None = None
        self._state = ""

    @property
    def seen(self) -> str:
        """What the page has by now, as the id of an event."""
        return ",".join(map(str, self._seen.values()))

    def look(self) -> list[tuple[str, Any]]:
        """(event, data) for what changed."""
        is_live = self._record.is_live()
        events: list[tuple[str, Any]] = []
        if self._is_outdated or self._record.names() != self._names or max([0, *self._num_rows.values()]) > MAX_ROWS:
            return [("reload", None)]
        rows = self._new_rows()
        if rows:
            events.append(("rows", rows))
        if len(self._record.findings) != self._findings:
            self._findings = len(self._record.findings)
            events.append(("findings", findings_html(self._records)))
            # A finding may be worse than those before it, and takes their numbers.
            flags = {number: finding_rows(self._records, chart.names) for number, chart in enumerate(self._charts)}
            events.append(("flags", flags))
        if state_of(self._record) != self._state:
            self._state = state_of(self._record)
            events.append(("state", self._state))
        return events if is_live else [*events, ("end", None)]

    def _new_rows(self) -> dict[int, dict[str, Rows]]:
        last = last_steps(self._record)
        since = {name: seen + 1 for name, seen in self._seen.items() if last[name] > seen}
        changed = {}
        for number, chart in enumerate(self._charts):
            if since.keys() & set(chart.names):
                changed[number] = chart.rows(self._records, since)
                self._num_rows[number] += sum(map(len, changed[number].values()))
        self._seen = last
        return changed


def last_steps(record: Record) -> dict[str, int]:
    """The last step of each series, -1 where nothing was measured yet."""
    return {name: -1 if (last := record.last_step(name)) is None else last for name in record.names()}


async def _events(follower: Follower, request: Request) -> AsyncIterator[str]:
    while not await request.is_disconnected():
        for kind, data in await run_in_threadpool(follower.look):
            yield f"id: {follower.seen}\nevent: {kind}\ndata: {json.dumps(data)}\n\n"
            if kind in ("end", "reload"):
                return
        await asyncio.sleep(INTERVAL)


def _index_page(folder: Path) -> str:
    """Every run below the folder, those that run first."""
    rows = []
    for path in find_runs(folder):
        try:
            record = open_record(path)
            rows.append((not record.is_live(), -path.stat().st_mtime, _row(folder, record)))
        except RecordError as error:
            rows.append(
                (True, 0.0, f"<tr><td>{html.escape(path.name)}</td><td colspan=4>{html.escape(str(error))}</td></tr>")
            )
    head = (
        "<tr><th>run</th><th>state</th><th>loss</th><th class=number>last loss</th><th class=number>findings</th></tr>"
    )
    table = f"<table>{head}{''.join(row for *_, row in sorted(rows))}</table>" if rows else "<p>No runs here yet.</p>"
    return string.Template(asset("index.html")).substitute(
        title=html.escape(folder.resolve().name), policy=policy(), style=asset("page.css"), table=table
    )


def find_runs(folder: Path) -> list[Path]:
    """Directories at or below `folder` that hold a record."""
    return sorted({file.parent for file in folder.glob("**/rank-*.sqlite")})


def _row(folder: Path, record: Record) -> str:
    path = record.path.relative_to(folder).as_posix()
    loss = record.series("loss", max_points=200).values.ravel() if "loss" in record else np.empty(0)
    name = path if path != "." else record.path.resolve().name
    cells = [
        f'<a href="/run/{html.escape(quote(path))}">{html.escape(name)}</a>',
        html.escape(state_of(record)),
        f"<code>{sparkline(loss.astype(np.float64), 30)}</code>",
        f"{loss[-1]:.4g}" if loss.size else "-",
        str(len(record.findings)),
    ]
    drawn = [f"<td{' class=number' if place > 2 else ''}>{cell}</td>" for place, cell in enumerate(cells)]
    return f"<tr>{''.join(drawn)}</tr>"
