"""Policy objectives by name, each said as its difference from another."""

import copy
import difflib

from dynascope.rl.advantage_filter import AdvantageFilter
from dynascope.rl.advantages import GAE, GroupZScore, LeaveOneOut, WhitenedReturns
from dynascope.rl.distillation import LinearAnneal, unsolved_prompts, wrong_answers
from dynascope.rl.entropy.baselines import (
    CertainTokens,
    CompletionEntropy,
    DualTokenClip,
    EntropyAdvantage,
    ForkingTokens,
)
from dynascope.rl.entropy.parts import entropy_aware
from dynascope.rl.entropy.signal import EntropySignal
from dynascope.rl.exploration import PassAtKMixed, TopCovariance
from dynascope.rl.hidden_reward_steering import HiddenRewardSteering
from dynascope.rl.kl import KLTerm
from dynascope.rl.objective import PolicyObjective
from dynascope.rl.risk.advantage import RiskAdvantage

grpo = PolicyObjective()
"""2402.03300, without its KL term: `grpo.having(kl=(KLTerm(coefficient=0.04),))` has it."""
dr_grpo = grpo.having(advantage=GroupZScore(std="none"), aggregation="max-length")
"""2503.20783: neither the deviation nor a completion's length in a denominator."""
dapo = grpo.having(clip=(0.2, 0.28), aggregation="token-mean")
"""2503.14476: clip higher, and every token weighs the same. Dropping uniform groups is the loop's `keep`."""
relift_rl = dr_grpo.having(clip=(None, None), entropy_bonus=1e-3)
"""2506.07527: what its program runs between steps of fine-tuning (`rl.interleaving.interleave`); nothing is clipped."""
luffy = relift_rl.having(shaping=0.1)
"""2504.14945, as its program runs it: one completion of each prompt is a demonstration (`train(mix=DemonstrationsInGroups(…))`),
whose rare tokens keep their gradient."""
simplerl_zoo = grpo.having(
    advantage=GroupZScore(eps=1e-6), aggregation="token-mean", kl=(KLTerm("ref", "k3", 1e-4, clamp_value=10.0),)
)
"""2503.18892, appendix A: every token weighs the same, and a weak pull to the start model (1e-3 above 14B parameters), whose
estimate its program holds below 10. That averages within micro-batches: `aggregation="microbatch"`."""
gspo = grpo.having(ratio="sequence", clip=(3e-4, 4e-4))
"""2507.18071, with the clipping ranges of its section 5."""
rloo = grpo.having(advantage=LeaveOneOut(), aggregation="seq-mean-token-sum")
"""2402.14740: a completion is one action."""
reinforce_pp = grpo.having(advantage=WhitenedReturns())
"""2501.03262: no groups; KL to the start model in the reward."""
ppo = reinforce_pp.having(advantage=GAE(), aggregation="token-mean")
"""1707.06347 with a critic."""
hapo = entropy_aware(dapo)
"""2509.16591: rewards compared by tokens, advantages and clip by entropy. Its sampler is `train(process=AdaptiveTemperature())`;
the released recipe also has `dual_clip=10.0`."""
forking_tokens = dapo.having(adjust=(ForkingTokens(EntropySignal()),))
"""2506.01939: uncertain tokens alone are learned from. This and the next three are what HAPO is compared with."""
entropy_advantage = grpo.having(adjust=(EntropyAdvantage(),))
"""2506.14758: uncertain tokens have a bonus in the advantage."""
archer = dapo.having(
    clip=DualTokenClip(),
    kl=(KLTerm("ref", "k3", 1e-3, keep=CertainTokens(), also_needs=frozenset({"entropy"})),),
)
"""2507.15778: uncertain tokens are clipped less, certain ones held to the start model."""
edge_grpo = grpo.having(post=(CompletionEntropy(),))
"""2507.21848, its advantage: what is sure weighs more."""
pass_at_k_mixed = grpo.having(advantage=PassAtKMixed())
"""2508.10751: half of the advantage is that of Pass@4. This and the next are what THR is compared with."""
kl_cov = grpo.having(
    clip=(None, None), kl=(KLTerm("behaviour", "abs", 1.0, keep=TopCovariance()),), aggregation="token-mean"
)
"""2505.22617: the few tokens that cost most entropy are pulled back to the policy that sampled; nothing is clipped."""
riskpo = grpo.having(advantage=RiskAdvantage(), ratio="sequence")
"""2510.00911: a mixed value at risk of bundled rewards instead of their mean. It has a state: `preset` gives a fresh one."""
riskpo_seeking = riskpo.having(advantage=RiskAdvantage(measure="seeking"))
"""Its ablation, which weighs the upper tail."""
stable_reinforce = reinforce_pp.having(pre_clip=(1e-3, 1e3), post=(AdvantageFilter(),))
"""2505.02835: log-ratios held before they are exponentiated, advantages beyond three sigma left out. Works over any other:
`grpo.having(pre_clip=(1e-3, 1e3), post=(AdvantageFilter(),))`. Its consistency reward is `rl.tasks.pairwise.JudgeReward`."""
thr = grpo.having(post=(HiddenRewardSteering(p=0.2),))
"""2510.03669: tilted towards tokens that raise the likelihood of right answers; p below 0 explores instead."""
thr_gspo = thr.having(ratio="sequence-token", clip=(3e-4, 4e-4))
"""The same on GSPO, whose token form takes advantages that differ from token to token."""
kdrl = grpo.having(kl=(KLTerm("teacher", "k2", 2e-3),), aggregation="token-mean")
"""2506.02208: the reverse divergence to a teacher on the policy's own samples beside the reward, over the same tokens."""
kd_rkl = kdrl.having(policy_weight=0.0, kl=(KLTerm("teacher", "k2", 1.0),))
"""Its baseline: the teacher alone."""
kdrl_annealed = kdrl.having(kl=(KLTerm("teacher", "k2", LinearAnneal()),))
"""Its best: much teacher at first, little later."""
kdrl_masking_response = kdrl.having(
    kl=(KLTerm("teacher", "k2", 2e-3, keep=wrong_answers, also_needs=frozenset({"correct"})),)
)
"""The teacher on wrong answers alone."""
kdrl_masking_group = kdrl.having(
    kl=(KLTerm("teacher", "k2", 2e-3, keep=unsolved_prompts, also_needs=frozenset({"is_solved"})),)
)
"""The teacher on prompts without a right answer alone."""

