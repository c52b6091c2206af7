"""Parts: policy optimization. Rollouts, rewards, and objectives out of the same slots."""

from dynascope.rl.advantages import (
    GAE,
    GroupZScore,
    LeaveOneOut,
    WhitenedReturns,
    generalized_advantages,
    group_z_score,
    leave_one_out,
    returns_to_go,
    whiten,
)
from dynascope.rl.aggregation import aggregate
from dynascope.rl.batch import PolicyBatch
from dynascope.rl.hidden_reward import (
    HiddenReward,
    HiddenRewardSteering,
    SharedTokenRelief,
    gwhes,
    nthr_reweight,
    thr_reweight,
    token_hidden_reward,
)
from dynascope.rl.kl import KLTerm, kl_estimate
from dynascope.rl.objective import LossView, PolicyObjective
from dynascope.rl.presets import PRESETS, dapo, dr_grpo, grpo, gspo, ppo, preset, reinforce_pp, rloo, thr, thr_gspo
from dynascope.rl.ratios import log_ratios
from dynascope.rl.surrogate import clipped_surrogate

__all__ = [
    "GAE",
    "PRESETS",
    "GroupZScore",
    "HiddenReward",
    "HiddenRewardSteering",
    "KLTerm",
    "LeaveOneOut",
    "LossView",
    "PolicyBatch",
    "PolicyObjective",
    "SharedTokenRelief",
    "WhitenedReturns",
    "aggregate",
    "clipped_surrogate",
    "dapo",
    "dr_grpo",
    "generalized_advantages",
    "group_z_score",
    "grpo",
    "gspo",
    "gwhes",
    "kl_estimate",
    "leave_one_out",
    "log_ratios",
    "nthr_reweight",
    "ppo",
    "preset",
    "reinforce_pp",
    "returns_to_go",
    "rloo",
    "thr",
    "thr_gspo",
    "thr_reweight",
    "token_hidden_reward",
    "whiten",
]
