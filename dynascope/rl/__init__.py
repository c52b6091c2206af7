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
from dynascope.rl.kl import KLTerm, kl_estimate
from dynascope.rl.objective import LossView, PolicyObjective
from dynascope.rl.presets import (
    PRESETS,
    dapo,
    dr_grpo,
    grpo,
    gspo,
    ppo,
    preset,
    reinforce_pp,
    relift_rl,
    rloo,
    simplerl_zoo,
)
from dynascope.rl.ratios import log_ratios
from dynascope.rl.surrogate import clipped_surrogate

__all__ = [
    "GAE",
    "PRESETS",
    "GroupZScore",
    "KLTerm",
    "LeaveOneOut",
    "LossView",
    "PolicyBatch",
    "PolicyObjective",
    "WhitenedReturns",
    "aggregate",
    "clipped_surrogate",
    "dapo",
    "dr_grpo",
    "generalized_advantages",
    "group_z_score",
    "grpo",
    "gspo",
    "kl_estimate",
    "leave_one_out",
    "log_ratios",
    "ppo",
    "preset",
    "reinforce_pp",
    "relift_rl",
    "returns_to_go",
    "rloo",
    "simplerl_zoo",
    "whiten",
]
