"""The live page, in a real browser and by hand."""

import json
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynascope.record import Finding, RecordWriter, Series, open_record
from dynascope.report import serve
from dynascope.report.live import Follower, last_steps

ROOT = Path(__file__).parents[2]


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[RecordWriter]:
    with RecordWriter(tmp_path / "runs" / "a run") as record:
        record.declare(Series("heat", ("place",)))
        for step in range(5):
            record.add(step, {"loss": 1.0 / (step + 1), "heat": np.ones(6)})
        record.flush()
        yield record


@pytest.fixture
def address(writer: RecordWriter) -> Iterator[str]:
    """A live server over the folder of runs, in a process of its own as users have it."""
    command = [sys.executable, "-m", "dynascope", "live", str(writer.folder.parent), "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    yield process.stderr.readline().split()[0]
    process.terminate()
    process.wait()
    process.stderr.close()


def test_page_follows_a_growing_record(writer: RecordWriter, address: str, browser: Any) -> None:
    from playwright.sync_api import expect

    page = browser.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(address)
    assert "running, last step 4" in page.locator("table").inner_text()
    page.get_by_text("a run").click()
    page.wait_for_selector('figure[data-chart="0"][data-drawn]')
    for step in range(5, 9):
        writer.add(step, {"loss": 0.1, "heat": np.ones(6)})
    writer.finding(Finding("spike", "warning", 7, "<b>Rose</b>", {}, "", "convention", "loss"))
    writer.flush()
    expect(page.locator("#state")).to_contain_text("step 8")
    page.wait_for_selector("article.warning")
    assert "<b>Rose</b>" in page.locator("article.warning").inner_text()
    writer.add(9, {"loss": 0.1, "a new series": 1.0})
    writer.flush()
    page.wait_for_selector("text=a new series")
    writer.close()
    expect(page.locator("#state")).to_contain_text("ended")
    assert said == []
    page.close()


def test_only_new_rows_are_sent(writer: RecordWriter) -> None:
    record = open_record(writer.folder)
    follower = Follower(record, list(last_steps(record).values()))
    assert [kind for kind, _ in follower.look()] == ["findings", "flags", "state"]
    writer.add(5, {"loss": 0.5})
    writer.flush()
    events = dict(follower.look())
    ((row,),) = (sets["lines"] for sets in events["rows"].values())
    assert (row["step"], row["value"]) == (5, 0.5)
    assert sorted(follower.seen.split(",")) == ["4", "5"]
    assert follower.look() == []


def test_new_finding_flags_the_charts_it_was_read_from(writer: RecordWriter) -> None:
    follower = Follower(open_record(writer.folder), [4, 4])
    follower.look()
    writer.finding(Finding("spike", "warning", 3, "Rose", {}, "", "convention", "heat"))
    writer.flush()
    flags = dict(follower.look())["flags"]
    # Chart 0 is the loss, which shows every finding; chart 1 is the series itself.
    assert [[(row["number"], row["step"]) for row in rows] for rows in flags.values()] == [[("1", 3)], [("1", 3)]]


def test_reconnecting_page_gets_what_it_missed(writer: RecordWriter) -> None:
    record = open_record(writer.folder)
    steps = [2 if name == "loss" else last for name, last in last_steps(record).items()]
    events = dict(Follower(record, steps).look())
    assert [row["step"] for sets in events["rows"].values() for row in sets.get("lines", [])] == [3, 4]


def test_page_of_other_series_is_drawn_anew(writer: RecordWriter) -> None:
    assert Follower(open_record(writer.folder), [4]).look() == [("reload", None)]


def test_many_new_rows_are_drawn_anew(writer: RecordWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynascope.report.live.MAX_ROWS", 3)
    record = open_record(writer.folder)
    follower = Follower(record, [-1] * 2)
    assert dict(follower.look())["rows"]
    assert follower.look() == [("reload", None)]


def test_ended_run_closes_the_stream(writer: RecordWriter, address: str) -> None:
    writer.close()
    with urllib.request.urlopen(f"{address}/stream/a%20run?seen=4,4") as answer:
        told = answer.read().decode()
    assert told.rstrip().endswith("event: end\ndata: null")
    assert json.loads(next(line for line in told.splitlines() if "ended" in line)[len("data: ") :])


def test_other_names_and_other_folders_are_not_answered(writer: RecordWriter, address: str, tmp_path: Path) -> None:
    RecordWriter(tmp_path / "secret").close()
    for url, host, status in [
        (address, "evil.example", 400),
        (f"{address}/run/..%2Fsecret", "127.0.0.1", 404),
        (f"{address}/run/nothing", "127.0.0.1", 404),
        (f"{address}/stream/a%20run?seen=x", "127.0.0.1", 400),
    ]:
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(url, headers={"Host": host}))
        assert refused.value.code == status
        refused.value.close()


def test_nothing_is_heard_beyond_this_machine(address: str) -> None:
    port = int(address.rsplit(":", 1)[1])
    listening = [
        line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "0A"
    ]
    assert [entry for entry in listening if entry.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]


def test_a_run_itself_can_be_served(writer: RecordWriter) -> None:
    from starlette.testclient import TestClient

    from dynascope.report.live import application

    client = TestClient(application(writer.folder), base_url="http://127.0.0.1")
    assert 'href="/run/."' in client.get("/").text
    assert "a run" in client.get("/run/.").text


def test_damaged_record_is_named_and_the_others_listed(writer: RecordWriter, address: str) -> None:
    broken = writer.folder.parent / "broken"
    broken.mkdir()
    (broken / "rank-00000.sqlite").write_bytes(b"no record")
    with urllib.request.urlopen(address) as answer:
        listed = answer.read().decode()
    assert "broken" in listed
    assert "running" in listed


def test_taken_port_and_missing_folder_are_refused(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ValueError, match="cannot be had"):
            serve(tmp_path, taken.getsockname()[1])
    with pytest.raises(ValueError, match="no folder"):
        serve(tmp_path / "nowhere", 0)


def test_reading_does_not_wait_for_other_readers(writer: RecordWriter, address: str) -> None:
    answers: list[int] = []

    def read() -> None:
        with urllib.request.urlopen(f"{address}/run/a%20run") as answer:
            answers.append(len(answer.read()))

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert len(answers) == 4
