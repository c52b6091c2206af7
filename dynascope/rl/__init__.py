"""Parts: policy optimization. Rollouts, rewards, and objectives out of the same slots."""

from dynascope.rl.advantage_filter import AdvantageFilter, filter_advantages, normalize_advantages
from dynascope.rl.advantages import (
    GAE,
    GroupZScore,
    LeaveOneOut,
    WhitenedReturns,
    center,
    generalized_advantages,
    group_z_score,
    leave_one_out,
    returns_to_go,
    unit_rms,
    whiten,
)
from dynascope.rl.aggregation import aggregate
from dynascope.rl.batch import PolicyBatch
from dynascope.rl.entropy_aware import AdaptiveTemperature, entropy_aware
from dynascope.rl.entropy_signal import EntropySignal, token_entropy
from dynascope.rl.kl import KLTerm, kl_estimate
from dynascope.rl.objective import LossView, PolicyObjective
from dynascope.rl.presets import (
    PRESETS,
    dapo,
    dr_grpo,
    grpo,
    gspo,
    hapo,
    ppo,
    preset,
    reinforce_pp,
    relift_rl,
    riskpo,
    rloo,
    simplerl_zoo,
    riskpo,
    rloo,
    stable_reinforce,
)
from dynascope.rl.quantiles import QuantileTracker
from dynascope.rl.ratios import log_ratios
from dynascope.rl.risk import mvar_advantage, risk_report
from dynascope.rl.risk_advantage import RiskAdvantage
from dynascope.rl.surrogate import clipped_surrogate

__all__ = [
    "GAE",
    "PRESETS",
    "AdaptiveTemperature",
    "AdvantageFilter",
    "EntropySignal",
    "GroupZScore",
    "KLTerm",
    "LeaveOneOut",
    "LossView",
    "PolicyBatch",
    "PolicyObjective",
    "QuantileTracker",
    "RiskAdvantage",
    "WhitenedReturns",
    "aggregate",
    "center",
    "clipped_surrogate",
    "dapo",
    "dr_grpo",
    "entropy_aware",
    "filter_advantages",
    "generalized_advantages",
    "group_z_score",
    "grpo",
    "gspo",
    "hapo",
    "kl_estimate",
    "leave_one_out",
    "log_ratios",
    "mvar_advantage",
    "normalize_advantages",
    "ppo",
    "preset",
    "reinforce_pp",
    "relift_rl",
    "returns_to_go",
    "risk_report",
    "riskpo",
    "rloo",
    "simplerl_zoo",
    "stable_reinforce",
    "token_entropy",
    "unit_rms",
    "whiten",
]
