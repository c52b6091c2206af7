"""Policy objectives by name, each said as its difference from another."""

import copy
import difflib

from dynascope.rl.advantages import GAE, GroupZScore, LeaveOneOut, WhitenedReturns
from dynascope.rl.hidden_reward import HiddenRewardSteering
from dynascope.rl.objective import PolicyObjective

grpo = PolicyObjective()
"""2402.03300, without its KL term: `grpo.having(kl=(KLTerm(coefficient=0.04),))` has it."""
dr_grpo = grpo.having(advantage=GroupZScore(std="none"), aggregation="max-length")
"""2503.20783: neither the deviation nor a completion's length in a denominator."""
dapo = grpo.having(clip=(0.2, 0.28), aggregation="token-mean")
"""2503.14476: clip higher, and every token weighs the same. Dropping uniform groups is the loop's `keep`."""
gspo = grpo.having(ratio="sequence", clip=(3e-4, 4e-4))
"""2507.18071, with the clipping ranges of its section 5."""
rloo = grpo.having(advantage=LeaveOneOut(), aggregation="seq-mean-token-sum")
"""2402.14740: a completion is one action."""
reinforce_pp = grpo.having(advantage=WhitenedReturns())
"""2501.03262: no groups; KL to the start model in the reward."""
ppo = reinforce_pp.having(advantage=GAE(), aggregation="token-mean")
"""1707.06347 with a critic."""
thr = grpo.having(post=(HiddenRewardSteering(p=0.2),))
"""2510.03669: tilted towards tokens that raise the likelihood of right answers; p below 0 explores instead."""
thr_gspo = thr.having(ratio="sequence-token", clip=(3e-4, 4e-4))
"""The same on GSPO, whose token form takes advantages that differ from token to token."""

PRESETS: dict[str, PolicyObjective] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "gspo": gspo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "ppo": ppo,
    "thr": thr,
    "thr_gspo": thr_gspo,
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
