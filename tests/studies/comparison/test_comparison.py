"""Objectives against each other: the table, the page, resuming, and what is refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from dynascope.cli import run
from dynascope.losses import MARGIN_LOSSES
from dynascope.record import RecordWriter, open_record
from dynascope.rl.presets import PRESETS
from dynascope.studies.comparison import Comparison, compare, experiment
from dynascope.studies.comparison.measures import MEASURES, Estimate
from dynascope.studies.comparison.method import POLICIES, SETTINGS, pairs_of
from dynascope.studies.comparison.page import figures, print_comparison, write_comparison

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return compare(["grpo", "gspo"], preset="smoke", seeds=2, jobs=1, root=tmp_path_factory.mktemp("policies"))


@pytest.fixture
def character_model(tmp_path: Path) -> Path:
    """A folder with a tiny Llama and a tokenizer of characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    characters = [" ", "$", *"abcdefghijklmnopqrstuvwxyzAQ:?0123456789#"]
    tokenizer = Tokenizer(models.WordLevel({one: place for place, one in enumerate(characters)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    folder = tmp_path / "model"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=" ", eos_token="$").save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(characters), **sizes)).save_pretrained(folder)
    return folder


def fabricated(folder: Path, correct: list[float], chosen: float = 0.0) -> None:
    """A record that a run of this share of right answers would have left."""
    with RecordWriter(folder) as record:
        for step, value in enumerate(correct):
            record.add(step, {"test/correct": value, "test/pass_at_k": np.array([value, 1.0])})
            record.add(step, {"logps/chosen": chosen})


def made(folder: Path, ends: dict[str, list[float]]) -> Comparison:
    """A comparison in which each objective ends with these shares of right answers, one a seed."""
    runs = []
    for seed in range(len(next(iter(ends.values())))):
        for name, values in ends.items():
            fabricated(folder / name / f"seed-{seed}", [0.2, values[seed]])
        runs.append({name: open_record(folder / name / f"seed-{seed}") for name in ends})
    return Comparison("arithmetic", "small", tuple(ends), runs, folder, {}, 1.0)


def test_all_start_from_the_same_policy_and_see_the_same_first_rollout(policies: Comparison) -> None:
    for records in policies.runs:
        assert records["grpo"]["test/correct"].values[0] == records["gspo"]["test/correct"].values[0]
        assert records["grpo"]["rollout/reward"].values[0] == records["gspo"]["rollout/reward"].values[0]
        assert records["grpo"]["test/kl_start"].values[0] == pytest.approx(0.0, abs=1e-6)
        assert abs(records["grpo"]["test/kl_start"].values[-1]) > 0


def test_every_measure_has_a_number_or_none(policies: Comparison) -> None:
    told = json.loads(json.dumps(policies.as_json(), allow_nan=False))
    assert [one["name"] for one in told["objectives"]] == ["grpo", "gspo"]
    for one in told["objectives"]:
        assert set(one["measures"]) == set(MEASURES)
        assert [name for name, value in one["measures"].items() if value is None] == ["demonstrations"]
    assert told["objectives"][0]["lead"] is None
    assert told["objectives"][1]["lead"] is not None


def test_a_lead_is_paired_by_seeds(tmp_path: Path) -> None:
    """Seeds that differ widely hide a constant lead from intervals of each objective, not from that of the lead."""
    done = made(tmp_path, {"grpo": [0.1, 0.5, 0.9], "dapo": [0.15, 0.55, 0.95]})
    lead, alone = done.lead("dapo"), done.measure("dapo", "correct")
    assert lead is not None
    assert lead.ci95 == pytest.approx((0.05, 0.05))
    assert alone is not None
    assert alone.ci95 is not None
    assert alone.ci95[1] - alone.ci95[0] > 1


def test_no_lead_is_told_as_none(tmp_path: Path) -> None:
    done = made(tmp_path, {"grpo": [0.1, 0.5, 0.9], "dapo": [0.2, 0.5, 0.8]})
    lead = done.lead("dapo")
    assert lead is not None
    assert lead.ci95 is not None
    assert lead.ci95[0] < 0 < lead.ci95[1]


def test_one_seed_has_no_interval() -> None:
    one = Estimate.of([0.5])
    assert one is not None
    assert one.ci95 is None
    assert Estimate.of([float("nan")]) is None


def test_another_objective_is_added_at_its_own_cost(policies: Comparison) -> None:
    kept = policies.folder / "grpo" / "seed-0" / "rank-00000.sqlite"
    before = kept.stat().st_mtime_ns
    more = compare(["grpo", "rloo"], preset="smoke", seeds=2, jobs=1, root=policies.folder.parents[1])
    assert more.folder == policies.folder
    assert kept.stat().st_mtime_ns == before
    assert more.measure("rloo", "correct") is not None


def test_losses_of_pairs_are_compared_too(tmp_path: Path) -> None:
    done = compare(["dpo", "simpo"], "arithmetic-pairs", preset="smoke", seeds=1, jobs=1, root=tmp_path)
    assert not done.failures
    record = done.runs[0]["dpo"]
    assert record["loss"].values[0] == pytest.approx(np.log(2))
    assert record["logps/chosen"].values[-1] != record["logps/chosen"].values[0]
    assert {section.title for section in figures(done)} == {"Learning", "Health", "Pairs"}
    assert done.measure("dpo", "clipped") is None


