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
)
from dynascope.rl.aggregation import aggregate
from dynascope.rl.batch import PolicyBatch
from dynascope.rl.distillation import (
    LinearAnneal,
    TeacherAdvantage,
    TeacherReward,
    kd_mask,
    kd_rkl_loss,
)
from dynascope.rl.entropy.baselines import (
    CompletionEntropy,
    DualTokenClip,
    EntropyAdvantage,
    ForkingTokens,
    TopEntropy,
)
from dynascope.rl.entropy.parts import AdaptiveTemperature, entropy_aware
from dynascope.rl.entropy.signal import EntropySignal
from dynascope.rl.exploration import PassAtKMixed, TopCovariance, pass_at_k_advantage
from dynascope.rl.hidden_reward import HiddenReward, gwhes, nthr_reweight, thr_reweight, token_hidden_reward
from dynascope.rl.hidden_reward_steering import HiddenRewardSteering, HoldEntropy, SharedTokenRelief
from dynascope.rl.kl import KLTerm, kl_estimate
from dynascope.rl.objective import LossView, PolicyObjective
from dynascope.rl.presets import (
    PRESETS,
    dapo,
    dr_grpo,
    grpo,
    gspo,
    hapo,
    kd_rkl,
    kdrl,
    kdrl_annealed,
    kdrl_masking_group,
    kdrl_masking_response,
    luffy,
    ppo,
    preset,
    reinforce_pp,
    relift_rl,
    riskpo,
    rloo,
    simplerl_zoo,
    stable_reinforce,
    thr,
    thr_gspo,
)
from dynascope.rl.ratios import log_ratios
from dynascope.rl.risk.advantage import RiskAdvantage
from dynascope.rl.risk.measures import mvar_advantage, risk_report
from dynascope.rl.risk.quantiles import QuantileTracker
from dynascope.rl.surrogate import clipped_surrogate
from dynascope.rl.teachers import TeacherScorer, check_teacher, exact_teacher_kl, watch_teacher
from dynascope.rl.token_entropy import token_entropy

__all__ = [
    "GAE",
    "PRESETS",
    "AdaptiveTemperature",
    "AdvantageFilter",
    "CompletionEntropy",
    "DualTokenClip",
    "EntropyAdvantage",
    "EntropySignal",
    "ForkingTokens",
    "GroupZScore",
    "HiddenReward",
    "HiddenRewardSteering",
    "HoldEntropy",
    "KLTerm",
    "LeaveOneOut",
    "LinearAnneal",
    "LossView",
    "PassAtKMixed",
    "PolicyBatch",
    "PolicyObjective",
    "QuantileTracker",
    "RiskAdvantage",
    "SharedTokenRelief",
    "TeacherAdvantage",
    "TeacherReward",
    "TeacherScorer",
    "TopCovariance",
    "TopEntropy",
    "WhitenedReturns",
    "aggregate",
    "center",
    "check_teacher",
    "clipped_surrogate",
    "dapo",
    "dr_grpo",
    "entropy_aware",
    "exact_teacher_kl",
    "filter_advantages",
    "generalized_advantages",
    "group_z_score",
    "grpo",
    "gspo",
    "gwhes",
    "hapo",
    "kd_mask",
    "kd_rkl",
    "kd_rkl_loss",
    "kdrl",
    "kdrl_annealed",
    "kdrl_masking_group",
    "kdrl_masking_response",
    "kl_estimate",
    "leave_one_out",
    "log_ratios",
    "luffy",
    "mvar_advantage",
    "normalize_advantages",
    "nthr_reweight",
    "pass_at_k_advantage",
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
    "thr",
    "thr_gspo",
    "thr_reweight",
    "token_entropy",
    "token_hidden_reward",
    "unit_rms",
    "watch_teacher",
]
