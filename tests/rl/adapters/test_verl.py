"""Objectives in verl's registries, in the signatures of verl 0.9; with verl itself where it can be imported."""

import importlib
import sys
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dynascope.rl.adapters.verl import actor_loss, register, verl_score
from dynascope.rl.batch import PolicyBatch
from dynascope.rl.exploration import PassAtKMixed
from dynascope.rl.kl import KLTerm
from dynascope.rl.presets import grpo, preset
from dynascope.rl.tasks.pairwise import JudgeReward

REWARDS = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 2.0, 0.0], [1.0, 0.0, 0.0]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0]])
INDEX = np.array(["b", "b", "a", "a"], dtype=object)


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The two dictionaries, filled by decorators as verl's are."""
    told = SimpleNamespace(advantages={}, losses={})

    def into(registry: dict[str, Any]) -> Callable[[str], Callable[[Any], Any]]:
        return lambda name: lambda function: registry.setdefault(name, function)

    core = ModuleType("verl.trainer.ppo.core_algos")
    core.register_adv_est, core.register_policy_loss = into(told.advantages), into(told.losses)  # type: ignore[attr-defined]
    for name in ("verl", "verl.trainer", "verl.trainer.ppo"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, core.__name__, core)
    return told


def test_advantages_are_of_groups_by_verls_index(registries: SimpleNamespace) -> None:
    register("grpo")
    advantages, returns = registries.advantages["grpo"](
        token_level_rewards=REWARDS, response_mask=MASK, config=None, index=INDEX
    )
    expected = grpo.advantages(
        PolicyBatch(mask=MASK.bool(), rewards=REWARDS.sum(1), group_ids=torch.tensor([1, 1, 0, 0]))
    )
    assert torch.equal(advantages, expected[:, None] * MASK)
    assert torch.equal(advantages, returns)


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "dr_grpo"])
def test_micro_batches_on_two_ranks_add_up_to_the_whole_loss(registries: SimpleNamespace, name: str) -> None:
    register(name, "mine")
    old = torch.randn(4, 3) - 2
    new = (old + 0.3 * torch.randn(4, 3)).requires_grad_()
    advantages = torch.randn(4)[:, None] * MASK
    loss = registries.losses["mine"]
    info = {"dp_size": 2, "batch_num_tokens": int(MASK.sum()), "global_batch_size": 4, "loss_scale_factor": 3}
    config = SimpleNamespace(global_batch_info=info)
    parts = [
        loss(
            old_log_prob=old[rows], log_prob=new[rows], advantages=advantages[rows], response_mask=MASK[rows],
            loss_agg_mode="token-mean", config=config, rollout_is_weights=None,
        )[0]
        for rows in (slice(0, 1), slice(1, 4))
    ]  # fmt: skip
    alone = SimpleNamespace(global_batch_info={"loss_scale_factor": 3})
    whole, metrics = loss(old_log_prob=old, log_prob=new, advantages=advantages, response_mask=MASK, config=alone)
    # verl takes the mean of gradients over its two ranks.
    assert float(sum(parts) / 2) == pytest.approx(float(whole), rel=1e-5)
    assert all(isinstance(value, float) for value in metrics.values())
    batch = PolicyBatch(
        mask=MASK.bool(), rewards=torch.zeros(4), group_ids=torch.arange(4), advantage=advantages, log_probs=new,
        behaviour_log_probs=old, max_length=3,
    )  # fmt: skip
    assert float(whole) == pytest.approx(float(preset(name).loss(batch)[0]), rel=1e-6)


@pytest.mark.filterwarnings("ignore:only .* bundles lie below")
@pytest.mark.parametrize("name", ["riskpo", "riskpo_seeking", "kl_cov", "pass_at_k_mixed"])
def test_estimators_and_pulls_of_verls_own_tensors(registries: SimpleNamespace, name: str) -> None:
    objective = preset(name) if name != "pass_at_k_mixed" else grpo.having(advantage=PassAtKMixed(2))
    register(objective, name)
    rewards, groups = REWARDS.sum(1), torch.tensor([1, 1, 0, 0])
    advantages, _ = registries.advantages[name](token_level_rewards=REWARDS, response_mask=MASK, index=INDEX)
    batch = PolicyBatch(mask=MASK.bool(), rewards=rewards, group_ids=groups, correct=rewards > 0, max_length=3)
    again = preset(name) if name != "pass_at_k_mixed" else objective
    assert torch.equal(advantages, again.advantages(batch)[:, None] * MASK)
    old = torch.randn(4, 3) - 2
    new = old + 0.3 * torch.randn(4, 3)
    loss, _ = registries.losses[name](old_log_prob=old, log_prob=new, advantages=advantages, response_mask=MASK)
    whole = batch.having(advantage=advantages, log_probs=new, behaviour_log_probs=old)
    assert float(loss) == pytest.approx(float(objective.loss(whole)[0]), rel=1e-6)


