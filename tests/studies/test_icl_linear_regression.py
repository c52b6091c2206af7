"""Each claim of icl-linear-regression tells a world with the effect from one without; and the study runs."""

from pathlib import Path

import numpy as np
import pytest
from every_study import StudyTests
from fabricated import fabricate

from dynascope.data.in_context.linear_regression import toeplitz_covariance
from dynascope.studies import Runs, load_study
from dynascope.studies.icl_linear_regression.claims import all_but_one
from dynascope.studies.icl_linear_regression.method import RHO, Config
from dynascope.theory.in_context_regression import preconditioner

STUDY = load_study("icl-linear-regression")
NETWORKS = 5


def world(folder: Path, seed: int, *, is_effect: bool) -> Runs:
    """One seed's records in a world where the paper is right about everything, or about nothing.

    In each seed one network of five has stalled, which the claims allow for.
    """
    noise = 0.002 * seed
    stalled = np.array([0, 0, 0, 0, 1.0])
    two = (0.243 if is_effect else 0.40) + noise + 0.2 * stalled
    far = (0.166 if is_effect else 0.30) + noise + 0.2 * stalled
    signs = np.array([[1, -1]] * 4 + [[1, 1]]) if is_effect else np.ones((NETWORKS, 2))
    best = preconditioner(toeplitz_covariance(5, RHO), 40, 0.1).numpy()
    kq = np.zeros((NETWORKS, 2, 6, 6))
    kq[:, 0, :5, :5], kq[:, 1, :5, :5] = (best, -best) if is_effect else (np.ones((5, 5)), np.eye(5))
    kq[:, 0, :5, :5] += 0.02 * (1 + seed) * np.eye(5)
    ov = np.zeros((NETWORKS, 2, 1, 6))
    ov[:, 0, 0, 5], ov[:, 1, 0, 5] = 0.5, -0.5
    arms = {
        "heads-1": {"risk": by_length([0.41], [0.29]), "lengths": [[40, 100]]},
        "heads-2": {
            "setting": [[5, 40, 0.1]],
            "lengths": [[40, 100]],
            "risk": by_length(two, far),
            "correlation": [(0.995 if is_effect else 0.9) - noise / 10 - 0.3 * stalled],
            "circuits/omega": [signs * (0.16 + noise)],
            "circuits/zero_sum": [(0.02 if is_effect else 0.7) + noise + 0.2 * stalled],
            "circuits/off_diagonal": [np.full((NETWORKS, 2), (0.07 if is_effect else 0.5) + noise)],
            "circuits/last_entry_share": [np.full((NETWORKS, 2), (0.98 if is_effect else 0.4) - noise)],
        },
        "linear": {"risk": by_length([0.25], [1.7 if is_effect else 0.2]), "lengths": [[40, 100]]},
        "anisotropic": {"kq": kq[None], "ov": ov[None]},
    }
    for heads, risk in ((4, 0.2), (3, 0.205 if is_effect else 0.3), (2, 0.4 if is_effect else 0.2)):
        arms[f"tasks-{heads}"] = {"risk": np.full((1, 1, 3, 2), risk) + noise + 0.001 * np.array([0, 1])}
    return fabricate(folder, arms)


def by_length(trained: object, longer: object) -> np.ndarray:
    """(step, length, network, task) of one look and one task."""
    return np.stack([np.asarray(trained, float), np.asarray(longer, float)])[None, :, :, None]


class TestStudy(StudyTests):
    study = STUDY
    world = staticmethod(world)
    num_figures = 8


def test_one_network_may_stall_and_no_more() -> None:
    assert all_but_one([1.0, 9.0, 3.0]) == 3
    assert all_but_one([1.0, 9.0, 3.0], high_is_good=True) == 3
    assert all_but_one([7.0]) == 7


@pytest.mark.parametrize(
    ("settings", "told"), [({"dim": 0}, "at least 1"), ({"length": 30}, "training length 30 among them")]
)
def test_impossible_settings_are_told(settings: dict[str, int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Config(**settings)  # type: ignore[arg-type]
