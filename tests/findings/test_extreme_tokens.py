"""Sinks, drains and peaks: silent on healthy runs, told in their order on sick ones."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynascope.findings.extreme_tokens import (
    ExtremeTokens,
    detect_extreme_tokens,
    lead,
    onset,
    reinforcement,
)
from dynascope.record import RecordWriter, Series, open_record

LOOKS = 40


def run(sink_at: int = LOOKS, drain_at: int = LOOKS, peak_at: int = LOOKS) -> dict[str, np.ndarray]:
    """Two layers of four heads; heads 1 take a sink, it drains, and block 1 peaks, each at its look (never by default)."""
    random = np.random.default_rng(0)
    mass = random.uniform(0.0, 0.05, (LOOKS, 2, 4, 8))
    norms = random.uniform(0.7, 1.3, (LOOKS, 2, 4, 8))
    peaks = random.uniform(1.5, 2.0, (LOOKS, 2))
    mass[:, 0, 0, 0] = 0.9  # one head of eight is no news
    mass[sink_at:, :, 1, 0] = 0.8
    norms[drain_at:, :, :2, 0] = 0.2
    peaks[peak_at:, 1] = 8.0
    return {"attention/sink_mass": mass, "attention/value_norm": norms, "residual/peak": peaks}


def test_healthy_run_is_silent(told: Any) -> None:
    assert told(ExtremeTokens, run()) == []


def test_sinks_are_told_when_many_heads_have_one(told: Any) -> None:
    (finding,) = told(ExtremeTokens, run(sink_at=12))
    assert (finding.id, finding.step, finding.severity, finding.where) == (
        "attention-sink",
        12,
        "info",
        "head 0 of layer 0",
    )
    assert finding.evidence["share_of_heads"] == pytest.approx(3 / 8)


def test_all_three_are_told_in_their_order(told: Any) -> None:
    findings = told(ExtremeTokens, run(sink_at=8, drain_at=14, peak_at=20))
    assert {finding.id: finding.step for finding in findings} == {
        "attention-sink": 8,
        "value-drain": 14,
        "residual-peak": 20,
    }
    messages = {finding.id: finding.message for finding in findings}
    assert "6 steps after the sink" in messages["value-drain"]
    assert "12 steps after the sink" in messages["residual-peak"]
    (peak,) = [finding for finding in findings if finding.id == "residual-peak"]
    assert (peak.where, peak.severity) == ("block 1", "warning")
    assert peak.evidence["growth"] == pytest.approx(8 / 1.75, rel=0.15)


def test_a_peak_that_was_there_from_the_start_is_not_told(told: Any) -> None:
    assert told(ExtremeTokens, {"residual/peak": np.full((LOOKS, 2), 9.0)}) == []


def test_runs_without_attention_are_silent(told: Any) -> None:
    assert told(ExtremeTokens, {"residual/peak": run()["residual/peak"]}) == []


def test_remedies_are_code_that_runs(told: Any) -> None:
    pytest.importorskip("transformers")
    import torch

    for finding in told(ExtremeTokens, run(sink_at=8, drain_at=14, peak_at=20)):
        names = {
            "torch": torch,
            "bos": torch.zeros(1, dtype=torch.long),
            "tokens": torch.ones(2, 3, dtype=torch.long),
            "model": torch.nn.Linear(2, 2),
        }
        exec(finding.remedy, names)


def record(folder: Path) -> Any:
    """A record of the probe in which the sink comes at 30, the drain at 50, the peak at 70."""
    with RecordWriter(folder) as writer:
        for name, dims in {"sink_score": 2, "value_drain": 2, "sink_logit": 2, "peak_median": 1}.items():
            writer.declare(Series(f"extreme/{name}", ("layer", "head")[:dims] if dims == 2 else ("block",)))
        for step in range(0, 101, 10):
            share = step / 100
            # Head 1 of layer 0 rises faster than the others.
            score, drain, logit = np.full((3, 2, 2), 0.1)
            score[0, 1] = 0.9 * share + 0.3
            drain[:] = 1.0
            drain[0, 1] = 1 - share - (0.01 if step == 50 else 0) + 0.001
            logit[0, 1] = 0.5 * np.log(step + 1e-9) if step else -1.0
            writer.add(step, {"extreme/sink_score": score, "extreme/value_drain": drain, "extreme/sink_logit": logit})
            writer.add(step, {"extreme/peak_median": np.array([1.0, 1.0 + (0.3 if step >= 70 else 0.0)])})
    return open_record(folder)


def test_onsets_and_reinforcement_of_a_record(tmp_path: Path) -> None:
    found = detect_extreme_tokens(record(tmp_path / "run"))
    assert (found.sink, found.drain, found.peak) == (30, 50, 70)
    assert found.order == ("sink", "drain", "peak")
    assert found.reinforcement == pytest.approx(1.0)
    assert found.slope == pytest.approx(0.5)


def test_a_record_without_the_probe_is_told(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "run") as writer:
        writer.add(0, {"loss": 1.0})
    with pytest.raises(KeyError, match="extreme/sink_score"):
        detect_extreme_tokens(open_record(tmp_path / "run"))


def test_pieces_by_hand() -> None:
    assert onset(np.arange(4), np.array([True, True, True, False])) is None
    assert onset(np.arange(4), np.ones(4, bool)) == 0
    assert np.isnan(reinforcement(np.ones(2), np.ones(2)))
    pulse = np.zeros(12)
    pulse[4:] = 1
    late = np.zeros(12)
    late[6:] = 1
    assert (lead(pulse, late), lead(late, pulse), lead(pulse, pulse)) == (2, -2, 0)
