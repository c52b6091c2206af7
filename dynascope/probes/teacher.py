"""How far a policy is from a teacher, over the whole vocabulary (arXiv 2506.02208)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dynascope.probes.probe import Need, Probe
from dynascope.probes.views import ModelView
from dynascope.record import Series
from dynascope.rl.distillation import teacher_credit
from dynascope.rl.rollout import Rollout, score
from dynascope.rl.teachers import GAP_NAMES, TeacherScorer, exact_teacher_kl, gap_shares


class TeacherDivergence(Probe):
    """KL(policy ‖ teacher) at every token of held-out completions, exactly, and where R = log π_teacher − log π lies there.

    Args:
        rollout: The same completions at every look; a few, since the logits of both models are held for `teacher.micro_batch`.
        teacher: Of the policy's vocabulary. What it says of the sampled tokens is asked once and kept.

    Cost: two forward passes of the policy and one of the teacher over the completions.

    >>> dynascope.watch(model, optimizer, every=50, probes=[TeacherDivergence(rollout, TeacherScorer(teacher))])
    """

    name = "teacher"
    needs = frozenset({Need.MODEL})
    default = False
    series = (
        Series("teacher/kl_exact", unit="nats", description="KL(policy ‖ teacher) of a token, over the vocabulary."),
        Series(
            "teacher/gap_histogram",
            ("gap",),
            description="Share of tokens by log π_teacher − log π.",
            coords={"gap": list(GAP_NAMES)},
        ),
        Series("teacher/gap_max", unit="nats", description="Largest |log π_teacher − log π| of a sampled token."),
    )

    def __init__(self, rollout: Rollout, teacher: TeacherScorer) -> None:
        self.rollout, self.teacher = rollout, teacher
        self._said: Tensor | None = None

    def measure(self, view: ModelView) -> Mapping[str, Tensor]:
        """One look at the completions."""
        rollout = self.rollout
        if self._said is None:
            self._said = self.teacher(rollout)
        with torch.no_grad():
            own = score(view.model, rollout)["log_probs"]
        gap = teacher_credit(own, self._said, rollout.mask)[rollout.mask]
        return {
            "teacher/kl_exact": exact_teacher_kl(view.model, self.teacher, rollout)[rollout.mask].mean(),
            "teacher/gap_histogram": gap_shares(gap),
            "teacher/gap_max": gap.abs().max(),
        }
