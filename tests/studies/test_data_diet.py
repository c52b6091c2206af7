"""Each claim of data-diet tells a world with the effect from one without; and the study runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from every_study import StudyTests
from fabricated import fabricate

from dynascope.record import Series, open_record
from dynascope.studies import Runs, StudyRecord, Verdict, load_study

STUDY = load_study("data-diet")
SIZE, RUNS = 200, 4


def scored(folder: Path, random: np.random.Generator, *, is_effect: bool) -> Any:
    """A scoring arm whose early scores tell the final ones, or are noise."""
    truth, wrong = random.random(SIZE), np.arange(SIZE) < 20
    noise = random.random((4, SIZE))
    early = truth + wrong if is_effect else noise[0]
    with StudyRecord(folder, earlier={}, config={}) as record:
        for name in ("el2n", "grand"):
            record.declare(Series(name, ("run", "example")))
        record.declare(Series("forgetting", ("run", "example")))
        levels = {0: noise[1], 1: noise[2] + (0.2 * early if is_effect else 0), 10: early, 40: truth + wrong}
        for epoch, values in levels.items():
            if epoch == 1 and not is_effect:
                values = truth + wrong  # the agreement falls
            record.add(epoch, {"el2n": np.tile(values, (RUNS, 1)), "grand": np.tile(levels[0], (RUNS, 1))})
        record.add(40, {"forgetting": np.tile(truth, (RUNS, 1)), "mislabelled": wrong.astype(float)})
        record.add(0, {"input_norm": levels[0] if is_effect else noise[3]})
    return open_record(folder)


def world(folder: Path, seed: int, *, is_effect: bool) -> Runs:
    """One seed's records in a world where the paper is right about everything, or about nothing."""
    random = np.random.default_rng(seed)
    jitter = lambda: 0.01 * random.random(3)  # noqa: E731
    better, base = (97.0, 95.0) if is_effect else (93.0, 95.0)
    accuracies = {arm: base for arm in STUDY.arms if "random" in arm or arm == "noisy-el2n-50"}
    by_score = (
        "el2n-50",
        "el2n-30",
        "el2n-20",
        "mlp-scores-50",
        "narrow-el2n-50",
        "noisy-window-50",
        "grand-at-init-50",
    )
    accuracies |= dict.fromkeys(by_score, better)
    accuracies["full"] = 97.0
    arms: dict[str, Mapping[str, Any]] = {arm: {"accuracy": value + jitter()} for arm, value in accuracies.items()}
    hard, easy = ([0.3, 0.3, 0.1, 0.0], [0.3, 0.0, 0.0, 0.0])
    arms["barrier"] = {"barrier/hardest": hard if is_effect else easy, "barrier/easiest": easy if is_effect else hard}
    arms["kernel"] = {"velocity/hardest": (0.2 if is_effect else 0.1) + jitter(), "velocity/easiest": 0.15 + jitter()}
    runs = dict(fabricate(folder, arms))
    for arm in ("score-conv", "score-noisy"):
        runs[arm] = scored(folder / arm, random, is_effect=is_effect)
    runs["score-mlp"] = runs["score-conv"] if is_effect else scored(folder / "score-mlp", random, is_effect=False)
    return runs


class TestStudy(StudyTests):
    study = STUDY
    world = staticmethod(world)
    num_figures = 6

    def test_smoke_preset_measures_and_keeps_what_it_should(self, smoke: Verdict) -> None:
        measured = {judgement.claim.id for judgement in smoke.judgements if judgement.measured is not None}
        assert measured >= {"C1-cost", "C4", "C5"}
        noisy = open_record(smoke.run / "score-noisy" / "seed-0")
        assert noisy["mislabelled"].values.mean() == pytest.approx(0.1, abs=0.002)
        assert open_record(smoke.run / "el2n-30" / "seed-0")["kept"].values[0] == round(0.3 * 297)


def test_pruned_arms_build_on_scores() -> None:
    assert STUDY.after["noisy-window-50"] == ("score-noisy",)
    assert "random-50" not in STUDY.after
