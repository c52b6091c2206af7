"""What a token's entropy decides at every stage of policy optimization, part by part over DAPO (arXiv 2509.16591).

A small model that was taught sums with written steps is trained on by reinforcement learning. DAPO treats all tokens alike;
four parts do not: temperature, comparison of rewards, redistribution of advantages, and clip follow a token's entropy or
count tokens rather than answers. Arms add each part alone, and one after the other up to all of them; four rivals let entropy
decide otherwise. Each takes several optimizer steps on a rollout, since with one the ratio stays 1 and two parts have nothing
to act on; C5 says whether they have.

The released code has a guard that equation 9 has not: a group in which an advantage would reach 5 is compared by completions
after all, and its tokens' advantages then do not cancel. The rollouts in which it acts are the ones that break C1, which the
arm without the guard shows; `advantage/guarded` says how many tokens it took.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dynascope.record import Series
from dynascope.rl.batch import PolicyBatch, per_token
from dynascope.rl.entropy.parts import AdaptiveTemperature, TokenGroupZScore, entropy_aware
from dynascope.rl.entropy.report import by_entropy, weight_shares
from dynascope.rl.loop import Step
from dynascope.rl.monitors import learnable_groups
from dynascope.rl.objective import LossView, PolicyObjective
from dynascope.rl.presets import dapo, preset
from dynascope.rl.rollout import score
from dynascope.rl.surrogate import clipped_surrogate
from dynascope.rl.tasks.arithmetic import CHARACTERS, PAD, STOP, Sum, answer_reward
from dynascope.rl.tasks.rewards import Reward, overlong_penalty
from dynascope.studies.harness import StudyRecord
from dynascope.studies.harness.policy import Evaluation, reinforce, start_model
from dynascope.studies.harness.sums import SumsConfig


@dataclass(frozen=True)
class Config(SumsConfig):
    """Sizes and lengths."""

    num_layers: int = 1
    width: int = 48
    base_steps: int = 140
    """Of supervised learning; the start model's likeliest tokens should be right one to three times of ten."""
    num_steps: int = 80
    num_passes: int = 2
    test_every: int = 20
    tau: float = 0.05
    alpha: float = 1.0
    beta: float = 1.0
    dual_clip: float | None = None
    """Of every arm; the recipe's is 10."""
    overlong_buffer: int = 0
    """Last tokens before the length limit over which the reward of every arm falls by 1, as in DAPO's recipe; 0 for no such
    penalty."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_minibatches * self.num_passes < 2:
            raise ValueError("one optimizer step a rollout keeps every ratio at 1: use num_passes=2")
        if not 0 <= self.overlong_buffer <= self.task.max_new_tokens:
            raise ValueError(
                f"overlong_buffer={self.overlong_buffer} must lie between 0 and the {self.task.max_new_tokens} tokens of a "
                "completion"
            )

    @property
    def evaluation(self) -> Evaluation:
        """Tests tell entropy too: rollouts of arms differ in the prompts that are kept and in the temperature."""
        return replace(super().evaluation, measures_entropy=True)


@dataclass(frozen=True)
class Arm:
    """Which parts are switched on over DAPO."""

    adapts_temperature: bool = False
    averages_tokens: bool = False
    redistributes: bool = False
    adapts_clip: bool = False
    is_guarded: bool = True
    """Whether groups with far advantages are compared by completions, as in the released code."""
    rival: str = ""
    """A preset in place of all this."""

    def objective(self, config: Config) -> PolicyObjective:
        """DAPO with the arm's parts of the objective, or the rival."""
        if self.rival:
            return preset(self.rival).having(dual_clip=config.dual_clip)
        objective = entropy_aware(
            dapo.having(dual_clip=config.dual_clip),
            averages_tokens=self.averages_tokens,
            redistributes=self.redistributes,
            adapts_clip=self.adapts_clip,
            alpha=config.alpha,
            beta=config.beta,
        )
        return objective if self.is_guarded else objective.having(advantage=TokenGroupZScore(fallback=None))


