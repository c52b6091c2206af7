"""What a writer takes, and what it refuses."""

import itertools
import signal
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies

from dynascope.record import Finding, RecordError, RecordWriter, Series, locking, open_record, writer


@pytest.fixture
def run(tmp_path):
    """A run directory that does not exist yet."""
    return tmp_path / "run"


def test_scalars_are_read_back_with_unit_and_description(run):
    with RecordWriter(run) as record:
        record.declare(Series("loss", unit="nats", description="Training loss."))
        record.add(3, {"loss": 0.5})
        record.add(7, {"loss": 0.25})
    loss = open_record(run)["loss"]
    assert loss.step.values.tolist() == [3, 7]
    assert loss.values.tolist() == [0.5, 0.25]
    assert loss.attrs == {"unit": "nats", "description": "Training loss."}


def test_arrays_are_read_back_with_named_and_labelled_dims(run):
    with RecordWriter(run) as record:
        record.declare(Series("norm", ("layer", "head"), coords={"layer": ["first", "last"]}))
        record.add(0, {"norm": np.array([[1, 2, 3], [4, 5, 6]], np.float32)})
    norm = open_record(run)["norm"]
    assert norm.dims == ("step", "layer", "head")
    assert norm.sel(step=0, layer="last").values.tolist() == [4, 5, 6]


def test_undeclared_array_numbers_its_dims(run):
    with RecordWriter(run) as record:
        record.add(0, {"grid": [[1.0, 2.0]]})
    assert open_record(run).info("grid") == Series("grid", ("dim_0", "dim_1"))


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (1.5, "float64"),
        (3, "int64"),
        (True, "bool"),
        (np.float32(1), "float32"),
        (np.float16(1), "float32"),
        (np.uint8(1), "int64"),
        (torch.tensor(1.0), "float32"),
        (torch.tensor([1.0], dtype=torch.bfloat16), "float32"),
        (torch.tensor([1.0], dtype=torch.float64, requires_grad=True), "float64"),
    ],
)
def test_dtype_is_kept_or_widened(run, value, dtype):
    with RecordWriter(run, rank=1) as record:
        record.add(0, {"x": value})
    assert open_record(run)["x"].dtype == dtype


def test_integers_followed_by_fractions_become_float64(run):
    with RecordWriter(run) as record:
        record.add(0, {"x": 1})
        record.flush()
        record.add(1, {"x": 0.5})
    assert open_record(run)["x"].values.tolist() == [1.0, 0.5]


def test_array_may_change_after_it_was_added(run):
    value = np.zeros(2)
    with RecordWriter(run) as record:
        record.add(0, {"x": value})
        value += 1
    assert open_record(run)["x"].values.tolist() == [[0, 0]]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_whatever_is_added_is_read_back_bit_for_bit(data):
    dtype = data.draw(st.sampled_from(["float32", "float64", "int64", "bool"]))
    shape = data.draw(numpy_strategies.array_shapes(min_dims=0, max_dims=2, max_side=4))
    gaps = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=30))
    steps = np.cumsum([data.draw(st.integers(-(2**60), 2**60)), *gaps])
    values = data.draw(numpy_strategies.arrays(dtype, (len(steps), *shape)))
    flushes = data.draw(st.sets(st.integers(0, len(steps) - 1)))
    with tempfile.TemporaryDirectory() as folder:
        with RecordWriter(folder, rank=1, flush_interval=60.0) as record:
            for position, (step, value) in enumerate(zip(steps, values, strict=True)):
                record.add(int(step), {"x": value})
                if position in flushes:
                    record.flush()
        read = open_record(folder)["x"]
    assert read.step.values.tolist() == steps.tolist()
    assert read.dtype == dtype
    assert read.values.tobytes() == values.tobytes()


def test_many_small_flushes_leave_few_chunks(run):
    # A run of one step a second must not leave one chunk a step: merging leaves log2(300) ~ 9.
    with RecordWriter(run, flush_interval=60.0) as record:
        for step in range(300):
            record.add(step, {"x": float(step)})
            record.flush()
    (file,) = open_record(run).files()
    assert len(list(file.chunks("x"))) <= 9
    assert open_record(run)["x"].values.tolist() == list(range(300))


