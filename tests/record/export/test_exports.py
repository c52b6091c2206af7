"""Each format, read back by its own library, holds what the record holds."""

import json
import math
import struct
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import xarray

from dynascope.record import Finding, RecordError, RecordWriter, Series, open_record
from dynascope.record.export import export, rows, to_netcdf, to_parquet
from dynascope.record.export.rows import tags
from dynascope.record.export.to_mlflow import metric_name
from dynascope.record.export.to_netcdf import group_of

NAN, INF = float("nan"), float("inf")
LOSSES = [2.5, NAN, INF, -INF, 0.1]
HOSTILE = ['it\'s "x"', "two\nlines", "<script>", "nul\0in", "../../up", "/", "a//b", "x" * 400, "Δ🙂", " ", "%41", "a"]
FORMATS = ["parquet", "netcdf", "tensorboard", "wandb", "mlflow"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Scalars with NaN and infinities, arrays with and without labels, bools and large integers, hostile names."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    with RecordWriter(folder, config={"seed": 3}) as writer:
        writer.declare(Series("train/loss", unit="nats", description="Training loss."))
        writer.declare(Series("attention/entropy", ("layer", "head"), "nats", coords={"layer": ["first", "last"]}))
        for step, loss in enumerate(LOSSES):
            writer.add(10 * step, {"train/loss": loss, "is_warm": step > 2, "tokens": 2**53 + step})
        for step in (0, 40):
            writer.add(step, {"attention/entropy": np.arange(4, dtype=np.float32).reshape(2, 2) + step})
        writer.add(20, {name: float(number) for number, name in enumerate(HOSTILE)})
        writer.event("start", "Started.", data={"x": 1})
        writer.finding(Finding("spike", "warning", 3, "It rose.", {"z": 1.0}, "lr=1e-4", "convention"))
    return folder


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Two ranks, of which the second lacks step 1."""
    folder = tmp_path_factory.mktemp("runs") / "many"
    for rank, steps in enumerate([[0, 1, 2], [0, 2]]):
        with RecordWriter(folder, rank=rank) as writer:
            for step in steps:
                writer.add(step, {"x": 10 * rank + step})
    return folder


def same(left, right):
    """Equal lists of floats, where NaN equals NaN."""
    return len(left) == len(right) and all(
        a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(left, right, strict=True)
    )


# Parquet


def test_parquet_has_one_tidy_table_a_series(run, tmp_path):
    folder = export(run, "parquet", tmp_path / "out")
    table = pq.read_table(folder / "train%2Floss.parquet")
    assert table.column_names == ["step", "value"]
    assert table["step"].to_pylist() == [0, 10, 20, 30, 40]
    assert same(table["value"].to_pylist(), LOSSES)
    assert table.schema.metadata == {b"name": b"train/loss", b"unit": b"nats", b"description": b"Training loss."}
    entropy = pq.read_table(folder / "attention%2Fentropy.parquet").to_pylist()
    assert len(entropy) == 8
    assert entropy[6] == {"step": 40, "layer": "last", "head": 0, "value": 42.0}


def test_parquet_keeps_dtypes(run, tmp_path):
    folder = export(run, "parquet", tmp_path / "out")
    assert pq.read_table(folder / "tokens.parquet")["value"].to_pylist() == [2**53 + step for step in range(5)]
    assert str(pq.read_schema(folder / "is_warm.parquet").field("value").type) == "bool"
    assert str(pq.read_schema(folder / "attention%2Fentropy.parquet").field("value").type) == "float"


def test_parquet_index_finds_hostile_names_events_and_findings(run, tmp_path):
    folder = export(run, "parquet", tmp_path / "out")
    index = json.loads((folder / "index.json").read_text())
    files = {entry["name"]: entry["file"] for entry in index["series"]}
    assert list(files) == open_record(run).names()
    assert len({file.lower() for file in files.values()}) == len(files)
    for number, name in enumerate(HOSTILE):
        assert pq.read_table(folder / files[name])["value"].to_pylist() == [number]
    assert index["events"][0]["message"] == "Started."
    assert index["findings"][0]["id"] == "spike"
    assert index["run"]["config"] == {"seed": 3}


def test_parquet_names_that_differ_in_case_alone_get_two_files(tmp_path):
    with RecordWriter(tmp_path / "run") as writer:
        writer.add(0, {"Loss": 1.0, "loss": 2.0})
    folder = export(tmp_path / "run", "parquet")
    assert {path.name.lower() for path in folder.iterdir()} == {"loss.parquet", "loss~2.parquet", "index.json"}


def test_parquet_has_a_column_of_ranks(ranks, tmp_path):
    table = pq.read_table(export(ranks, "parquet", tmp_path / "out") / "x.parquet")
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        (0, 0, 0),
        (0, 1, 1),
        (0, 2, 2),
        (1, 0, 10),
        (1, 2, 12),
    ]


# NetCDF


def test_netcdf_groups_equal_the_record_series(run, tmp_path):
    path = export(run, "netcdf", tmp_path / "out.nc")
    record = open_record(run)
    for name in record:
        with xarray.open_dataset(path, group=group_of(name, record.names()), engine="h5netcdf") as dataset:
            value = dataset["value"].load()
        assert value.attrs.pop("series_name") == name.replace("\0", "\u2400")
        xarray.testing.assert_identical(value.rename(None), record[name].rename(None))
        assert value.dtype == record[name].dtype


def test_netcdf_holds_events_findings_and_configuration(run, tmp_path):
    path = export(run, "netcdf", tmp_path / "out.nc")
    with xarray.open_dataset(path, group="%record", engine="h5netcdf") as about:
        assert json.loads(about["events"].item())[0]["kind"] == "start"
        assert json.loads(about["findings"].item())[0]["id"] == "spike"
        assert json.loads(about["run"].item())["config"] == {"seed": 3}


def test_netcdf_opens_as_one_tree(run, tmp_path):
    with xarray.open_datatree(export(run, "netcdf", tmp_path / "out.nc"), engine="h5netcdf") as tree:
        assert tree["attention/entropy"]["value"].sel(step=40, layer="last", head=0) == 42


def test_netcdf_joins_ranks_with_nan(ranks, tmp_path):
    with xarray.open_dataset(export(ranks, "netcdf", tmp_path / "x.nc"), group="x", engine="h5netcdf") as dataset:
        assert dataset["value"].dims == ("rank", "step")
        assert same(dataset["value"].values.ravel().tolist(), [0, 1, 2, 10, NAN, 12])


def test_netcdf_group_names_can_be_told_back():
    groups = [group_of(name, HOSTILE) for name in HOSTILE]
    assert len(set(groups)) == len(groups)
    assert groups[HOSTILE.index("a")] == "a%"  # since "a//b" begins with it
    assert groups[HOSTILE.index("../../up")] == "%2E%2E/%2E%2E/up"


# TensorBoard


def read_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]
    }


def test_tensorboard_reads_the_same_steps_and_float32_values(run, tmp_path):
    scalars = read_tensorboard(export(run, "tensorboard", tmp_path / "out"))
    steps, values = zip(*scalars["train/loss"], strict=True)
    assert steps == (0, 10, 20, 30, 40)
    assert same(values, np.float32(LOSSES).tolist())
    assert scalars["attention/entropy/layer=last/head=0"] == [(0, 2.0), (40, 42.0)]
    assert scalars["is_warm"] == [(0, 0), (10, 0), (20, 0), (30, 1), (40, 1)]
    for number, name in enumerate(HOSTILE):
        assert scalars[name] == [(20, number)]


def test_tensorboard_shows_ranks_as_runs(ranks, tmp_path):
    folder = export(ranks, "tensorboard", tmp_path / "out")
    assert read_tensorboard(folder / "rank-00001") == {"x": [(0, 10.0), (2, 12.0)]}


# Weights & Biases


def read_wandb(folder):
    """Rows of each offline run by its name, parsed with W&B's own message classes.

    The package ships no Python reader of the log around the messages any more: LevelDB's format of 32 KiB blocks with
    a header of 7 bytes (checksum, length, kind: 1 whole, 2 first, 3 middle, 4 last), after a file header of 7 bytes.
    """
    from wandb.proto import wandb_internal_pb2

    runs = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        content, place, message, rows, name = path.read_bytes(), 7, b"", [], None
        while place + 7 <= len(content):
            if 32768 - place % 32768 < 7:
                place += 32768 - place % 32768
                continue
            _, length, kind = struct.unpack_from("<IHB", content, place)
            message += content[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):
                record = wandb_internal_pb2.Record.FromString(message)
                message = b""
                if record.HasField("run"):
                    name, config = (
                        record.run.display_name,
                        {item.key: item.value_json for item in record.run.config.update},
                    )
                if record.HasField("history"):
                    values = {
                        item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item
                    }
                    rows.append((record.history.step.num, values))
        runs[name] = (config, rows)
    return runs


def test_wandb_log_holds_rows_and_configuration(run, tmp_path):
    config, rows = read_wandb(export(run, "wandb", tmp_path / "out"))["mine"]
    assert json.loads(config["config"]) == {"seed": 3}
    rows = dict(rows)
    assert list(rows) == [0, 10, 20, 30, 40]
    assert same([float(rows[step]["train/loss"]) for step in rows], LOSSES)
    assert rows[40]["attention/entropy/layer=last/head=0"] == 42
    assert rows[40]["tokens"] == 2**53 + 4
    for number, name in enumerate(HOSTILE):
        assert rows[20][name] == number


def test_wandb_log_has_one_run_a_rank(ranks, tmp_path):
    runs = read_wandb(export(ranks, "wandb", tmp_path / "out"))
    assert [(step, values["x"]) for step, values in runs["rank-00001"][1]] == [(0, 10), (2, 12)]


def test_wandb_runs_of_the_caller_go_on(ranks, tmp_path):
    import wandb

    settings = wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True, x_disable_meta=True)
    mine = wandb.init(mode="offline", dir=str(tmp_path), project="mine", name="mine", settings=settings)
    export(ranks, "wandb", tmp_path / "out")
    assert wandb.run is mine
    mine.log({"x": 7})
    mine.finish()
    wandb.teardown()
    assert [values["x"] for _, values in read_wandb(tmp_path)["mine"][1]] == [7]


def test_wandb_refuses_negative_steps(tmp_path):
    with RecordWriter(tmp_path / "run") as writer:
        writer.add(-1, {"x": 1.0})
    with pytest.raises(ValueError, match="begins at step -1"):
        export(tmp_path / "run", "wandb")


# MLflow


def test_mlflow_client_reads_metrics_and_parameters(run, tmp_path):
    from mlflow.tracking import MlflowClient

    folder = export(run, "mlflow", tmp_path / "out")
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    (stored,) = client.search_runs([client.get_experiment_by_name("dynascope").experiment_id])
    assert stored.info.status == "FINISHED"
    assert stored.data.params == {"seed": "3"}
    history = client.get_metric_history(stored.info.run_id, "train/loss")
    assert [metric.step for metric in history] == [0, 10, 20, 30, 40]
    largest = sys.float_info.max  # how MLflow keeps an infinity
    assert same([metric.value for metric in history], [2.5, NAN, largest, -largest, 0.1])
    (_, last) = client.get_metric_history(stored.info.run_id, "attention/entropy/layer:3d:last/head:3d:0")
    assert (last.step, last.value) == (40, 42.0)
    originals = json.loads((folder / "metric_names.json").read_text())
    for stored_name, name in originals.items():
        if name in HOSTILE:
            (metric,) = client.get_metric_history(stored.info.run_id, stored_name)
            assert metric.value == HOSTILE.index(name)
    assert set(HOSTILE) <= set(originals.values())


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a/layer=0", "a/layer:3d:0"), ("a:b", "a:3a:b"), ("..", ":2e::2e:"), ("a//b", "a/::/b"), ("Δ", ":394:")],
)
def test_mlflow_names_are_encoded(name, expected):
    assert metric_name(name) == expected


# All


def test_arrays_become_one_tag_a_number():
    series = Series("a", ("layer", "head"), coords={"head": ["x", "y"]})
    assert tags(series, (1, 2)) == ["a/layer=0/head=x", "a/layer=0/head=y"]


@pytest.mark.parametrize("to", FORMATS)
def test_default_place_is_in_the_run_and_nothing_is_written_over(tmp_path, to):
    with RecordWriter(tmp_path / "run") as writer:
        writer.add(0, {"x": 1.0})
    shares = []
    path = export(tmp_path / "run", to, progress=shares.append)
    assert path.parent == tmp_path / "run" / "export"
    assert shares == sorted(shares)
    assert shares[-1] == 1
    with pytest.raises(ValueError, match="exists already; choose another output"):
        export(tmp_path / "run", to)


@pytest.mark.parametrize("to", FORMATS)
def test_record_without_series_is_exported(tmp_path, to):
    with RecordWriter(tmp_path / "run") as writer:
        writer.declare(Series("never", ("layer",)))
    assert export(tmp_path / "run", to).exists()


@pytest.mark.parametrize("to", FORMATS)
def test_missing_library_says_what_to_install(run, monkeypatch, tmp_path, to):
    library = {"parquet": "pyarrow", "netcdf": "h5netcdf"}.get(to, to)
    for module in [library, *(name for name in sys.modules if name.startswith(f"{library}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"dynascope.record.export.to_{to}", raising=False)
    with pytest.raises(ValueError, match=rf'export to {to} needs {library}.*pip install "dynascope\[export\]"'):
        export(run, to, tmp_path / "out")


def test_unknown_format_lists_the_known(run):
    with pytest.raises(ValueError, match="unknown format 'csv'; choose one of parquet, netcdf"):
        export.__wrapped__(run, "csv")


def test_failed_export_leaves_nothing_behind(tmp_path):
    with RecordWriter(tmp_path / "run") as writer:
        for step in range(3000):
            writer.add(step, {"good": float(step), "torn": step / 7})
    path = tmp_path / "run" / "rank-00000.sqlite"
    content = path.read_bytes()
    place = content.index((np.arange(1500, 1510) / 7).tobytes())
    path.write_bytes(content[:place] + b"\xff" * 8 + content[place + 8 :])
    with pytest.raises(RecordError, match="damaged"):
        export(tmp_path / "run", "parquet", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_windows_that_cut_chunks_lose_and_repeat_nothing(tmp_path, monkeypatch):
    # A chunk holds 2048 scalars or 1024 pairs; windows of 20 kB end in the midst of both kinds.
    monkeypatch.setattr(rows, "WINDOW_BYTES", 20_000)
    monkeypatch.setattr(to_netcdf, "_WINDOW_BYTES", 20_000)
    monkeypatch.setattr(to_parquet, "_BATCH_BYTES", 20_000)
    with RecordWriter(tmp_path / "run") as writer:
        for step in range(8000):
            values = {"x": float(step)}
            writer.add(step, values if step % 3 else {**values, "pair": np.array([step, -step])})
    expected = np.arange(8000)
    table = pq.read_table(export(tmp_path / "run", "parquet") / "x.parquet")
    assert (table["value"].to_numpy() == expected).all()
    with xarray.open_dataset(export(tmp_path / "run", "netcdf"), group="pair", engine="h5netcdf") as dataset:
        assert (dataset["value"].values[:, 1] == -expected[::3]).all()
    scalars = read_tensorboard(export(tmp_path / "run", "tensorboard"))
    assert scalars["x"] == [(step, step) for step in range(8000)]
    assert scalars["pair/dim_0=1"] == [(step, -step) for step in range(0, 8000, 3)]
