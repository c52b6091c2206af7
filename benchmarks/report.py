"""How soon a long run is seen: `python benchmarks/report.py`.

A record of 1 million steps × 20 series: the live server's answer with the whole page (bar: 2 s), and the report as a
file, its time and its size.
"""

import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from dynascope.record import RecordWriter
from dynascope.report import report

TURNS = 5


def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        run = Path(root) / "run"
        with RecordWriter(run) as record:
            for step in range(1_000_000):
                record.add(step, {f"metric_{number}": (step * number) % 1000 / 7 for number in range(20)})
        command = [sys.executable, "-m", "dynascope", "live", str(run), "--port", "0"]
        server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert server.stderr is not None
        address = server.stderr.readline().split()[0]
        seconds = []
        for _ in range(TURNS + 1):
            started = time.perf_counter()
            with urllib.request.urlopen(f"{address}/run/.") as answer:
                page = answer.read()
            seconds.append(time.perf_counter() - started)
        server.terminate()
        server.wait()
        then = statistics.median(seconds[1:])
        print(f"live page of 1M steps x 20 series: first {seconds[0]:.2f} s, then {then:.2f} s (bar: 2 s)")
        print(f"its size: {len(page) / 1e6:.2f} MB")
        started = time.perf_counter()
        written = report([run], Path(root) / "report.html")
        print(f"report.html: {time.perf_counter() - started:.2f} s, {written.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