@pytest.mark.parametrize("step", [4, 3])
def test_repeated_or_decreasing_step_is_refused_at_once_and_leaves_nothing(run, step):
    with RecordWriter(run) as record:
        record.add(4, {"loss": 1.0})
        with pytest.raises(RecordError, match=f"'loss' already has step 4, so step {step} cannot follow"):
            record.add(step, {"fresh": 1.0, "loss": 2.0})
    assert open_record(run).names() == ["loss"]
    assert open_record(run)["loss"].values.tolist() == [1.0]


def test_series_may_be_measured_at_different_steps(run):
    with RecordWriter(run) as record:
        record.add(5, {"a": 1.0})
        record.add(2, {"b": 1.0})
        record.add(5, {"b": 2.0})
    assert open_record(run)["b"].step.values.tolist() == [2, 5]


@pytest.mark.parametrize("value", [np.zeros(3), 1.0, np.zeros((2, 2))])
def test_value_of_another_shape_is_refused(run, value):
    with RecordWriter(run) as record:
        record.add(0, {"x": np.zeros(2)})
        with pytest.raises(RecordError, match=r"'x' has shape \(2,\)"):
            record.add(1, {"x": value})


def test_value_that_does_not_fit_the_declared_labels_is_refused(run):
    with RecordWriter(run) as record:
        record.declare(Series("x", ("layer",), coords={"layer": [0, 1, 2]}))
        with pytest.raises(RecordError, match=r"'x' has shape \(3,\), but a value of shape \(2,\) came"):
            record.add(0, {"x": np.zeros(2)})


@pytest.mark.parametrize("value", [1j, "1.0", None, 2**70, [[1.0], [1.0, 2.0]], np.uint64(1)])
def test_value_that_is_no_real_number_is_refused(run, value):
    with RecordWriter(run) as record, pytest.raises(RecordError, match="'x'"):
        record.add(0, {"x": value})


def test_declaring_again_is_allowed_and_contradicting_is_not(run):
    with RecordWriter(run) as record:
        record.declare(Series("x", ("layer",), coords={"layer": (1, 2)}))
        record.declare(Series("x", ("layer",), coords={"layer": [1, 2]}))
        with pytest.raises(RecordError, match="already declared"):
            record.declare(Series("x", ("head",)))


@pytest.mark.parametrize(
    "series",
    [
        Series(""),
        Series("x", ("a", "a")),
        Series("x", ("step",)),
        Series("x", ("rank",)),
        Series("x", coords={"a": [1]}),
        Series("\ud800"),
    ],
)
def test_declaration_without_sense_is_refused(run, series):
    with RecordWriter(run) as record, pytest.raises(ValueError, match=r"name|dims|coords"):
        record.declare(series)


def test_events_keep_order_step_and_data(run):
    with RecordWriter(run) as record:
        record.event("start", "Started.", data={"lr": np.float32(0.5), "seeds": np.arange(2)})
        record.event("probe-off", "It raised \ud800.", step=9)
    first, second = open_record(run).events
    assert (first.kind, first.step, dict(first.data)) == ("start", None, {"lr": 0.5, "seeds": [0, 1]})
    assert (second.message, second.step, second.rank) == ("It raised \\ud800.", 9, 0)


def test_steps_may_be_numpy_integers(run):
    with RecordWriter(run) as record:
        record.event("note", "", step=np.int64(3))
    assert open_record(run).events[0].step == 3


def test_step_beyond_64_bits_is_refused(run):
    with RecordWriter(run) as record, pytest.raises(RecordError, match="64 bits"):
        record.add(2**63, {"x": 1.0})


def test_value_of_a_quarter_gigabyte_is_refused(run):
    huge = np.broadcast_to(np.float32(0), (2**14, 2**12))
    with RecordWriter(run) as record, pytest.raises(RecordError, match=r"'x': a value of shape .* is too large"):
        record.add(0, {"x": huge})