ARMS = {
    "dapo": Arm(),
    "temperature": Arm(adapts_temperature=True),
    "token-average": Arm(averages_tokens=True),
    "redistribution": Arm(redistributes=True),
    "clip": Arm(adapts_clip=True),
    "hapo": Arm(True, True, True, True),
    "token-average-unguarded": Arm(averages_tokens=True, is_guarded=False),
    "two-parts": Arm(adapts_temperature=True, averages_tokens=True),
    "three-parts": Arm(adapts_temperature=True, averages_tokens=True, redistributes=True),
    "forking-tokens": Arm(rival="forking_tokens"),
    "archer": Arm(rival="archer"),
    "entropy-advantage": Arm(rival="entropy_advantage"),
    "edge-grpo": Arm(rival="edge_grpo"),
}
NUM_BINS = 10


def learnable(batch: PolicyBatch) -> torch.Tensor:
    """Dynamic sampling: prompts with right and wrong answers alone, whatever a penalty makes of their rewards."""
    assert batch.correct is not None
    return learnable_groups(batch.correct.float(), batch.group_ids)


def penalised_reward(config: Config) -> Reward:
    """1 for a right answer, less DAPO's penalty for the last tokens before the length limit."""
    limit = config.task.max_new_tokens

    def reward(completions: Sequence[str], problem: Sequence[Sum], **columns: Any) -> list[float]:
        right = torch.tensor(answer_reward(completions, problem))
        lengths = torch.tensor([len(text) for text in completions])  # a token is a character
        is_truncated = torch.tensor([not text.endswith(CHARACTERS[STOP]) for text in completions])
        penalty = overlong_penalty(lengths, is_truncated, max_length=limit, buffer=config.overlong_buffer)
        told: list[float] = (right + penalty).tolist()
        return told

    return reward


def train(config: Config, arm: Arm, seed: int, record: StudyRecord) -> None:
    """Reinforcement learning with the arm's parts; whom the objective weighs, and where along entropy the clip acts."""
    model = start_model(record, config.start, seed)
    objective = arm.objective(config)
    deciles = {"decile": list(range(1, NUM_BINS + 1))}
    told = {"clip_by_entropy/low": "Share of tokens whose gradient the lower bound took."}
    told |= {"clip_by_entropy/high": "Share of tokens whose gradient the upper bound took."}
    told |= {"clip_by_entropy/spread": "Root mean square of the log-ratio."}
    for name, description in told.items():
        record.declare(Series(name, ("decile",), "", description, deciles))

    @torch.no_grad()
    def look(step: Step) -> None:
        batch = step.batch
        if batch.advantage is None:
            return
        assert batch.correct is not None
        record.add(step.number, weight_shares(batch.advantage, batch.mask, batch.correct, batch.group_ids))
        if (step.number + 1) % config.test_every == 0:
            record.add(step.number, along_entropy(objective, batch.having(**score(model, step.rollout, {"entropy"}))))

    reinforce(
        record,
        model,
        objective,
        config.task,
        config.loop,
        lr=config.lr,
        seed=seed,
        evaluation=config.evaluation,
        look=look,
        keep=learnable,
        rewards=penalised_reward(config) if config.overlong_buffer else None,
        ref_model=start_model(record, config.start, seed) if "ref_log_probs" in objective.loss_needs else None,
        process=AdaptiveTemperature({STOP, PAD}, tau=config.tau) if arm.adapts_temperature else None,
    )


def along_entropy(objective: PolicyObjective, batch: PolicyBatch) -> dict[str, torch.Tensor]:
    """After the optimizer steps on a rollout: what the clip takes, and how far ratios went, by decile of entropy."""
    assert batch.log_probs is not None
    assert batch.behaviour_log_probs is not None
    assert batch.advantage is not None
    assert batch.entropy is not None
    log_ratio = (batch.log_probs - batch.behaviour_log_probs).masked_fill(~batch.mask, 0.0)
    view = LossView(batch, log_ratio.exp(), log_ratio)
    low, high = objective.clip(view) if callable(objective.clip) else objective.clip
    clipped = clipped_surrogate(view.ratio, per_token(batch.advantage), low, high)
    return {
        "clip_by_entropy/low": by_entropy(clipped.is_clipped_low, batch.entropy, batch.mask, NUM_BINS),
        "clip_by_entropy/high": by_entropy(clipped.is_clipped_high, batch.entropy, batch.mask, NUM_BINS),
        "clip_by_entropy/spread": by_entropy(log_ratio.square(), batch.entropy, batch.mask, NUM_BINS).sqrt(),
    }
