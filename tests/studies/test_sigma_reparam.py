"""Each claim of sigma-reparam tells a world with the effect from one without; and the study runs."""

from pathlib import Path
from typing import Any

import numpy as np
from every_study import StudyTests

from dynascope.record import Finding, Series, open_record
from dynascope.studies import Runs, StudyRecord, Verdict, load_study
from dynascope.studies.sigma_reparam.method import LR_FACTORS, TEXT_ARMS, at

STUDY = load_study("sigma-reparam")
NUM_STEPS = 40


def arm_record(
    folder: Path, *, final_loss: float, entropy: float, growth: float = 1.0, accuracy: float = 0.9, spikes: bool = False
) -> Any:
    """A run whose loss and lowest entropy go to these values, with a spike in the middle if wanted."""
    with StudyRecord(folder, earlier={}, config={}) as record:
        record.declare(Series("attention/entropy_normalized", ("layer", "head")))
        record.declare(Series("growth/qk", ("layer", "map")))
        for step in range(NUM_STEPS):
            share = step / (NUM_STEPS - 1)
            record.add(step, {"loss": 5 + share * (final_loss - 5)})
            record.add(step, {"attention/entropy_normalized": np.full((2, 2), 1 + share * (entropy - 1))})
        record.add(NUM_STEPS - 1, {"growth/qk": np.full((2, 2), growth), "accuracy": accuracy})
        if spikes:
            record.finding(Finding("loss-spike", "warning", NUM_STEPS - 2, "", {}, "", ""))
    return open_record(folder)


def world(folder: Path, seed: int, *, is_effect: bool) -> Runs:
    """One seed's records in a world where the paper is right about everything, or about nothing."""
    jitter = 0.01 * seed
    collapsed, open_ = 0.02, 0.6
    runs = {}
    for name in TEXT_ARMS:
        for factor in LR_FACTORS:
            is_sigma, is_high = name == "sigma", factor >= 10
            trains = (is_sigma or not is_high) if is_effect else (not is_sigma or not is_high)
            entropy = (open_ if is_sigma else collapsed) if is_effect else (0.01 if is_sigma else 0.05)
            if not is_effect and name == "post-ln":
                entropy = open_  # unstable without collapse
            runs[at(name, factor)] = arm_record(
                folder / at(name, factor),
                final_loss=(2.0 if trains else 4.0) + jitter,
                entropy=entropy,
                growth=(1.1 if is_sigma else 3.0) + jitter if is_effect else (3.0 if is_sigma else 1.1) + jitter,
                spikes=is_high and (name == "post-ln" if not is_effect else not is_sigma),
            )
    sign = 1 if is_effect else -1
    runs["heated"] = arm_record(
        folder / "heated", final_loss=2.0 + sign * 0.5 + 2 * jitter, entropy=0.01 if is_effect else 0.5
    )
    for name, accuracy in {"vision-pre-ln": 0.95, "vision-sigma": 0.945, "vision-sigma-sgd": 0.945}.items():
        lost = 0.0 if is_effect or name == "vision-pre-ln" else 0.1
        runs[name] = arm_record(folder / name, final_loss=0.2, entropy=0.5, accuracy=accuracy - lost + 0.1 * jitter)
    return runs


class TestStudy(StudyTests):
    study = STUDY
    world = staticmethod(world)
    num_figures = 4
    num_seeds = 5

    def test_attention_and_growth_are_recorded(self, smoke: Verdict) -> None:
        record = open_record(smoke.run / at("sigma", 1.0) / "seed-0")
        assert record["attention/entropy_normalized"].dims == ("step", "layer", "head")
        assert {"loss", "growth/qk", "gradients/total_norm"} <= set(record.names())


def test_arms_of_a_seed_see_the_same_text(tmp_path: Path) -> None:
    import torch

    from dynascope.studies.sigma_reparam.method import Config, text

    batches = [text(Config(), torch.Generator().manual_seed(3))[0]() for _ in range(2)]
    assert all(torch.equal(one, two) for one, two in zip(*batches, strict=True))
