"""What a reader sees, after a run and during it."""

import sqlite3
import threading

import numpy as np
import pytest

import dynascope
from dynascope.record import RecordError, RecordWriter, Series, open_record


@pytest.fixture
def run(tmp_path):
    with RecordWriter(tmp_path / "run") as writer:
        for step in range(100):
            writer.add(step, {"train/loss": float(step)})
        writer.add(50, {"grid": np.arange(4).reshape(2, 2)})
    return tmp_path / "run"


def test_dynascope_open_is_open_record(run):
    assert dynascope.open(run).names() == ["train/loss", "grid"]


def test_one_file_of_a_record_can_be_opened(run):
    record = open_record(run / "rank-00000.sqlite")
    assert record["train/loss"].sizes == {"step": 100}
    assert "config" in record.config


def test_since_and_until_are_included(run):
    assert open_record(run).series("train/loss", since=10, until=12).step.values.tolist() == [10, 11, 12]


def test_range_without_steps_is_empty(run):
    assert open_record(run).series("grid", since=51).sizes == {"step": 0, "dim_0": 2, "dim_1": 2}


def test_max_points_thins_and_keeps_the_ends(run):
    thin = open_record(run).series("train/loss", max_points=10)
    assert thin.sizes["step"] <= 10
    assert thin.step.values[[0, -1]].tolist() == [0, 99]


def test_max_points_below_eight_is_refused(run):
    with pytest.raises(ValueError, match="at least 8"):
        open_record(run).series("train/loss", max_points=1)


def test_max_points_below_eight_is_refused_for_several_ranks_too(tmp_path):
    _write_ranks(tmp_path, [range(20), range(20)])
    with pytest.raises(ValueError, match="at least 8"):
        open_record(tmp_path).series("x", max_points=7)


def test_unknown_name_lists_near_ones(run):
    with pytest.raises(KeyError, match="did you mean 'train/loss'"):
        open_record(run)["train/los"]


def test_names_can_be_asked_like_a_mapping(run):
    record = open_record(run)
    assert "grid" in record
    assert "nothing" not in record
    assert list(record) == record.names()
    assert record.last_step() == 99
    assert record.last_step("grid") == 50


def test_declared_series_without_values_is_empty(tmp_path):
    with RecordWriter(tmp_path) as writer:
        writer.declare(Series("x", ("layer", "head"), coords={"layer": ["a", "b"]}))
    x = open_record(tmp_path)["x"]
    assert x.sizes == {"step": 0, "layer": 2, "head": 0}
    assert open_record(tmp_path).last_step("x") is None


def _write_ranks(folder, steps_by_rank, value=lambda rank, step: float(10 * rank + step)):
    for rank, steps in enumerate(steps_by_rank):
        with RecordWriter(folder, rank=rank) as writer:
            for step in steps:
                writer.add(step, {"x": value(rank, step), f"only {rank}": 1.0})
            writer.event("end", f"rank {rank}")


def test_ranks_read_as_one_with_nan_where_one_lacks_a_step(tmp_path):
    _write_ranks(tmp_path, [[0, 1], [1, 2]])
    record = open_record(tmp_path)
    x = record["x"]
    assert x.dims == ("rank", "step")
    assert x.sel(rank=1, step=2) == 12
    assert np.isnan(x.sel(rank=1, step=0))
    assert record.ranks == [0, 1]
    assert sorted(event.rank for event in record.events) == [0, 1]


def test_series_of_one_rank_has_no_rank_dim(tmp_path):
    _write_ranks(tmp_path, [[0], [0]])
    assert open_record(tmp_path)["only 1"].dims == ("step",)


@pytest.mark.parametrize(("value", "dtype"), [(True, "bool"), (7, "int64")])
def test_ranks_with_equal_steps_keep_their_dtype(tmp_path, value, dtype):
    _write_ranks(tmp_path, [[0, 1], [0, 1]], value=lambda rank, step: value)
    assert open_record(tmp_path)["x"].dtype == dtype


def test_ranks_with_different_steps_become_float(tmp_path):
    _write_ranks(tmp_path, [[0, 1], [0]], value=lambda rank, step: True)
    assert open_record(tmp_path)["x"].dtype == "float64"


def test_spike_of_one_rank_survives_thinning_of_all(tmp_path):
    _write_ranks(tmp_path, [range(500)] * 2, value=lambda rank, step: 9.0 if (rank, step) == (1, 333) else 0.0)
    thin = open_record(tmp_path).series("x", max_points=40)
    assert thin.sizes["step"] <= 40
    assert thin.sel(rank=1, step=333) == 9
    assert thin.sel(rank=0, step=333) == 0


def test_several_readers_follow_a_growing_record(tmp_path):
    seen = {number: [0] for number in range(3)}
    is_done = threading.Event()

    def follow(number):
        record = open_record(tmp_path)
        while not is_done.is_set():
            if "x" in record:
                x = record["x"]
                assert x.values.tolist() == list(range(x.size))
                seen[number].append(x.size)

    with RecordWriter(tmp_path, flush_interval=0.005) as writer:
        readers = [threading.Thread(target=follow, args=(number,)) for number in seen]
        for reader in readers:
            reader.start()
        for step in range(400):
            writer.add(step, {"x": float(step)})
            if step % 10 == 0:
                writer.flush()
        while any(sizes[-1] < 400 for sizes in seen.values()):
            writer.flush()
        is_done.set()
        for reader in readers:
            reader.join()
    assert all(sizes == sorted(sizes) and sizes[-1] == 400 for sizes in seen.values())


def test_reader_in_the_middle_of_a_question_does_not_hold_up_the_writer(tmp_path):
    with RecordWriter(tmp_path) as writer:
        writer.add(0, {"x": 0.0})
        writer.flush()
        asking = sqlite3.connect(f"file:{tmp_path}/rank-00000.sqlite?mode=ro", uri=True, isolation_level=None)
        asking.execute("BEGIN")
        assert asking.execute("SELECT max(last) FROM chunk").fetchone() == (0,)
        writer.add(1, {"x": 1.0})
        writer.flush()
        assert open_record(tmp_path).last_step() == 1
        assert asking.execute("SELECT max(last) FROM chunk").fetchone() == (0,)
        asking.close()


def test_writer_closes_while_a_reader_is_in_the_middle_of_a_question(tmp_path):
    writer = RecordWriter(tmp_path)
    writer.add(0, {"x": 0.0})
    writer.flush()
    asking = sqlite3.connect(f"file:{tmp_path}/rank-00000.sqlite?mode=ro", uri=True, isolation_level=None)
    asking.execute("BEGIN")
    asking.execute("SELECT max(last) FROM chunk").fetchone()
    writer.add(1, {"x": 1.0})
    writer.close()
    asking.close()
    assert open_record(tmp_path)["x"].values.tolist() == [0, 1]


def test_rank_that_joins_later_is_seen(tmp_path):
    with RecordWriter(tmp_path, rank=0):
        record = open_record(tmp_path)
        with RecordWriter(tmp_path, rank=3) as late:
            late.add(0, {"x": 1.0})
            late.flush()
            assert record.ranks == [0, 3]
            assert record["x"].values.tolist() == [1.0]


def test_missing_record_is_told_apart_from_missing_folder(tmp_path):
    with pytest.raises(RecordError, match="holds no record"):
        open_record(tmp_path)
    with pytest.raises(RecordError, match="does not exist"):
        open_record(tmp_path / "nowhere")
