"""Disks fill, processes die, files tear: what was written stays readable, and errors say what to do."""

import os
import random
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dynascope.record import Finding, RecordError, RecordWriter, Series, open_record

HOSTILE_NAMES = [
    'it\'s "quoted"',
    "two\nlines\r\n",
    "<script>alert(1)</script>",
    "nul\0inside",
    "'; DROP TABLE series; --",
    "../../etc/passwd",
    "x" * 10_000,
    "损失/Δ🙂\u202e",
    " ",
    "/",
    "%s {0} %00",
]


def python(code, *arguments, **options):
    """Run a script with what it needs of the record already imported."""
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        **options,
    )


PRELUDE = """
import atexit, ctypes, os, resource, signal, sys, time, warnings
from pathlib import Path
import numpy as np
import xarray
from dynascope.record import RecordError, RecordWriter, open_record

def obey_permissions():
    # Root writes into read-only folders; without its capabilities it may not, like everybody else.
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    assert ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()) == 0

folder = Path(sys.argv[1])
"""


@pytest.fixture
def run(tmp_path):
    """A closed record of 3000 steps: several chunks of a scalar and of an array, an event and a finding."""
    with RecordWriter(tmp_path / "run", rank=0) as writer:
        for step in range(3000):
            writer.add(step, {"loss": step / 7, "grid": np.full((2, 3), step, np.float32)})
        writer.event("start", "Started.")
        writer.finding(Finding("spike", "warning", 3, "It rose.", {}, "lr=1e-4", "convention"))
    return tmp_path / "run"


# Processes that die


