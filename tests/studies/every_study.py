"""What every study is tested for, whatever it is about."""

from collections.abc import Callable
from pathlib import Path

import pytest
from fabricated import World, worlds_of

from dynascope.studies import Claim, Runs, Verdict, judge, run_study
from dynascope.studies.harness.report import report_study
from dynascope.studies.harness.study import Experiment


class StudyTests:
    """A test module makes a class of it, with its study, a world in which claims are true or false, and what it draws."""

    study: Experiment
    world: Callable[..., World]
    num_figures: int
    num_seeds = 3
    told_apart_elsewhere: tuple[str, ...] = ()
    """Claims that no one world can serve beside the others."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "claim" in metafunc.fixturenames:
            claims = [claim for claim in self.study.claims if claim.id not in self.told_apart_elsewhere]
            metafunc.parametrize("claim", claims, ids=[claim.id for claim in claims])

    @pytest.fixture(scope="class")
    @classmethod
    def worlds(cls, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, list[Runs]]:
        return worlds_of(cls.world, tmp_path_factory.mktemp("worlds"), cls.num_seeds)

    @pytest.fixture(scope="class")
    @classmethod
    def smoke(cls, tmp_path_factory: pytest.TempPathFactory) -> Verdict:
        return run_study(cls.study, preset="smoke", seeds=1, jobs=1, root=tmp_path_factory.mktemp("smoke"))

    def test_claim_holds_where_the_effect_is_and_fails_where_it_is_not(
        self, claim: Claim, worlds: dict[bool, list[Runs]]
    ) -> None:
        assert judge(claim, worlds[True]).holds is True
        assert judge(claim, worlds[False]).holds is False

    def test_smoke_preset_runs_every_arm_and_draws_every_figure(self, smoke: Verdict, tmp_path: Path) -> None:
        assert smoke.failures == {}
        pictures = list(report_study(smoke.run, tmp_path / "pictures").glob("*.png"))
        assert len(pictures) == self.num_figures
        # A chart that cannot be drawn is an empty picture.
        assert all(picture.stat().st_size > 5000 for picture in pictures)
