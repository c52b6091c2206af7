"""What a token's entropy decides at every stage of policy optimization, part by part over DAPO (arXiv 2509.16591).

A small model that was taught sums with written steps is trained on by reinforcement learning. DAPO treats all tokens alike;
four parts do not: temperature, comparison of rewards, redistribution of advantages, and clip follow a token's entropy or
count tokens rather than answers. Arms add each part alone, and one after the other up to all of them; four rivals let entropy
decide otherwise. Each takes several optimizer steps on a rollout, since with one the ratio stays 1 and two parts have nothing
to act on.

The released code has a guard that equation 9 has not: a group in which an advantage would reach 5 is compared by completions
after all, and its tokens' advantages then do not cancel. The rollouts in which it acts are the ones that break C1: over three
seeds of `small` it acted in 5 of the 90 rollouts of `token-average` and in 4 of the 90 of `hapo`, where the mean advantage of a
token came to 0.01 to 0.05; in all others, and in all of the arm without the guard, it stayed below 5e-8.
`advantage/guarded` says how many tokens it took.
"""

from dataclasses import dataclass

import torch

from dynascope.record import Series
from dynascope.rl.batch import PolicyBatch
from dynascope.rl.entropy.parts import AdaptiveTemperature, TokenGroupZScore, entropy_aware
from dynascope.rl.entropy.report import by_entropy, weight_shares
from dynascope.rl.loop import Step
from dynascope.rl.monitors import learnable_groups
from dynascope.rl.objective import LossView, PolicyObjective
from dynascope.rl.presets import dapo, preset
from dynascope.rl.rollout import score
from dynascope.rl.surrogate import clipped_surrogate
from dynascope.rl.tasks.arithmetic import PAD, STOP
from dynascope.studies.harness import StudyRecord
from dynascope.studies.harness.policy import reinforce, start_model
from dynascope.studies.harness.sums import SumsConfig


@dataclass(frozen=True)
class Config(SumsConfig):
    """Sizes and lengths."""

    num_steps: int = 30
    num_prompts: int = 20
    num_minibatches: int = 1
    num_passes: int = 2
    lr: float = 1e-4
    """At 3e-4 with 12 prompts and four optimizer steps a rollout, DAPO itself fell from 73 to 40 % of right answers."""
    test_problems: int = 48
    test_every: int = 15
    tau: float = 0.05
    alpha: float = 1.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_minibatches * self.num_passes < 2:
            raise ValueError("one optimizer step a rollout keeps every ratio at 1: use num_passes=2")


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
            return preset(self.rival)
        objective = entropy_aware(
            dapo,
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
    """Dynamic sampling: prompts with right and wrong answers alone."""
    return learnable_groups(batch.rewards, batch.group_ids)


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
        record.add(step.number, weight_shares(batch.advantage, batch.mask, batch.correct))
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
    clipped = clipped_surrogate(view.ratio, batch.advantage[:, None], low, high)
    return {
        "clip_by_entropy/low": by_entropy(clipped.is_clipped_low, batch.entropy, batch.mask, NUM_BINS),
        "clip_by_entropy/high": by_entropy(clipped.is_clipped_high, batch.entropy, batch.mask, NUM_BINS),
        "clip_by_entropy/spread": by_entropy(log_ratio.square(), batch.entropy, batch.mask, NUM_BINS).sqrt(),
    }
