"""Presets equal TRL's own losses on the same batch, and TRL's trainer runs any objective."""

import copy
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dynascope.rl.advantages import WhitenedReturns
from dynascope.rl.batch import PolicyBatch
from dynascope.rl.distillation import TeacherReward, wrong_answers
from dynascope.rl.entropy.parts import AdaptiveTemperature, SamplingCorrection
from dynascope.rl.kl import KLTerm
from dynascope.rl.presets import dapo, dr_grpo, grpo, gspo, kdrl_masking_response, reinforce_pp
from dynascope.rl.rollout import Rollout, score

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")


def settings(folder: Path, **changes: Any) -> Any:
    basics: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 2,
        "use_cpu": True,
        "report_to": [],
        "bf16": False,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return trl.GRPOConfig(**{**basics, **changes})


def trainer(kind: Any, llama: Any, tokenizer: Any, args: Any, **more: Any) -> Any:
    def reward(completions: list[str], **columns: Any) -> list[float]:
        return [float(len(set(text)) % 3) for text in completions]

    if args.beta:  # TRL loads the start model again by its name
        llama.save_pretrained(args.output_dir)
        llama.config._name_or_path = args.output_dir
    prompts = datasets.Dataset.from_dict(
        {"prompt": [f"{first}+{second}=" for first in range(4) for second in range(4)]}
    )
    return kind(llama, reward_funcs=reward, args=args, train_dataset=prompts, processing_class=tokenizer, **more)


@pytest.mark.parametrize(
    ("objective", "changes"),
    [
        (grpo, {"loss_type": "grpo"}),
        (
            grpo.having(kl=(KLTerm("ref", "k3", 0.04),)),
            {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False},
        ),
        (
            grpo.having(kl=(KLTerm("ref", "k3", 0.04, is_ratio_weighted=True),)),
            {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": True},
        ),
        (dr_grpo, {"loss_type": "dr_grpo", "scale_rewards": "none"}),
        (dapo, {"loss_type": "dapo", "epsilon_high": 0.28}),
        (
            gspo,
            {
                "loss_type": "grpo",
                "importance_sampling_level": "sequence",
                "epsilon": 3e-4,
                "epsilon_high": 4e-4,
            },
        ),
    ],
    ids=["grpo", "grpo with KL", "grpo with corrected KL", "dr_grpo", "dapo", "gspo"],
)
def test_a_preset_is_trls_loss(
    objective: Any, changes: dict[str, Any], tiny_llama: Any, character_tokenizer: Any, tmp_path: Path
) -> None:
    theirs = trainer(trl.GRPOTrainer, tiny_llama, character_tokenizer, settings(tmp_path, **changes))
    theirs.current_gradient_accumulation_steps = 1
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([6, 2, 1, 5, 3, 6, 4, 2])
    mask = torch.arange(6) < lengths[:, None]
    completions = torch.randint(1, 15, (8, 6), generator=generator)
    prompts = torch.randint(1, 15, (8, 4), generator=generator)
    rewards = torch.rand(8, generator=generator)
    batch = PolicyBatch(mask=mask, rewards=rewards, group_ids=torch.arange(8) // 4, max_length=6)
    ids, seen = torch.cat([prompts, completions], 1), torch.cat([torch.ones_like(prompts), mask.long()], 1)

    def log_probs() -> Tensor:
        return theirs._get_per_token_logps_and_entropies(tiny_llama, ids, seen, 6)[0]

    with torch.no_grad():
        now = log_probs()
        behaviour = now + 0.3 * torch.randn(8, 6, generator=generator)
        reference = now + 0.3 * torch.randn(8, 6, generator=generator)
    advantage = objective.advantages(batch)
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completions,
        "completion_mask": mask.long(),
        "advantages": advantage,
        "old_per_token_logps": behaviour,
        "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
    }
    tiny_llama.train()
    theirs.args.steps_per_generation = 1
    expected = theirs._compute_loss(tiny_llama, inputs)
    expected_gradient = torch.autograd.grad(expected, list(tiny_llama.parameters()))
    batch = batch.having(advantage=advantage, behaviour_log_probs=behaviour, ref_log_probs=reference)
    found, metrics = objective.loss(batch.having(log_probs=log_probs()))
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)
    for ours, one in zip(torch.autograd.grad(found, list(tiny_llama.parameters())), expected_gradient, strict=True):
        torch.testing.assert_close(ours, one, atol=1e-6, rtol=1e-5)
    if objective.ratio == "token":  # of a sequence ratio TRL tells the share of completions, we that of tokens
        for name in ("low", "high"):
            assert float(metrics[f"clip/{name}"]) == pytest.approx(
                theirs._metrics["train"][f"clip_ratio/{name}_mean"][0]
            )
    if objective.kl and not objective.kl[0].is_ratio_weighted:
        assert float(metrics["kl/ref"]) == pytest.approx(theirs._metrics["train"]["kl"][0], abs=1e-6)


