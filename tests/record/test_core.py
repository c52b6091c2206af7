"""What is added is read back."""

import numpy as np
import torch

from dynascope.record import Finding, RecordWriter, Series, open_record


def test_scalars_and_arrays_are_read_back(tmp_path):
    with RecordWriter(tmp_path / "run", config={"seed": 3}) as writer:
        writer.declare(Series("a/e", ("layer", "head"), "nats", "Entropy.", {"layer": ["x", "y"]}))
        for step in range(0, 5000, 5):
            writer.add(
                step,
                {
                    "loss": step / 7,
                    "a/e": np.full((2, 3), step, np.float32),
                    "t": torch.ones(3, dtype=torch.bfloat16),
                },
            )
        writer.event("start", "Started.", step=0, data={"n": np.float32(2)})
        writer.finding(Finding("spike", "warning", 3, "m", {"x": float("nan")}, "r", "s"))
        writer.finding(Finding("spike", "warning", 3, "m", {"x": 1.0}, "r", "s"))
    with open_record(tmp_path / "run") as record:
        assert record.names() == ["a/e", "loss", "t"]
        loss = record["loss"]
        assert loss.step.values.tolist() == list(range(0, 5000, 5))
        assert (loss.values == loss.step.values / 7).all()
        entropy = record.series("a/e", since=10, until=20)
        assert entropy.dims == ("step", "layer", "head")
        assert entropy.dtype == np.float32
        assert entropy.sel(step=15, layer="y").values.tolist() == [15.0] * 3
        assert entropy.attrs == {"unit": "nats", "description": "Entropy."}
        assert record["t"].dtype == np.float32
        assert record.config["config"] == {"seed": 3}
        assert len(record.findings) == 1
        assert record.events[0].data == {"n": 2.0}
        assert record.last_step() == 4995
        assert not record.is_live()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "artifacts",
        "rank-00000.sqlite",
        "run.json",
    ]
