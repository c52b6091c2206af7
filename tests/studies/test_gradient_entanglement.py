"""Each claim of gradient-entanglement tells a world with the effect from one without; and the study runs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from every_study import StudyTests
from fabricated import fabricate

from dynascope.losses import MARGIN_LOSSES, margin_loss
from dynascope.record import Record
from dynascope.studies import Runs, load_study
from dynascope.studies.gradient_entanglement.claims import gained_at, kept_over_dpo
from dynascope.studies.gradient_entanglement.method import (
    Arm,
    Config,
    Counts,
    Transformer,
    learning_rate,
    loss_of,
    sentiment_suffix,
    tokenwise,
    weighted,
)

STUDY = load_study("gradient-entanglement")
ENDS = {"dpo-0": -0.1, "dpo-8": -2.0}


def world(folder: Path, seed: int, *, is_effect: bool) -> Runs:
    """One seed's records in a world where the paper is right about everything, or about nothing."""
    random, arms = np.random.default_rng(seed), {}
    for name, arm in STUDY.arms.items():
        predicted = np.abs(random.standard_normal((100, 2))) * [1, -1]
        realised = predicted.copy()
        if not is_effect:
            realised[::3] *= -1
        end = ENDS.get(name, 3.0) if is_effect else {"dpo-8": 1.0, "dpo-0": -1.0}.get(name, 0.5)
        rise = arm.suffix if is_effect else -arm.suffix
        label = (0.9 if is_effect else 0.2) + 0.01 * seed
        arms[name] = {
            "token_weight": np.array([[label, *[0.5] * 8]]),
            "predicted": predicted[None],
            "realised": realised[None],
            "cosine": np.full((1, 100), rise / 10 + 0.001 * seed),
            "log_prob": np.array([[-20.0, -20.0], [-20.0 + end + 0.01 * seed, -25.0]]),
        }
    return fabricate(folder, arms)


class TestStudy(StudyTests):
    study = STUDY
    world = staticmethod(world)
    num_figures = 5


def test_responses_differ_in_the_label_alone() -> None:
    config = Config()
    batch = sentiment_suffix(config, 8, 50, torch.Generator().manual_seed(0))
    chosen, rejected = batch.tokens.chunk(2)
    differs = chosen != rejected
    assert bool(differs[:, config.prompt_length].all())
    assert int(differs.sum()) == 50
    assert 10 < int(chosen[:, config.prompt_length].sum()) < 40  # both labels occur
    assert batch.mask.sum(1).tolist() == [9] * 100


def record_of(folder: Path, chosen: list[float], rejected: list[float]) -> Record:
    return fabricate(folder, {"arm": {"log_prob": np.array([chosen, rejected]).T}})["arm"]


def test_gains_are_compared_at_the_same_margin(tmp_path: Path) -> None:
    record = record_of(tmp_path, [-9.0, -8.0, -7.0], [-9.0, -10.0, -13.0])  # margins 0, 2 and 6
    assert [gained_at(record, margin) for margin in (0.0, 1.0, 2.0, 4.0, 6.0)] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert np.isnan(gained_at(record, 6.1))


def test_a_loss_that_hardly_moves_keeps_nothing(tmp_path: Path) -> None:
    """Both go the same way: a tenth of the way is no protection."""
    dpo = record_of(tmp_path / "a", [-9.0, -10.0, -11.0], [-9.0, -12.0, -15.0])
    slow = record_of(tmp_path / "b", [-9.0, -9.1, -9.2], [-9.0, -9.3, -9.6])
    still = record_of(tmp_path / "c", [-9.0, -9.0, -9.0], [-9.0, -9.0, -9.0])
    assert kept_over_dpo({"dpo-8": dpo, "slow": slow}, ["slow"]) == pytest.approx(0.0)
    assert np.isnan(kept_over_dpo({"dpo-8": dpo, "still": still}, ["still"]))


@pytest.mark.parametrize("remedy", ["diff", "sparse"])
def test_masks_weigh_the_label_and_shared_tokens(remedy: str) -> None:
    config = Config(width=16, num_heads=2)
    pairs = sentiment_suffix(config, 8, 4, torch.Generator().manual_seed(0))
    model = Transformer(config)
    counts, reference = Counts(config, Arm(remedy=remedy), model, pairs), tokenwise(model, pairs).detach()
    weights, rows = counts.of(1), [1, 5]
    # Reference and policy are weighed alike, so that there is no margin at the start.
    torch.testing.assert_close(weighted(reference[rows], weights, reference[rows]).margin, torch.zeros(1))
    label = config.prompt_length - 1
    if remedy == "diff":
        assert weights.nonzero()[:, 1].tolist() == [label, label]
        return
    assert float(weights[:, label:].min()) > 0.8
    gained = torch.zeros(2, weights.shape[1])
    gained[:, label] = torch.tensor([30.0, -30.0])
    for _ in range(20):
        counts.learn(1, margin_loss("dpo"), reference[rows] + gained, reference[rows])
    after = counts.of(1)
    assert bool((after[:, label] > after[:, label + 1 :].max(1).values).all())


@pytest.mark.parametrize("name", MARGIN_LOSSES)
def test_no_loss_starts_with_larger_steps_than_rate_says(name: str, tmp_path: Path) -> None:
    """DPOP pulls harder as soon as the chosen response is below its reference."""
    known = torch.full((4,), -20.0)
    batch = sentiment_suffix(Config(), 8, 2, torch.Generator().manual_seed(0))
    lr = learning_rate(1e-3, loss_of(name), batch, known)
    for lower in (0.0, 0.1):
        found = loss_of(name).coefficients(batch.pairs(known - lower, known))
        assert float(lr * torch.cat(found).abs().max()) <= 1.1e-3


@pytest.mark.parametrize("settings", [{"num_steps": 0}, {"width": 30}])
def test_impossible_settings_are_told(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Config(**settings)