@pytest.mark.parametrize(
    ("objective", "changes"),
    [
        ("dapo", {"num_iterations": 2}),
        ("riskpo", {}),
        ("hapo", {"num_iterations": 2}),
        (reinforce_pp, {"beta": 1e-3}),
        ("stable_reinforce", {"beta": 1e-3, "num_iterations": 2}),
        ("thr", {}),
        ("thr_gspo", {"num_iterations": 2}),
        ("archer", {"beta": 1e-3, "num_iterations": 2}),
        ("edge_grpo", {}),
        ("kl_cov", {}),
        (grpo.having(kl=(KLTerm("ref", "k2", 0.1),), entropy_bonus=1e-3), {"beta": 1e-3, "num_iterations": 2}),
    ],
    ids=[
        "dapo",
        "riskpo",
        "hapo",
        "reinforce_pp",
        "stable_reinforce",
        "thr",
        "thr_gspo",
        "archer",
        "edge_grpo",
        "kl_cov",
        "grpo with k2",
    ],
)
def test_trls_trainer_runs_it(
    objective: Any, changes: dict[str, Any], tiny_llama: Any, character_tokenizer: Any, tmp_path: Path
) -> None:
    from dynascope.rl.adapters.trl import PolicyObjectiveTrainer

    before = [parameter.detach().clone() for parameter in tiny_llama.parameters()]
    ours = trainer(
        PolicyObjectiveTrainer, tiny_llama, character_tokenizer, settings(tmp_path, **changes), objective=objective
    )
    ours.train()
    told = [log for log in ours.state.log_history if "policy/policy_loss" in log]
    assert len(told) == 2
    assert all(torch.isfinite(torch.tensor(log["policy/entropy"])) for log in told)
    moved = [float((new - old).abs().max()) for new, old in zip(tiny_llama.parameters(), before, strict=True)]
    assert max(moved) > 1e-5


def test_a_reward_that_raises_or_hangs_ends_trls_training_in_one_line(
    tiny_llama: Any, character_tokenizer: Any, tmp_path: Path
) -> None:
    from dynascope.rl.adapters.trl import PolicyObjectiveTrainer

    def broken(completions: list[str], **columns: Any) -> list[float]:
        return [1 / 0]

    def hanging(completions: list[str], **columns: Any) -> list[float]:
        time.sleep(30)
        return []

    prompts = datasets.Dataset.from_dict({"prompt": ["1+1=", "1+2="]})
    for reward, message in (
        (broken, "reward 'broken' raised ZeroDivisionError"),
        (hanging, "'hanging' took more than 0.1 s"),
    ):
        ours = PolicyObjectiveTrainer(
            tiny_llama, reward_funcs=reward, args=settings(tmp_path), train_dataset=prompts, objective="grpo",
            processing_class=character_tokenizer, reward_time_limit=0.1,
        )  # fmt: skip
        assert ours.reward_func_names == [reward.__name__]
        with pytest.raises(ValueError, match=message):
            ours.train()