PRESETS: dict[str, PolicyObjective] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "relift_rl": relift_rl,
    "luffy": luffy,
    "simplerl_zoo": simplerl_zoo,
    "gspo": gspo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "ppo": ppo,
    "stable_reinforce": stable_reinforce,
    "hapo": hapo,
    "forking_tokens": forking_tokens,
    "entropy_advantage": entropy_advantage,
    "archer": archer,
    "edge_grpo": edge_grpo,
    "pass_at_k_mixed": pass_at_k_mixed,
    "kl_cov": kl_cov,
    "riskpo": riskpo,
    "riskpo_seeking": riskpo_seeking,
    "thr": thr,
    "thr_gspo": thr_gspo,
    "kdrl": kdrl,
    "kd_rkl": kd_rkl,
    "kdrl_annealed": kdrl_annealed,
    "kdrl_masking_response": kdrl_masking_response,
    "kdrl_masking_group": kdrl_masking_group,
}


def preset(name: str) -> PolicyObjective:
    """An objective by name, with a state of its own where it has one.

    Raises ValueError for a name that is not in `PRESETS`.

    >>> preset("gspo").ratio
    'sequence'
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(PRESETS)}"
        raise ValueError(f"there is no preset {name!r}; {hint}")
    return copy.deepcopy(PRESETS[name])
