"""Each claim of exact-permutations tells a world with the effect from one without; and the study runs."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from every_study import StudyTests
from fabricated import worlds_of

from dynascope.record import open_record
from dynascope.studies import Claim, Runs, StudyRecord, load_study
from dynascope.studies.exact_permutations.method import CLOSED_K, PAPERS_SIZES, SAMPLED_K, Config
from dynascope.theory.permutations import ensemble_size, permutation_predictor

STUDY = load_study("exact-permutations")


def world(folder: Path, seed: int, *, is_effect: bool, claim: str) -> Runs:
    """One seed's records in a world where the paper is right about everything, or about nothing."""
    jitter = 1 + 0.01 * seed
    k = np.array(CLOSED_K, float)
    steps: dict[str, dict[int, dict[str, object]]] = {}
    single, every = (k * np.log(k), k**2) if is_effect else (k**2, k**1.4)
    steps["closed-form"] = {0: {"size/single": 100 * single, "size/all": 100 * every}}
    for kernel in ("ntk", "nngp"):
        # Where the paper is right, its own sizes are those of the tangent kernel.
        is_papers = (kernel == "ntk") == is_effect
        steps[f"sampled-{kernel}"] = {}
        for at, size in enumerate(SAMPLED_K):
            exact = ensemble_size(size, 0.1) if is_effect else 3 * ensemble_size(size, 0.1)
            found = {delta: float(sizes[at]) * (1 if is_papers else 8) for delta, sizes in PAPERS_SIZES.items()}
            if kernel == "ntk" and claim == "C4":
                found = dict.fromkeys(PAPERS_SIZES, float(exact))
            steps[f"sampled-{kernel}"][size] = {f"size/{delta}": value * jitter for delta, value in found.items()}
        limit, gap = permutation_predictor(5, 2, kernel), 0.0 if is_effect else 0.2  # type: ignore[arg-type]
        steps[f"trained-{kernel}"] = {
            2: {
                "mean/one": limit.one + gap + 1e-4 * seed,
                "mean/zero": limit.zero + gap + 1e-4 * seed,
                "variance": limit.variance * (1 + 2 * gap) * jitter,
                "error/single": 0.449 - gap + 1e-3 * seed,
            }
        }
    for size in (5, 8):
        steps[f"every-input-{size}"] = {0: {"wrong": 0.0 if is_effect else 3.0}}
    runs = {}
    for arm, rows in steps.items():
        with StudyRecord(folder / arm, earlier={}, config={}) as record:
            for step, values in rows.items():
                record.add(step, values)  # type: ignore[arg-type]
        runs[arm] = open_record(folder / arm)
    return runs


class TestStudy(StudyTests):
    study = STUDY
    num_figures = 3

    @pytest.fixture
    def worlds(self, claim: Claim, tmp_path: Path) -> dict[bool, list[Runs]]:
        """The same sizes serve two claims that no one world can satisfy: the paper's own are not the tangent kernel's."""
        return worlds_of(partial(world, claim=claim.id), tmp_path, self.num_seeds)


@pytest.mark.parametrize("settings", [{"width": 0}, {"num_networks": 1}, {"delta_all": 1.0}])
def test_impossible_settings_are_told(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must lie between|at least 1"):
        Config(**settings)  # type: ignore[arg-type]