def test_trls_generation_takes_a_logits_processor(tiny_llama: Any, character_tokenizer: Any, tmp_path: Path) -> None:
    """HAPO's temperature sees every rollout of training and none of evaluation, and leaves the model as it was."""
    from dynascope.rl.adapters.trl import PolicyObjectiveTrainer

    temperature = AdaptiveTemperature(ends={character_tokenizer.eos_token_id})
    args = settings(tmp_path, steps_per_generation=1)
    ours = trainer(PolicyObjectiveTrainer, tiny_llama, character_tokenizer, args, objective="hapo", process=temperature)
    ours.train()
    assert temperature.stats is not None  # of the first of two rollouts
    before = temperature.stats
    assert "generate" not in vars(tiny_llama)
    tiny_llama.eval()
    ours._generate_single_turn([[1, 2], [3]], None, {}, 1)
    assert temperature.stats is before

    def only_ends(tokens: Tensor, scores: Tensor) -> Tensor:
        barred = torch.full_like(scores, -torch.inf)
        barred[:, character_tokenizer.eos_token_id] = 0.0
        return barred

    ours.process = only_ends
    tiny_llama.train()
    completions, _ = ours._generate_single_turn([[1, 2], [3]], None, {}, 1)
    assert completions == [[character_tokenizer.eos_token_id]] * 2
    args.use_transformers_continuous_batching = True
    with pytest.raises(ValueError, match="leave vLLM and continuous batching off"):
        trainer(PolicyObjectiveTrainer, tiny_llama, character_tokenizer, args, objective="hapo", process=only_ends)


def test_trls_trainer_asks_a_teacher(tiny_llama: Any, character_tokenizer: Any, tmp_path: Path) -> None:
    from dynascope.rl.adapters.trl import PolicyObjectiveTrainer

    teacher = copy.deepcopy(tiny_llama)
    torch.nn.init.normal_(teacher.lm_head.weight, std=0.2)
    ours = trainer(
        PolicyObjectiveTrainer, tiny_llama, character_tokenizer, settings(tmp_path),
        objective=kdrl_masking_response.having(advantage=TeacherReward()), teacher=teacher,
    )  # fmt: skip
    ours.train()
    told = [log for log in ours.state.log_history if "policy/kl/teacher" in log]
    assert len(told) == 2
    assert all(log["policy/kl/teacher"] > 0 for log in told)
    teacher.resize_token_embeddings(24)
    with pytest.raises(ValueError, match="must share"):
        trainer(
            PolicyObjectiveTrainer,
            tiny_llama,
            character_tokenizer,
            settings(tmp_path),
            objective="kdrl",
            teacher=teacher,
        )


def test_trls_trainer_asks_for_what_is_kept_and_finds_a_teacher_out_that_is_the_policy(
    tiny_llama: Any, character_tokenizer: Any, tmp_path: Path
) -> None:
    from dynascope.rl.adapters.trl import PolicyObjectiveTrainer

    asked: list[Tensor] = []

    class Server:
        size = len(tiny_llama.lm_head.weight)

        def __call__(self, rollout: Rollout, rows: Tensor | None = None) -> Tensor:
            assert rows is not None
            asked.append(rows)
            return torch.full(rollout.tokens.shape, -1.0)

    one = {"max_steps": 1}
    ours = trainer(
        PolicyObjectiveTrainer, tiny_llama, character_tokenizer, settings(tmp_path, **one),
        objective=kdrl_masking_response, teacher=Server(),
    )  # fmt: skip
    ours.train()
    assert torch.equal(asked[0], ours._rewards <= 0)
    assert 0 < int(asked[0].sum()) < len(asked[0])
    same = trainer(
        PolicyObjectiveTrainer, tiny_llama, character_tokenizer, settings(tmp_path, **one),
        objective="kdrl", teacher=copy.deepcopy(tiny_llama),
    )  # fmt: skip
    with pytest.raises(ValueError, match="distillation does nothing"):
        same.train()


