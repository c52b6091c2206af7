"""Finding, setting and telling studies."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from dynascope.studies import load_study, parse_overrides, print_verdict, run_study

TOY = Path(__file__).with_name("toy.py")


def test_settings_take_their_own_types() -> None:
    texts = ["num_steps=7", "gains=1e-3,2", "is_slow=True", "note=a b"]
    expected = {"num_steps": 7, "gains": (0.001, 2.0), "is_slow": True, "note": "a b"}
    assert parse_overrides(load_study(str(TOY)), "small", texts) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_step=3", "no setting 'num_step'; did you mean 'num_steps'"),
        ("num_steps", "KEY=VALUE"),
        ("num_steps=many", "'many' is no int"),
        ("is_slow=perhaps", "'perhaps' is no bool"),
        ("gains=a,b", r"'a,b' is no tuple\[float, ...\]"),
    ],
)
def test_wrong_settings_are_told_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_overrides(load_study(str(TOY)), "small", [text])


def test_unknown_studies_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'data-diet'"):
        load_study("datadiet")
    with pytest.raises(ValueError, match="no study file"):
        load_study(str(tmp_path / "mine.py"))
    empty = tmp_path / "empty.py"
    empty.write_text("")
    with pytest.raises(ValueError, match="holds no Study"):
        load_study(str(empty))


def test_verdict_is_told_with_figures_and_failures(tmp_path: Path) -> None:
    verdict = run_study(load_study(str(TOY)), preset="smoke", seeds=2, jobs=1, root=tmp_path)
    console = Console(file=io.StringIO(), width=100)
    print_verdict(verdict, console)
    told = console.file.getvalue()
    assert "C1  holds  Second is higher." in told
    assert "the paper: 1.0" in told
    assert "unlucky seed 1 failed: RuntimeError: out of luck" in told


def test_a_setting_that_its_study_refuses_is_told() -> None:
    study = load_study("exact-permutations")
    assert parse_overrides(study, "small", ["num_networks=3"]) == {"num_networks": 3}
    with pytest.raises(ValueError, match=r"--set delta_all=2: delta_all=2.0 must lie between 0 and 1"):
        parse_overrides(study, "small", ["delta_all=2"])
    with pytest.raises(ValueError, match=r"--set width=-1: .*width=-1.* must be at least 1") as told:
        parse_overrides(load_study("hapo"), "smoke", ["width=-1"])
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", ["hapo", "riskpo", "kdrl", "token-hidden-reward", "relift", "simplerl-zoo"])
def test_no_prompt_is_told_before_anything_is_trained(name: str) -> None:
    with pytest.raises(ValueError, match=r"--set num_prompts=0: .*num_prompts.* must be at least 1"):
        parse_overrides(load_study(name), "smoke", ["num_prompts=0"])


def test_settings_that_go_together_are_checked_together() -> None:
    """Width 48 alone does not fit 5 heads, nor 5 heads the preset's width; 45 and 5 do."""
    study = load_study("cot-pass-at-k")
    with pytest.raises(ValueError, match="width a multiple of twice num_heads"):
        parse_overrides(study, "smoke", ["num_heads=5"])
    assert parse_overrides(study, "smoke", ["num_heads=5", "width=50"]) == {"num_heads": 5, "width": 50}
