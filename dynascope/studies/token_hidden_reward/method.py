"""Few tokens carry GRPO, and a tilt towards or away from them trades exploitation for exploration (arXiv 2510.03669).

A small decoder that does sums with written steps rather badly is trained by GRPO. Arms of a sweep differ in p alone: tokens
that raise the likelihood of right answers are amplified (p above 0), left, or weakened; three do so on GSPO. Others let p go
from exploring to exploiting, let it hold the entropy, and train on dominant tokens alone, above three thresholds; the rest are
what the paper and its readers compare with. Before training, the arm without a tilt also tries the mechanism: from the start
model, one small step on the tokens with positive hidden reward of one prompt, and one on those with negative, and what either
does to the right answers of that prompt.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynascope.probes.hidden_reward import TOP, concentration, likelihood_displacement, top_overlap
from dynascope.record import Series
from dynascope.rl.advantages import group_z_score
from dynascope.rl.entropy.baselines import TopEntropy
from dynascope.rl.hidden_reward import HiddenReward, token_hidden_reward
from dynascope.rl.hidden_reward_steering import (
    HiddenRewardSteering,
    HoldEntropy,
    RandomTokens,
    SharedTokenRelief,
    positive_only,
)
from dynascope.rl.loop import Step, draw_rollout
from dynascope.rl.objective import PolicyObjective
from dynascope.rl.presets import grpo, kl_cov, pass_at_k_mixed, thr_gspo
from dynascope.rl.rollout import Rollout, score
from dynascope.studies.harness import StudyRecord
from dynascope.studies.harness.policy import Evaluation, measure_policy, reinforce, start_model
from dynascope.studies.harness.sums import SumsConfig


@dataclass(frozen=True)
class Config(SumsConfig):
    """Sizes and lengths."""

    num_layers: int = 1
    width: int = 48
    base_steps: int = 160
    """Of supervised learning; the start model should be right about a fifth of the time."""
    num_prompts: int = 24
    lr: float = 1e-4
    """With 5e-4 GRPO itself loses answers of sixteen tries, and what explores forgets its sums."""
    test_problems: int = 256
    test_every: int = 60
    held: float = 0.25
    """Entropy that the arm `holding` aims at, in nats."""
    step_length: float = 1e-3
    """Of the steps that try the mechanism: the norm of the change of the weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_samples < 2 or self.step_length <= 0:
            raise ValueError("num_samples must be at least 2, and step_length positive")


@dataclass(frozen=True)
class Arm:
    """A tilt of GRPO, or one of `OTHERS` in its place."""

    p: float = 0.0
    """Above 0 exploits, below 0 explores."""
    turns: bool = False
    """Whether p goes over to the other sign while training lasts."""
    holds: bool = False
    """Whether p adapts, so that the entropy stays where `held` says."""
    beta: float | None = None
    """Of the threshold, where dominant tokens alone are trained on."""
    is_gspo: bool = False
    """Whether GSPO is tilted in place of GRPO."""
    other: str = ""


P = 0.2
"""Of the arms that claims read; 0.3 and more were tried with other seeds, and explore too far to learn."""


def steer(p_values: Iterable[float]) -> dict[str, Arm]:
    """An arm that exploits and one that explores for each p, beside those of `P`."""
    return {f"{name}-{p:g}": Arm(sign * p) for p in p_values for name, sign in (("exploit", 1), ("explore", -1))}


OTHERS = {
    "positive-only": grpo.having(post=(positive_only,)),
    "random-tokens": grpo.having(post=(RandomTokens(),)),
    "relief": grpo.having(post=(SharedTokenRelief(),)),
    "clip-higher": grpo.having(clip=(0.2, 0.28)),
    "top-entropy": grpo.having(post=(TopEntropy(),)),
    "pass-at-k": pass_at_k_mixed,
    "kl-cov": kl_cov,
}
ARMS = {
    "neutral": Arm(),
    "exploit": Arm(P),
    "explore": Arm(-P),
    **steer((0.1, 0.5)),
    "turning": Arm(-P, turns=True),
    "holding": Arm(holds=True),
    "dominant-half": Arm(beta=0.5),
    "dominant": Arm(beta=1.0),
    "dominant-twice": Arm(beta=2.0),
    "gspo": Arm(is_gspo=True),
    "gspo-exploit": Arm(P, is_gspo=True),
    "gspo-explore": Arm(-P, is_gspo=True),
} | {name: Arm(other=name) for name in OTHERS}


def objective(config: Config, arm: Arm) -> PolicyObjective:
    """GRPO or GSPO, with whatever the arm does to its tokens."""
    if arm.other:
        return OTHERS[arm.other]
    p = tilt(config, arm)
    slot = HiddenRewardSteering(p=p) if arm.beta is None else HiddenRewardSteering(p=p, mask_small=True, beta=arm.beta)
    return (thr_gspo if arm.is_gspo else grpo).having(post=(slot,))


def tilt(config: Config, arm: Arm) -> float | Callable[[int], float] | HoldEntropy:
    """The arm's p: constant, going over to the other sign, or holding the entropy."""
    if arm.holds:
        return HoldEntropy(config.held)
    last = max(config.num_steps - 1, 1)
    return (lambda step: arm.p * (1 - 2 * step / last)) if arm.turns else arm.p