@pytest.mark.parametrize("name", ["reinforce_pp", "stable_reinforce"])
def test_kl_in_the_reward_is_verls_and_is_credited_token_by_token(registries: SimpleNamespace, name: str) -> None:
    registered = register(name)
    generator = torch.Generator().manual_seed(0)
    penalty = 0.1 * torch.randn(4, 3, generator=generator)
    advantages, _ = registries.advantages[name](token_level_rewards=REWARDS - penalty, response_mask=MASK)
    mask, rewards = MASK.bool(), (REWARDS - penalty) * MASK
    returns = rewards.flip(1).cumsum(1).flip(1)
    known = returns[mask].double()
    expected = ((returns - known.mean()) / known.std(correction=0)).float() * MASK
    torch.testing.assert_close(advantages, expected)
    assert registered.rollout_needs == frozenset()
    assert bool(registered.rollout_metrics) is (name == "stable_reinforce")


def test_right_is_what_scores_above_0_before_the_kl(registries: SimpleNamespace) -> None:
    seen: list[torch.Tensor] = []

    def estimator(batch: PolicyBatch) -> torch.Tensor:
        seen.append(batch.correct)
        return batch.rewards

    register(grpo.having(advantage=estimator), "mine")
    given = {"token_level_rewards": REWARDS - 2.0 * MASK, "response_mask": MASK}
    registries.advantages["mine"](**given)
    registries.advantages["mine"](**given, token_level_scores=REWARDS)
    assert [one.tolist() for one in seen] == [[False] * 4, [True, False, True, True]]


def test_weights_against_drift_are_applied(registries: SimpleNamespace) -> None:
    register("grpo")
    given: dict[str, Any] = {"old_log_prob": torch.zeros(4, 3), "log_prob": torch.zeros(4, 3), "response_mask": MASK}
    plain, _ = registries.losses["grpo"](advantages=torch.ones(4, 3), **given)
    half, _ = registries.losses["grpo"](
        advantages=torch.ones(4, 3), rollout_is_weights=torch.full((4, 3), 0.5), **given
    )
    assert float(half) == pytest.approx(float(plain) / 2)


@pytest.fixture
def engine(registries: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What verl's engines hand a loss, and a fake of the two things that a loss takes from verl.

    Prompts of 2 tokens and the completions of MASK lie behind each other without padding, as in verl 0.9: of a completion's
    token speaks the place before it.
    """

    def no_padding_2_padding(values: torch.Tensor, data: dict[str, Any]) -> torch.Tensor:
        lengths = data["response_mask"].to_padded_tensor(0).sum(1).tolist()
        flat = values.values() if values.is_nested else values
        ends = np.cumsum([2 + length for length in lengths])
        rows = [flat[end - length - 1 : end - 1] for end, length in zip(ends, lengths, strict=True)]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    metric, padding = ModuleType("verl.utils.metric"), ModuleType("verl.workers.utils.padding")
    metric.AggregationType = SimpleNamespace(MEAN="mean", SUM="sum")  # type: ignore[attr-defined]
    metric.Metric = lambda value, aggregation: (aggregation, float(value))  # type: ignore[attr-defined]
    padding.no_padding_2_padding = no_padding_2_padding  # type: ignore[attr-defined]
    for name in ("verl.utils", "verl.workers", "verl.workers.utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, metric.__name__, metric)
    monkeypatch.setitem(sys.modules, padding.__name__, padding)
    generator = torch.Generator().manual_seed(0)
    lengths = MASK.sum(1)

    def behind_each_other(padded: torch.Tensor) -> torch.Tensor:
        """The prompt's first place, then what is said of each token, then of what would follow the last."""
        rows = [row[:length] for row, length in zip(padded, lengths, strict=True)]
        return torch.cat([torch.nn.functional.pad(row, (1, 1)) for row in rows])

    def ragged(padded: torch.Tensor) -> torch.Tensor:
        rows = [row[:length] for row, length in zip(padded, lengths, strict=True)]
        return torch.nested.nested_tensor(rows, layout=torch.jagged)

    def normal() -> torch.Tensor:
        return torch.randn(4, 3, generator=generator)

    old = -normal().abs() - 1
    known = {
        "log_probs": (old + 0.3 * normal()).requires_grad_(), "behaviour_log_probs": old,
        "ref_log_probs": old + 0.3 * normal(), "teacher_log_probs": old + 0.3 * normal(), "entropy": normal().abs(),
        "advantage": normal() * MASK,
    }  # fmt: skip
    batch = PolicyBatch(
        mask=MASK.bool(),
        rewards=torch.zeros(4),
        group_ids=torch.arange(4),
        correct=REWARDS.sum(1) > 0,
        max_length=3,
        **known,
    )
    given = {
        "response_mask": ragged(MASK), "old_log_probs": ragged(old), "advantages": ragged(known["advantage"]),
        "ref_log_prob": ragged(known["ref_log_probs"]), "rm_scores": ragged(REWARDS),
        "teacher_logprobs": behind_each_other(known["teacher_log_probs"])[:, None],
        "dp_size": 1, "batch_num_tokens": int(MASK.sum()), "global_batch_size": 4,
    }  # fmt: skip
    told = {name: behind_each_other(known[name]) for name in ("log_probs", "entropy")}
    return SimpleNamespace(registries=registries, batch=batch, data=given, output=told)


@pytest.mark.parametrize(
    "name",
    [
        "hapo",
        "archer",
        "forking_tokens",
        "entropy_advantage",
        "relift_rl",
        "simplerl_zoo",
        "kdrl",
        "kdrl_masking_response",
    ],
)
def test_the_actors_whole_loss_sees_entropies_and_other_models(engine: SimpleNamespace, name: str) -> None:
    loss, metrics = actor_loss(name, max_length=3)(model_output=engine.output, data=engine.data, dp_group=None)
    expected, _ = preset(name).loss(engine.batch)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    log_probs = engine.batch.log_probs
    torch.testing.assert_close(*(torch.autograd.grad(one, log_probs)[0] for one in (loss, expected)))
    assert metrics["actor/pg_loss"] == ("sum", pytest.approx(float(loss.detach())))
    register(name, loss=False)
    assert name in engine.registries.advantages
    assert not engine.registries.losses
    with pytest.raises(ValueError, match="; actor_loss has it"):
        register(name, "whole")


def test_what_verls_settings_leave_out_is_told(engine: SimpleNamespace) -> None:
    for name, field, setting in (
        ("hapo", "entropy", "calculate_entropy"), ("simplerl_zoo", "ref_log_prob", "use_kl_loss"),
        ("kdrl", "teacher_logprobs", "distillation.enabled"),
    ):  # fmt: skip
        output, data = (
            {key: value for key, value in one.items() if key != field} for one in (engine.output, engine.data)
        )
        with pytest.raises(ValueError, match=setting):
            actor_loss(name)(model_output=output, data=data)
    with pytest.raises(ValueError, match=r"set actor\.loss_scale_factor"):
        actor_loss("dr_grpo")(model_output=engine.output, data=engine.data)
    with pytest.raises(ValueError, match="is_solved"):
        actor_loss("kdrl_masking_group")
    with pytest.raises(ValueError, match="a coefficient with a schedule"):
        actor_loss("kdrl_annealed")


@pytest.mark.usefixtures("registries")
def test_what_verl_does_not_give_is_told() -> None:
    with pytest.raises(ValueError, match="ref_log_probs"):
        register(grpo.having(kl=(KLTerm("ref", "k3", 0.1),)), "mine")
    with pytest.raises(ValueError, match="estimators do not see hidden"):
        register("thr")
    kept = KLTerm("behaviour", "k2", 0.1, keep=lambda batch: batch.mask, norm="kept")
    with pytest.raises(ValueError, match="do not know how many tokens the whole step keeps"):
        register(grpo.having(kl=(kept,)), "mine")
    with pytest.raises(ValueError, match="needs a name"):
        register(grpo)
    with pytest.raises(ValueError, match="group-token-mean"):
        register(grpo.having(aggregation="group-token-mean"), "mine")


def test_without_verl_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "verl.trainer.ppo.core_algos", None)
    with pytest.raises(ValueError, match="pip install verl"):
        register("grpo")