def test_signal_handler_that_logs_and_flushes_disturbs_nothing(run):
    # A timer of processor time interrupts the main thread wherever it is, also in the middle of a flush.
    num_signals, numbers = 0, itertools.count()

    def on_signal(number, frame):
        nonlocal num_signals
        record.event("signal", str(next(numbers)))  # a handler may itself be interrupted, on a slow machine
        record.flush()
        num_signals += 1

    record = RecordWriter(run, flush_interval=60.0)
    before = signal.signal(signal.SIGVTALRM, on_signal)
    signal.setitimer(signal.ITIMER_VIRTUAL, 0.002, 0.002)
    step = 0
    while num_signals < 50:
        record.add(step, {"x": float(step)})
        step += 1
        if step % 20 == 0:
            record.flush()
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)
    record.close()
    assert open_record(run)["x"].values.tolist() == list(range(step))
    assert sorted(int(event.message) for event in open_record(run).events) == list(range(num_signals))


def test_finding_of_the_same_place_and_step_is_kept_once(run):
    finding = Finding("spike", "warning", 3, "Loss rose.", {"z": float("inf")}, "lr=1e-4", "convention", "loss")
    elsewhere = Finding("spike", "warning", 3, "Loss rose.", {}, "lr=1e-4", "convention", "loss", where="layer 1")
    with RecordWriter(run) as record:
        for each in (finding, finding, elsewhere):
            record.finding(each)
            record.flush()
    assert open_record(run).findings == [finding, elsewhere]


def test_threads_may_add_at_the_same_time(run):
    def add(name):
        for step in range(500):
            record.add(step, {name: float(step)})

    with RecordWriter(run, flush_interval=0.001) as record:
        threads = [threading.Thread(target=add, args=(f"thread {number}",)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [open_record(run)[name].values.tolist() for name in open_record(run)] == [list(range(500))] * 4


def test_background_thread_writes_without_being_asked(run):
    with RecordWriter(run, flush_interval=0.01) as record:
        record.add(0, {"x": 1.0})
        follower, waiting = open_record(run), threading.Event()
        while "x" not in follower or not follower["x"].size:
            waiting.wait(0.005)


def test_full_buffer_waits_for_the_disk_and_loses_nothing(run):
    with RecordWriter(run, flush_interval=60.0, buffer_bytes=1000) as record:
        for step in range(1000):
            record.add(step, {"x": float(step)})
        assert record._waiting_bytes <= 1000 + 64  # the bound, and one call's point
    assert open_record(run)["x"].values.tolist() == list(range(1000))


def test_closed_record_is_one_file_without_side_files(run):
    with RecordWriter(run) as record:
        record.add(0, {"x": 1.0})
    assert sorted(path.name for path in run.iterdir()) == ["artifacts", "rank-00000.sqlite", "run.json"]


def test_closed_writer_ignores_what_comes_after(run):
    with RecordWriter(run) as record:
        record.add(0, {"x": 1.0})
    record.add(1, {"x": 2.0})
    record.event("late", "Too late.")
    record.close()
    assert open_record(run).last_step() == 0
    assert open_record(run).events == []


def test_network_file_system_gets_a_rollback_journal(run, monkeypatch):
    monkeypatch.setattr(locking, "allows_wal", lambda folder: False)
    with RecordWriter(run) as record:
        record.add(0, {"x": 1.0})
        record.flush()
        assert not Path(run, "rank-00000.sqlite-wal").exists()
        assert open_record(run)["x"].values.tolist() == [1.0]


def test_clock_going_backwards_changes_no_order(run, monkeypatch):
    clock = iter(range(1_000_000, 0, -1))
    monkeypatch.setattr(writer.time, "time", lambda: float(next(clock)))
    with RecordWriter(run) as record:
        for step in range(5):
            record.add(step, {"x": float(step)})
            record.flush()
        record.finding(Finding("a", "info", 1, "", {}, "", ""))
        record.finding(Finding("b", "info", 0, "", {}, "", ""))
    assert open_record(run)["x"].values.tolist() == [0, 1, 2, 3, 4]
    assert [finding.id for finding in open_record(run).findings] == ["a", "b"]