def test_pairs_come_of_problems_with_both_kinds_of_answers() -> None:
    right = torch.tensor([[False, True, True], [True, True, True], [False, False, False], [True, False, True]])
    chosen, rejected = pairs_of(right)
    assert chosen.tolist() == [1, 9]
    assert rejected.tolist() == [0, 10]


def test_the_page_stands_alone_and_escapes(policies: Comparison, tmp_path: Path) -> None:
    page = write_comparison(policies, tmp_path / "page.html").read_text()
    assert "paired by seeds" in page
    assert "pass@k" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert len(list(write_comparison(policies, tmp_path / "pictures").glob("*.png"))) >= 10


def test_the_terminal_tells_means_with_intervals(policies: Comparison) -> None:
    console = Console(record=True, width=200)
    print_comparison(policies, console)
    told = console.export_text()
    assert "gspo" in told
    assert "±" in told


def test_the_command_prints_json_and_writes_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fast = [part for one in ("num_steps=1", "base_steps=2", "test_problems=2") for part in ("--set", one)]
    command = ["compare", "grpo,dapo", "--preset", "smoke", "--seeds", "1", "--jobs", "1", "--json", *fast]
    assert run(command) == 0
    told = json.loads(capsys.readouterr().out)
    assert Path(told["page"]).is_file()
    assert run(["report", told["run"], "-o", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").is_file()


@pytest.mark.parametrize(
    ("objectives", "task", "message"),
    [
        (["grp"], "arithmetic", "did you mean 'grpo'"),
        (["dpo"], "arithmetic", "no objective 'dpo'"),
        (["grpo", "grpo"], "arithmetic", "twice"),
        (["grpo"], "chess", "there are arithmetic, arithmetic-pairs, gsm8k"),
    ],
)
def test_what_is_not_there_is_told_in_one_line(objectives: list[str], task: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        experiment(objectives, task)


def test_sizes_and_folders_are_checked_before_anything_is_trained(tmp_path: Path) -> None:
    for settings, message in (
        ({"num_prompts": 0}, "num_prompts, .* must be at least 1"), ({"test_every": 0}, "every must be at least 1"),
        ({"num_pairs": 0}, "num_pairs"), ({"data": "nowhere"}, "there is no folder nowhere, which data names"),
        ({"model": str(tmp_path / "none")}, "which model names"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(SETTINGS["smoke"], **settings)


def test_demonstrations_are_counted_where_an_objective_learns_from_them(tmp_path: Path) -> None:
    done = compare(
        ["grpo", "relift_rl", "relift", "luffy"], preset="smoke", seeds=1, jobs=1, root=tmp_path,
        overrides={"base_steps": 1, "num_steps": 4, "test_problems": 2},
    )  # fmt: skip
    assert not done.failures
    records = done.runs[0]
    # A batch is eight; of eight questions that a start knows nothing of, all enter, those drawn twice once.
    steps, used = (records["relift"][f"demonstrations/{name}"].values for name in ("step", "used"))
    assert steps[0] == 1
    assert used.tolist() == (8 * steps.cumsum()).tolist()
    assert records["luffy"]["demonstrations/used"].values.tolist() == [8, 16, 24, 32]
    assert records["luffy"]["rollout/demonstrations"].values.tolist() == [0.125] * 4
    assert records["relift"]["rollout/reward"].values[0] == records["relift_rl"]["rollout/reward"].values[0]
    told = [done.measure(name, "demonstrations") for name in done.objectives]
    assert [one and one.mean for one in told] == [None, None, used[-1], 32]


def test_every_objective_can_be_compared() -> None:
    assert set(experiment(list(POLICIES), "arithmetic").arms) == {*PRESETS, "relift"}
    assert set(experiment(list(MARGIN_LOSSES), "arithmetic-pairs").arms) == set(MARGIN_LOSSES)


def test_word_problems_with_a_model_from_a_folder(tmp_path: Path, character_model: Path) -> None:
    problems = [{"question": f"{one} and {one}?", "answer": f"so #### {2 * one}"} for one in range(1, 9)]
    for split, rows in (("train", problems[:4]), ("test", problems[4:])):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    folders = {"data": str(tmp_path), "model": str(character_model)}
    few = {"num_steps": 1, "test_problems": 2, "max_new_tokens": 4}
    done = compare(
        ["grpo", "relift", "luffy"],
        "gsm8k",
        preset="smoke",
        seeds=1,
        jobs=1,
        overrides={**folders, **few},
        root=tmp_path / "runs",
    )
    assert not done.failures
    assert done.measure("grpo", "correct") is not None
    assert done.measure("grpo", "chain") is None
    with pytest.raises(ValueError, match="--data DIR --model DIR"):
        compare(["grpo"], "gsm8k", preset="smoke", root=tmp_path)


def test_every_preset_takes_real_steps(tmp_path: Path) -> None:
    overrides = {"num_steps": 2, "base_steps": 5, "teacher_steps": 6, "test_problems": 2}
    done = compare(list(POLICIES), preset="smoke", seeds=1, jobs=1, overrides=overrides, root=tmp_path)
    assert not done.failures
    losses = compare(
        list(MARGIN_LOSSES), "arithmetic-pairs", preset="smoke", seeds=1, jobs=1, overrides=overrides, root=tmp_path
    )
    assert not losses.failures