def test_verls_own_registries_and_its_own_grpo() -> None:
    core = pytest.importorskip("verl.trainer.ppo.core_algos")
    register("grpo", "dynascope-grpo")
    config = importlib.import_module("omegaconf").OmegaConf.create({"clip_ratio": 0.2})
    given = {"token_level_rewards": REWARDS, "response_mask": MASK, "config": config, "index": INDEX}
    mine, theirs = (core.get_adv_estimator_fn(name)(**given)[0] for name in ("dynascope-grpo", "grpo"))
    assert torch.allclose(mine, theirs, atol=1e-3)
    assert core.get_policy_loss_fn("dynascope-grpo") is not None


def test_rewards_score_a_batch_of_verls() -> None:
    """Called as verl's reward manager of whole batches does."""
    seen: list[Any] = []

    def reward(completions: Sequence[str], label: Sequence[int], **columns: Any) -> list[float | None]:
        seen.append(columns)
        return [
            None if text == "" else float(text == str(right)) for text, right in zip(completions, label, strict=True)
        ]

    score = verl_score(reward, column="label")
    sources, extras = np.array(["pairs"] * 3, dtype=object), [{"index": one} for one in range(3)]
    told = score(
        data_sources=sources, solution_strs=["1", "2", ""], ground_truths=[1, 1, 1], extra_infos=extras, bonus=2
    )
    assert told == [1.0, 0.0, 0.0]
    assert seen == [{"data_source": ["pairs"] * 3, "extra_info": extras, "bonus": 2}]
    for bad in ([float("nan")], [1.0, 2.0]):
        with pytest.raises(ValueError, match=r"reward '<lambda>' gave (no finite number|2 values for 1)"):
            verl_score(lambda bad=bad, **columns: bad)([""], ["1"], [1], [None])
    judge = verl_score(JudgeReward(), column="label")
    text = "<think>so</think><answer>2</answer>"
    assert judge(data_sources=[""], solution_strs=[text], ground_truths=[2], extra_infos=[None]) == [1.5]