def train(config: Config, arm: Arm, seed: int, record: StudyRecord) -> None:
    """Reinforcement learning with the arm's objective."""
    model = start_model(record, config.start, seed)
    record.declare(Series("thr/concentration", ("top",), coords={"top": [f"{share:.0%}" for share in TOP]}))
    if arm == ARMS["neutral"]:
        try_mechanism(config, model, seed, record)
    record.add(0, {"greedy/correct": greedy(config, model)})

    def look(step: Step) -> None:
        if step.number % 10 == 0 or step.number + 1 == config.num_steps:
            rollout, correct = step.rollout, step.batch.correct
            assert correct is not None
            with torch.no_grad():
                after = score(model, rollout)["log_probs"]
            told = likelihood_displacement(rollout.behaviour_log_probs, after, rollout.mask, correct, rollout.group_ids)
            record.add(step.number, {"thr/displacement": told.change.nanmean()})

    reinforce(
        record,
        model,
        objective(config, arm),
        config.task,
        config.loop,
        lr=config.lr,
        seed=seed,
        evaluation=config.evaluation,
        look=look,
    )
    record.add(config.num_steps, {"greedy/correct": greedy(config, model)})


def greedy(config: Config, model: nn.Module) -> Tensor | float:
    """Share of right answers of the likeliest tokens."""
    return measure_policy(model, config.task, Evaluation(config.test_problems, 1), temperature=0.0)["test/correct"]


def try_mechanism(config: Config, model: nn.Module, seed: int, record: StudyRecord) -> None:
    """Steps on tokens of one sign alone, prompt by prompt, of the unembedding and of all weights."""
    _, rollout = drawn = draw_rollout(model, config.task, config.loop, torch.Generator().manual_seed(seed))
    correct = torch.tensor(config.task.are_right(drawn[0], config.task.texts(rollout.tokens)))
    with torch.no_grad():
        told = score(model, rollout, {"hidden", "unembedding", "entropy"})
    hidden_reward = token_hidden_reward(
        told["hidden"], rollout.tokens, rollout.mask, correct, rollout.group_ids, unembedding=told["unembedding"]
    )
    mixed = hidden_reward.is_mixed[:, None] & rollout.mask
    record.add(
        0,
        {
            "thr/concentration": concentration(hidden_reward.thr, mixed),
            "thr/entropy_overlap": top_overlap(hidden_reward.thr, told["entropy"], mixed),
        },
    )
    changes = mechanism(config, model, rollout, correct, hidden_reward)
    for name in changes:
        record.declare(Series(name, ("group",), "nat", "Change of the log-probability of a prompt's right answers."))
    record.add(0, changes)


def mechanism(
    config: Config, model: nn.Module, rollout: Rollout, correct: Tensor, hidden_reward: HiddenReward
) -> Mapping[str, Tensor]:
    """By weights that move and sign of tokens: what one step does to Σ log π of right answers, (groups,)."""
    advantage = group_z_score(correct.float(), rollout.group_ids, std="population")
    head: nn.Parameter = model.get_output_embeddings().weight  # type: ignore[operator]
    moved = {"head": [head], "all": list(model.parameters())}
    found: dict[str, list[Tensor]] = {f"mechanism/{name}_{sign}": [] for name in moved for sign in ("plus", "minus")}
    for group in rollout.group_ids[hidden_reward.is_mixed].unique():
        rows = rollout.group_ids == group
        own, weights = rollout.select(rows), (advantage[:, None] * rollout.mask)[rows]
        log_probs = score(model, own)["log_probs"]
        before = (log_probs.detach() * own.mask)[correct[rows]].sum()
        signs = {"plus": hidden_reward.thr[rows] > 0, "minus": hidden_reward.thr[rows] < 0}
        # All gradients come first: a step changes in place what another one's backward pass would read.
        uphill = {
            f"mechanism/{name}_{sign}": (
                parameters,
                torch.autograd.grad((log_probs * weights * chosen).sum(), parameters, retain_graph=True),
            )
            for name, parameters in moved.items()
            for sign, chosen in signs.items()
        }
        for name, (parameters, gradients) in uphill.items():
            after = _after_step(model, own, correct[rows], parameters, gradients, config.step_length)
            found[name].append(after - before)
    return {name: torch.stack(every) for name, every in found.items() if every}


@torch.no_grad()
def _after_step(
    model: nn.Module,
    rollout: Rollout,
    correct: Tensor,
    parameters: list[nn.Parameter],
    gradients: tuple[Tensor, ...],
    length: float,
) -> Tensor:
    """Σ log π of right answers after a step uphill, which is taken back."""
    size = torch.stack(torch._foreach_norm(gradients)).norm()
    kept = [parameter.clone() for parameter in parameters]
    # A group may have no token of this sign; then nothing moves.
    scale = length / size if size > 0 else size
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.add_(scale * gradient)
    after = (score(model, rollout)["log_probs"] * rollout.mask)[correct].sum()
    for parameter, old in zip(parameters, kept, strict=True):
        parameter.copy_(old)
    return after