def test_grpo_in_our_trainer_takes_trls_own_steps(tiny_llama: Any, character_tokenizer: Any, tmp_path: Path) -> None:
    from dynascope.rl.adapters.trl import PolicyObjectiveTrainer

    other = copy.deepcopy(tiny_llama)
    args = {"loss_type": "grpo", "gradient_accumulation_steps": 2, "num_iterations": 2, "max_steps": 4, "seed": 3}
    trainer(trl.GRPOTrainer, tiny_llama, character_tokenizer, settings(tmp_path / "theirs", **args)).train()
    trainer(
        PolicyObjectiveTrainer, other, character_tokenizer, settings(tmp_path / "ours", **args), objective=grpo
    ).train()
    for ours, theirs in zip(other.parameters(), tiny_llama.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_what_trl_cannot_give_is_told(tiny_llama: Any, character_tokenizer: Any, tmp_path: Path) -> None:
    from dynascope.rl.adapters.trl import PolicyObjectiveTrainer

    def make(objective: Any) -> None:
        trainer(PolicyObjectiveTrainer, tiny_llama, character_tokenizer, settings(tmp_path), objective=objective)

    with pytest.raises(ValueError, match="give teacher="):
        make(grpo.having(kl=(KLTerm("teacher", "k2"),)))
    with pytest.raises(ValueError, match="set beta"):
        make(reinforce_pp.having(advantage=WhitenedReturns(1e-3)))
    with pytest.raises(ValueError, match=r"use rl\.interleaving\.trl\.MixedPolicyTrainer"):
        make("luffy")
    with pytest.raises(ValueError, match="TRL does not give values"):
        make("ppo")


def test_completions_that_no_reward_says_anything_of_teach_nothing(
    tiny_llama: Any, character_tokenizer: Any, tmp_path: Path
) -> None:
    """Beside 1 and 0 an unknown one is no third value of the group: advantages ±0.7071 / (0.7071 + 1e-4), and 0."""
    from dynascope.rl.adapters.trl import PolicyObjectiveTrainer

    told: list[float | None] = [1.0, None, None, 0.0, None, 1.0, 1.0, None]
    ours = trainer(
        PolicyObjectiveTrainer, tiny_llama, character_tokenizer, settings(tmp_path, max_steps=1), objective="grpo"
    )
    ours.reward_funcs = [lambda completions, **columns: told]
    inputs = [{"prompt": "1+2="}] * 4 + [{"prompt": "2+2="}] * 4
    output = ours._generate_and_score_completions(inputs)
    half = 0.5 / (0.5**0.5 + 1e-4)
    torch.testing.assert_close(output["advantages"], torch.tensor([half, 0, 0, -half, 0, 0, 0, 0]))
    told = [1.0, None, None, None, None, 0.0, None, None]  # of each prompt one: nothing to compare it with
    assert not ours._generate_and_score_completions(inputs)["advantages"].any()
    ours.reward_funcs = [lambda completions, **columns: [None] * len(completions)]
    with pytest.raises(ValueError, match="no completion has a reward: reward said None or NaN"):
        ours._generate_and_score_completions(inputs)


def test_a_term_goes_by_correctness_and_not_by_a_shaped_sum(
    tiny_llama: Any, character_tokenizer: Any, tmp_path: Path
) -> None:
    """Half of the completions are right; all sums are above 0. Micro-batches divide by what the whole step keeps."""
    from dynascope.rl.adapters.trl import PolicyObjectiveTrainer

    def right(completions: list[str], **columns: Any) -> list[float | None]:
        return [1.0, 0.0, None, 0.0] * (len(completions) // 4)

    def shape(completions: list[str], **columns: Any) -> list[float]:
        return [0.5] * len(completions)

    term = replace(kdrl_masking_response.kl[0], norm="kept")
    asked: list[Tensor] = []

    class Server:
        size = len(tiny_llama.lm_head.weight)

        def __call__(self, rollout: Rollout, rows: Tensor | None = None) -> Tensor:
            assert rows is not None
            asked.append(rows)
            return torch.full(rollout.tokens.shape, -1.0)

    prompts = datasets.Dataset.from_dict({"prompt": [f"{one}+{one}=" for one in range(4)]})

    def made(**more: Any) -> Any:
        return PolicyObjectiveTrainer(
            tiny_llama, reward_funcs=[right, shape], args=settings(tmp_path, steps_per_generation=1), train_dataset=prompts,
            processing_class=character_tokenizer, objective=kdrl_masking_response.having(kl=(term,)), teacher=Server(),
            **more,
        )  # fmt: skip

    ours = made(correctness="right")
    tiny_llama.train()
    output = ours._generate_and_score_completions([{"prompt": "1+2="}] * 4 + [{"prompt": "2+2="}] * 4)
    assert output["correct"].tolist() == [True, False, False, False] * 2
    assert asked[0].tolist() == [False, True, True, True] * 2
    kept = output["completion_mask"].bool()[~output["correct"]].sum()
    assert output["num_kept/0"] == kept
    ours.current_gradient_accumulation_steps = 1
    whole = ours._compute_loss(tiny_llama, output)
    ours.args.steps_per_generation, ours.current_gradient_accumulation_steps = 2, 2
    halves = [
        {key: one[rows] if one.ndim else one for key, one in output.items()} for rows in (slice(0, 4), slice(4, 8))
    ]
    torch.testing.assert_close(sum(ours._compute_loss(tiny_llama, half) for half in halves), whole)
    made()._generate_and_score_completions([{"prompt": "1+2="}] * 4)
    assert not asked[-1].any()  # every sum is above 0
    with pytest.raises(ValueError, match="no reward function 'wrong'; there are right, shape"):
        made(correctness="wrong")
    late = KLTerm("teacher", "k2", 1.0, keep=wrong_answers, norm="kept", also_needs=frozenset({"entropy"}))
    with pytest.raises(ValueError, match="counts the kept tokens of a rollout before its losses, which know entropy"):
        trainer(
            PolicyObjectiveTrainer, tiny_llama, character_tokenizer, settings(tmp_path), teacher=Server(),
            objective=kdrl_masking_response.having(kl=(late,)),
        )  # fmt: skip


@pytest.mark.parametrize(("objective", "num"), [("riskpo", 4), ("grpo", 1), ("dapo", 2)])
def test_an_evaluation_changes_nothing_of_the_objective(
    tiny_llama: Any, character_tokenizer: Any, tmp_path: Path, objective: str, num: int
) -> None:
    from dynascope.rl.adapters.trl import PolicyObjectiveTrainer

    prompts = datasets.Dataset.from_dict({"prompt": [f"{one}+{one}=" for one in range(4)]})
    args = settings(tmp_path, max_steps=1, num_generations_eval=num, per_device_eval_batch_size=4)
    ours = trainer(
        PolicyObjectiveTrainer, tiny_llama, character_tokenizer, args, objective=objective, eval_dataset=prompts
    )
    ours.train()
    before = copy.deepcopy(ours.objective.state_dict())
    told = ours.evaluate()
    assert math.isfinite(told["eval_loss"])
    assert math.isfinite(told["eval_policy/policy_loss"])
    torch.testing.assert_close(ours.objective.state_dict(), before)
    assert bool(before) is (objective == "riskpo")


def test_further_passes_take_no_more_completions_at_once_than_a_step(
    tiny_llama: Any, character_tokenizer: Any, tmp_path: Path
) -> None:
    from dynascope.rl.adapters.trl import PolicyObjectiveTrainer

    args = settings(tmp_path, per_device_train_batch_size=4, steps_per_generation=4)
    widths: list[int] = []
    tiny_llama.register_forward_pre_hook(
        lambda _, args, given: widths.append(len(args[0] if args else given["input_ids"])), with_kwargs=True
    )
    ours = trainer(PolicyObjectiveTrainer, tiny_llama, character_tokenizer, args, objective="thr")
    output = ours._generate_and_score_completions([{"prompt": "1+2="}] * 16)
    widths.clear()
    hidden, _ = ours._hidden(output)
    assert widths == [4] * 4
    whole = score(tiny_llama, ours._rollout(output), {"hidden"})["hidden"]
    torch.testing.assert_close(hidden, whole, atol=1e-5, rtol=1e-4)
    ours._log_probs_and_entropy(output)
    assert max(widths[5:]) == 4


@pytest.mark.parametrize("shares", [False, True])
def test_a_rollout_that_was_cut_off_altogether_changes_nothing(
    tiny_llama: Any, character_tokenizer: Any, tmp_path: Path, shares: bool
) -> None:
    """With `mask_truncated_completions` no token is left of it."""
    from dynascope.rl.adapters.shared_prefix import SharedPromptsMixin
    from dynascope.rl.adapters.trl import PolicyObjectiveTrainer

    class Sharing(SharedPromptsMixin, PolicyObjectiveTrainer):
        pass

    def goes_on(tokens: Tensor, scores: Tensor) -> Tensor:
        barred = scores.clone()
        barred[:, [character_tokenizer.eos_token_id, character_tokenizer.pad_token_id]] = -torch.inf
        return barred

    before = copy.deepcopy(tiny_llama)
    args = settings(tmp_path, mask_truncated_completions=True, weight_decay=0.0)
    trainer(
        Sharing if shares else PolicyObjectiveTrainer,
        tiny_llama,
        character_tokenizer,
        args,
        objective="dapo",
        process=goes_on,
    ).train()
    for one, other in zip(tiny_llama.parameters(), before.parameters(), strict=True):
        assert torch.equal(one, other)


def test_trls_loss_takes_what_else_a_batch_has(tiny_llama: Any, character_tokenizer: Any, tmp_path: Path) -> None:
    """Weights against vLLM's drift, images, truncation by TRL's rule; and a loss that is not finite ends training."""
    from dynascope.rl.adapters.trl import PolicyObjectiveTrainer

    ours = trainer(
        PolicyObjectiveTrainer, tiny_llama, character_tokenizer, settings(tmp_path),
        objective=dapo.having(learns_from_truncated=False),
    )  # fmt: skip
    ours.current_gradient_accumulation_steps, ours.args.steps_per_generation = 1, 1
    seen: list[dict[str, Any]] = []
    log_probs = torch.full((8, 6), -1.0)

    def told(model: Any, *args: Any, **more: Any) -> tuple[Tensor, Tensor, None]:
        seen.append(more)
        return log_probs.requires_grad_(), torch.ones(8, 6), None

    ours._get_per_token_logps_and_entropies = told
    stop = character_tokenizer.eos_token_id
    inputs = {
        "prompt_ids": torch.ones(8, 2).long(), "prompt_mask": torch.ones(8, 2).long(),
        "completion_ids": torch.tensor([[1, 2, 3, 4, 5, stop], [1, 2, 3, 4, 5, 6]]).repeat(4, 1),
        "completion_mask": torch.ones(8, 6).long(), "advantages": torch.ones(8), "rewards": torch.ones(8),
        "group_ids": torch.arange(8) // 4, "is_solved": torch.ones(8).bool(), "correct": torch.ones(8).bool(),
        "num_items_in_batch": torch.tensor(48),
    }  # fmt: skip
    tiny_llama.train()
    plain = ours._compute_loss(tiny_llama, inputs)
    assert float(plain.detach()) == pytest.approx(-0.5)  # half of the completions were cut off
    weighed = ours._compute_loss(
        tiny_llama, {**inputs, "importance_sampling_ratio": torch.full((8, 1), 0.5), "pixel_values": torch.ones(8)}
    )
    assert float(weighed.detach()) == pytest.approx(-0.25)
    assert "pixel_values" not in seen[0]
    assert "pixel_values" in seen[1]
    log_probs = torch.full((8, 6), torch.nan)
    with pytest.raises(ValueError, match="step 0: the loss is not finite"):
        ours._compute_loss(tiny_llama, inputs)


@pytest.mark.parametrize(
    "changes", [{}, {"beta": 0.04}, {"entropy_coef": 0.1}, {"objective": grpo.having(entropy_bonus=0.1)}]
)
def test_trl_trains_the_same_with_shared_prompts(
    tiny_llama: Any, character_tokenizer: Any, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """A start model, and a bonus of entropy by TRL or by the objective, are in the loss here and there."""
    from dynascope.rl.adapters.shared_prefix import SharedPromptsMixin
    from dynascope.rl.adapters.trl import PolicyObjectiveTrainer

    calls = []
    args = dict(changes)
    more = {"objective": args.pop("objective")} if "objective" in args else {}
    plain: Any = PolicyObjectiveTrainer if more else trl.GRPOTrainer

    class Sharing(SharedPromptsMixin, plain):  # type: ignore[misc]
        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    ends = []
    for kind in (plain, Sharing):
        torch.manual_seed(0)
        model = copy.deepcopy(tiny_llama)
        one = trainer(kind, model, character_tokenizer, settings(tmp_path / kind.__name__, seed=1, **args), **more)
        one.train()
        ends.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert calls
    assert torch.allclose(*ends, atol=2e-5)


def test_the_distribution_that_was_drawn_from_is_weighed_out(
    tiny_llama: Any, character_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that tells log-probabilities of what it drew, as vLLM does to TRL, here lower by log 2: weights of 2."""
    from dynascope.rl.adapters.trl import PolicyObjectiveTrainer

    corrected = grpo.having(post=(SamplingCorrection(),))
    ours = trainer(
        PolicyObjectiveTrainer, tiny_llama, character_tokenizer, settings(tmp_path, num_iterations=2), objective="grpo"
    )
    prompts = [{"prompt": "1+2="}] * 4
    ids = [[1, 2, 3], [4, 5], [6], [7, 8, 9]]
    told: list[list[float]] = [[0.0] * len(row) for row in ids]
    monkeypatch.setattr(ours, "_generate_single_turn", lambda *args, **kwargs: (ids, told))
    plain = ours._generate_and_score_completions(prompts)
    mask = plain["completion_mask"].bool()
    told = [(row[keep] - math.log(2)).tolist() for row, keep in zip(plain["old_per_token_logps"], mask, strict=True)]
    ours.objective = corrected
    weighed = ours._generate_and_score_completions(prompts)
    torch.testing.assert_close(weighed["advantages"][mask], (2 * plain["advantages"][:, None] * mask)[mask])
    assert plain["advantages"].any()
    with pytest.raises(ValueError, match="leave SamplingCorrection out, or set both"):
        trainer(PolicyObjectiveTrainer, tiny_llama, character_tokenizer, settings(tmp_path), objective=corrected)


def test_whether_prompts_are_shared_is_not_decided_batch_by_batch(
    tiny_llama: Any, character_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old log-probabilities are of a whole rollout, new ones of a part of it, in which sharing may not pay."""
    from dynascope.rl import shared_prefix
    from dynascope.rl.adapters.shared_prefix import SharedPromptsMixin

    class Sharing(SharedPromptsMixin, trl.GRPOTrainer):
        pass

    packed: list[int] = []
    forward = shared_prefix.shared_prefix_forward

    def counted(model: Any, rows: Any, *args: Any, **kwargs: Any) -> Any:
        packed.append(1)
        return forward(model, rows, *args, **kwargs)

    monkeypatch.setattr(shared_prefix, "shared_prefix_forward", counted)
    ours = trainer(Sharing, tiny_llama, character_tokenizer, settings(tmp_path))
    prompts, completions = torch.arange(1, 5)[:, None].repeat(1, 2), torch.ones(4, 3).long()
    ids = torch.cat([prompts, completions], 1)
    with torch.no_grad():
        found, _, _ = ours._get_per_token_logps_and_entropies(tiny_llama, ids, torch.ones_like(ids), 3)
        expected = trl.GRPOTrainer._get_per_token_logps_and_entropies(ours, tiny_llama, ids, torch.ones_like(ids), 3)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert packed  # though no two completions have a prompt in common


def test_a_checkpoint_holds_the_state_of_slots(tiny_llama: Any, character_tokenizer: Any, tmp_path: Path) -> None:
    from dynascope.rl.adapters.trl import PolicyObjectiveTrainer

    def made(num_steps: int) -> Any:
        args = settings(tmp_path, save_strategy="steps", save_steps=2, max_steps=num_steps)
        return trainer(PolicyObjectiveTrainer, tiny_llama, character_tokenizer, args, objective="riskpo")

    first = made(2)
    first.train()
    again = made(3)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    seen = first.objective.advantage.num_rollouts
    assert seen >= 2
    assert again.objective.advantage.num_rollouts == seen + 1
