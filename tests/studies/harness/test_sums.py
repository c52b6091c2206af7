"""Settings that studies on sums share."""

import pytest

from dynascope.studies.harness.sums import SumsConfig


def test_start_model_loop_and_tests_are_made_of_the_settings() -> None:
    config = SumsConfig((1, 3), width=32, base_steps=7, num_passes=2, test_every=4)
    assert config.task.digits == (1, 3)
    assert (config.start.task, config.start.width, config.start.num_steps) == (config.task, 32, 7)
    assert (config.loop.num_steps, config.loop.num_passes, config.evaluation.every) == (60, 2, 4)


@pytest.mark.parametrize("settings", [{"width": 0}, {"num_steps": 0}, {"num_passes": 0}, {"test_samples": 0}])
def test_impossible_sizes_are_told(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        SumsConfig(**settings)  # type: ignore[arg-type]