def test_hundred_kills_lose_nothing_that_was_flushed(tmp_path):
    script = Path(__file__).with_name("killed_writers.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path, "100"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    outcomes = done.stdout.split()
    assert len(outcomes) == 100
    assert sum(outcome not in ("unborn", "-1") for outcome in outcomes) > 20  # else the kills came too early
    for number, outcome in enumerate(outcomes):
        if outcome == "unborn" and not list((tmp_path / str(number)).glob("*.sqlite")):
            continue
        record = open_record(tmp_path / str(number))
        assert not record.is_live()
        if outcome in ("unborn", "-1") and not record.names():
            continue
        steps = np.arange(record["loss"].size)
        assert len(steps) > (-1 if outcome == "unborn" else int(outcome))
        assert (record["loss"].values == steps / 7).all()
        assert (record["grid"].values == steps[:, None, None].astype(np.float32)).all()


def test_background_flushes_survive_a_kill(tmp_path):
    # No flush and no close: the background thread alone put the points where the parent sees them.
    code = """
writer = RecordWriter(folder, flush_interval=0.01)
for step in range(50):
    writer.add(step, {"x": float(step)})
record = open_record(folder)
while record.last_step() != 49:
    time.sleep(0.005)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert python(code, tmp_path).returncode == -9
    assert open_record(tmp_path)["x"].values.tolist() == list(range(50))


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise ValueError('training failed')"])
def test_end_of_the_interpreter_without_close_writes_everything(tmp_path, end):
    code = """
writer = RecordWriter(folder, flush_interval=60.0)
writer.add(0, {"x": 1.0})
writer.event("note", "Still here.")
"""
    python(code + end, tmp_path)
    record = open_record(tmp_path)
    assert record["x"].values.tolist() == [1.0]
    assert [event.kind for event in record.events] == ["note"]


def test_exception_in_the_training_is_not_hidden_by_the_record(tmp_path):
    writer = RecordWriter(tmp_path)
    writer.add(0, {"x": 1.0})
    with pytest.raises(ZeroDivisionError), writer:
        raise ZeroDivisionError
    assert open_record(tmp_path).last_step() == 0


def test_forked_child_leaves_the_record_to_its_parent(tmp_path):
    code = """
writer = RecordWriter(folder, flush_interval=60.0)
writer.add(0, {"x": 1.0})
if os.fork() == 0:
    writer.add(1, {"x": 2.0})
    writer.event("child", "Must not be kept.")
    writer.flush()
    writer.close()
    sys.exit(0)
os.wait()
writer.add(2, {"x": 3.0})
writer.close()
"""
    assert python(code, tmp_path).returncode == 0
    record = open_record(tmp_path)
    assert record["x"].step.values.tolist() == [0, 2]
    assert record.events == []


def test_child_that_outlives_a_killed_writer_does_not_hold_its_lock(tmp_path):
    code = """
writer = RecordWriter(folder)
child = os.fork()
if child == 0:
    os.close(1)
    os.close(2)
    time.sleep(30)
    os._exit(0)
(folder / "child").write_text(str(child))
os.kill(os.getpid(), signal.SIGKILL)
"""
    python(code, tmp_path)
    child = int((tmp_path / "child").read_text())
    try:
        assert not open_record(tmp_path).is_live()
    finally:
        os.kill(child, 9)


# Two writers, and runs that exist


def test_existing_record_is_not_written_over(run):
    before = (run / "rank-00000.sqlite").read_bytes()
    with pytest.raises(RecordError, match=r"already holds a record .* choose another run directory, or remove"):
        RecordWriter(run)
    assert (run / "rank-00000.sqlite").read_bytes() == before


def test_second_writer_of_a_rank_is_told_who_the_first_is(tmp_path):
    with (
        RecordWriter(tmp_path),
        pytest.raises(RecordError, match=f"is being written by process {os.getpid()};"),
    ):
        RecordWriter(tmp_path)


def test_record_of_a_killed_writer_is_not_continued_by_another(tmp_path):
    python("writer = RecordWriter(folder); os.kill(os.getpid(), signal.SIGKILL)", tmp_path)
    with pytest.raises(RecordError, match="already holds a record"):
        RecordWriter(tmp_path)


def test_run_directory_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(RecordError, match="cannot make a record in"):
        RecordWriter(tmp_path / "run")


# Read-only folders


def test_read_only_folder_is_refused_by_the_writer(tmp_path):
    (tmp_path / "artifacts").mkdir()
    tmp_path.chmod(0o555)
    done = python("obey_permissions()\ntry: RecordWriter(folder)\nexcept RecordError as e: print(e)", tmp_path)
    assert "cannot make a record in" in done.stdout
    assert "choose a run directory that can be written" in done.stdout


READ_IT = """
obey_permissions()
try:
    (folder / "probe").write_text("")
except PermissionError:
    record = open_record(folder)
    print(record["loss"].size, record.last_step(), len(record.findings), record.is_live())
"""


def test_closed_record_is_read_from_a_read_only_folder(run):
    (run / "rank-00000.sqlite").chmod(0o444)
    run.chmod(0o555)
    assert python(READ_IT, run).stdout == "3000 2999 1 False\n"


@pytest.mark.parametrize("has_shared_memory_file", [True, False])
def test_record_of_a_killed_writer_is_read_whole_from_a_read_only_folder(tmp_path, has_shared_memory_file):
    code = """
writer = RecordWriter(folder)
for step in range(10):
    writer.add(step, {"loss": 1.0})
writer.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""
    python(code, tmp_path)
    if not has_shared_memory_file:
        (tmp_path / "rank-00000.sqlite-shm").unlink()
    for path in tmp_path.glob("rank*"):
        path.chmod(0o444)
    tmp_path.chmod(0o555)
    assert python(READ_IT, tmp_path).stdout == "10 9 0 False\n"


# A full disk: the limit on a file's size makes every write beyond it fail, as a full disk does


FULL_DISK = """
warnings.simplefilter("always")
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
writer = RecordWriter(folder, flush_interval=0.01, buffer_bytes=200_000)
writer.add(0, {"x": 0.0})
writer.flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
for step in range(1, 50_000):
    writer.add(step, {"x": float(step)})
assert writer._waiting_bytes <= 200_000 + 64, writer._waiting_bytes
seen = open_record(folder)["x"]
assert seen.values.tolist() == list(range(seen.size)), "what was written stays readable"
"""


def test_full_disk_stops_neither_training_nor_reading_and_close_counts_the_loss(tmp_path):
    code = """
try:
    writer.close()
except RecordError as error:
    print(seen.size, writer._num_dropped, error)
"""
    done = python(FULL_DISK + code, tmp_path)
    assert done.returncode == 0, done.stderr
    num_kept, num_dropped, *message = done.stdout.split()
    assert 0 < int(num_kept) < 50_000
    assert int(num_dropped) > 0
    assert int(message[0]) == 50_000 - int(num_kept)
    assert "points could not be written to" in done.stdout
    assert done.stderr.count("RuntimeWarning") == 1
    assert open_record(tmp_path)["x"].size == int(num_kept)


def test_space_that_returns_is_used_and_the_gap_is_told(tmp_path):
    code = """
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
writer.flush()
writer.add(50_000, {"x": 50_000.0})
writer.close()
"""
    done = python(FULL_DISK + code, tmp_path)
    assert done.returncode == 0, done.stderr
    record = open_record(tmp_path)
    assert {event.kind for event in record.events} == {"points-dropped"}
    # More than one event when an attempt was under way as the space returned: it tells what was missing when it began.
    assert record["x"].size == 50_001 - sum(event.data["points"] for event in record.events)
    assert (record["x"].values == record["x"].step.values).all()


def test_full_disk_does_not_end_a_run_in_which_warnings_are_errors(tmp_path):
    done = python(
        FULL_DISK.replace('"always"', '"error"') + "\nprint(writer._thread.is_alive()); os._exit(0)", tmp_path
    )
    assert "cannot be written" in done.stderr
    assert done.returncode == 0, done.stderr


# Files that are torn, foreign or newer


def test_truncated_record_is_named_or_read_right(run):
    content = (run / "rank-00000.sqlite").read_bytes()
    for length in (1, 50, 100, 4000, 4096, len(content) // 2, len(content) - 5000, len(content) - 1):
        (run / "rank-00000.sqlite").write_bytes(content[:length])
        _read_right_or_named(run)


def test_overwritten_bytes_are_named_or_read_right(run):
    content = (run / "rank-00000.sqlite").read_bytes()
    dice, num_errors = random.Random(0), 0
    for _ in range(60):
        torn = bytearray(content)
        start = dice.randrange(len(torn) - 40)
        torn[start : start + 40] = dice.randbytes(40)
        (run / "rank-00000.sqlite").write_bytes(torn)
        num_errors += _read_right_or_named(run)
    assert num_errors > 20  # most of the file is measurements, whose checksum must have spoken


def _read_right_or_named(run):
    """Whether reading raised a RecordError that names the file; wrong values and other errors may not come."""
    message = ""
    try:
        record = open_record(run)
        for name, values in {"loss": np.arange(3000) / 7, "grid": np.arange(3000)}.items():
            if name in record:
                series = record[name]
                assert (series.values.reshape(series.sizes["step"], -1)[:, 0] == values[series.step]).all()
        assert len(record.events) <= 1
        assert len(record.findings) <= 1
    except RecordError as error:
        message = str(error)
    assert not message or "rank-00000.sqlite" in message
    assert "\n" not in message
    return bool(message)


def test_damaged_series_leaves_the_others_readable(run):
    path = run / "rank-00000.sqlite"
    content = path.read_bytes()
    place = content.index(np.arange(1500, 1510).astype("<f8").__truediv__(7).tobytes())
    path.write_bytes(content[:place] + b"\xff" * 8 + content[place + 8 :])
    record = open_record(run)
    with pytest.raises(RecordError, match="series 'loss': the measurements from step"):
        record["loss"]
    assert record["grid"].sizes["step"] == 3000


def test_newer_format_says_to_update(run):
    with sqlite3.connect(run / "rank-00000.sqlite") as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(RecordError, match=r"newer Dynascope \(format 99.*pip install --upgrade dynascope"):
        open_record(run)


def test_foreign_database_is_not_a_record(tmp_path):
    database = sqlite3.connect(tmp_path / "mine.sqlite")
    database.execute("CREATE TABLE series (id)")
    database.close()
    with pytest.raises(RecordError, match=r"mine\.sqlite is not a record of Dynascope"):
        open_record(tmp_path / "mine.sqlite")


@pytest.mark.parametrize("content", [b"", b"step,loss\n0,1\n" * 1000])
def test_file_that_is_no_database_is_named(tmp_path, content):
    (tmp_path / "log.csv").write_bytes(content)
    with pytest.raises(RecordError, match=r"log\.csv"):
        open_record(tmp_path / "log.csv")


def test_one_torn_rank_is_named_among_many(run):
    shutil.copy(run / "rank-00000.sqlite", run / "rank-00001.sqlite")
    (run / "rank-00001.sqlite").write_bytes(b"SQLite format 3\0" + b"\xff" * 5000)
    with pytest.raises(RecordError, match=r"rank-00001\.sqlite"):
        open_record(run)


def test_record_that_is_removed_while_it_is_read_is_named(run):
    record = open_record(run / "rank-00000.sqlite")
    (run / "rank-00000.sqlite").unlink()
    with pytest.raises(RecordError, match="does not exist"):
        record.names()


# Names


def test_hostile_names_and_texts_come_back_as_they_were(tmp_path):
    with RecordWriter(tmp_path) as writer:
        for number, name in enumerate(HOSTILE_NAMES):
            writer.declare(Series(name, ("a/\0'",), name, name, {"a/\0'": [name]}))
            writer.add(0, {name: np.array([float(number)])})
            writer.event(name, name, data={name: name})
    record = open_record(tmp_path)
    assert record.names() == HOSTILE_NAMES
    for number, name in enumerate(HOSTILE_NAMES):
        assert record[name].values.tolist() == [[number]]
        assert record[name].coords["a/\0'"].values.tolist() == [name]
        assert record[name].attrs == {"unit": name, "description": name}
    assert [event.message for event in record.events] == HOSTILE_NAMES


def test_empty_name_is_refused(tmp_path):
    with RecordWriter(tmp_path) as writer, pytest.raises(ValueError, match="name"):
        writer.add(0, {"": 1.0})


def test_record_of_a_writer_that_died_between_journals_is_read(tmp_path):
    # Killed as it left the write-ahead log, a writer leaves a rollback journal that only a writer could play back.
    with RecordWriter(tmp_path) as record:
        record.add(0, {"x": 1.0})
    code = """
import sqlite3
database = sqlite3.connect(folder / "rank-00000.sqlite", isolation_level=None)
database.execute("PRAGMA cache_size = 1")
database.execute("BEGIN")
for number in range(2000):
    database.execute("INSERT INTO event (kind, message, time, data) VALUES ('a', hex(randomblob(500)), 0, '{}')")
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert python(code, tmp_path).returncode == -9
    assert (tmp_path / "rank-00000.sqlite-journal").stat().st_size > 0
    with open_record(tmp_path) as record:
        assert record["x"].values.tolist() == [1.0]
        assert record.events == []
