"""Which tokens carry the training of a policy, and what it does to right answers (arXiv 2510.03669, 2505.18830)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dynascope.probes.probe import Need, Probe
from dynascope.probes.views import ModelView
from dynascope.record import Series
from dynascope.rl.advantages import Groups
from dynascope.rl.hidden_reward import HiddenReward, gwhes, token_hidden_reward
from dynascope.rl.rollout import Rollout, score

TOP = (0.01, 0.05, 0.1, 0.2, 0.5)
DECADES = tuple(range(-8, 5))


def concentration(
    thr: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"], shares: Sequence[float] = TOP
) -> Float[Tensor, " shares"]:
    """What share of Σ|THR| the strongest tokens hold, for several shares of tokens; NaN where there is none.

    >>> concentration(told.thr, mask, [0.2])  # above 0.6: a fifth of the tokens carries the update
    """
    sizes = thr[mask].abs().sort(descending=True).values
    counts = [max(1, round(share * len(sizes))) for share in shares]
    held = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    return held[torch.tensor(counts, device=held.device).clamp(max=len(sizes))] / held[-1]


def top_overlap(
    thr: Float[Tensor, "N T"], entropy: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"], share: float = 0.2
) -> Float[Tensor, ""]:
    """Share of the tokens with the largest |THR| that are also among those with the highest entropy; `share` by chance.

    NaN where there is no token.

    >>> top_overlap(told.thr, entropy, mask)
    """
    num = int(mask.sum())
    count = min(max(1, round(share * num)), num)
    strong, uncertain = thr[mask].abs().topk(count).indices, entropy[mask].topk(count).indices
    return torch.isin(strong, uncertain).float().mean()


@dataclass(frozen=True, eq=False)
class Displacement:
    """What training did to the right answers of each prompt."""

    change: Float[Tensor, " groups"]
    """Mean over right answers of the change of log π, in nats; NaN where there is none."""
    is_lazy: Bool[Tensor, " groups"]
    """Right answers did not get likelier."""


def likelihood_displacement(
    before: Float[Tensor, "N T"],
    after: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    correct: Bool[Tensor, " N"],
    group_ids: Int[Tensor, " N"],
    *,
    eps: float = 0.0,
) -> Displacement:
    """How a prompt's right answers changed from one policy to another, and whether by `eps` nats at most.

    Source: 2505.18830, definition of lazy likelihood displacement.

    >>> before, after = score(old, rollout)["log_probs"], score(model, rollout)["log_probs"]
    >>> likelihood_displacement(before, after, rollout.mask, correct, rollout.group_ids).is_lazy.float().mean()
    """
    groups = Groups.by(group_ids)
    gained = ((after - before) * mask).sum(1) * correct
    change = groups.totals(gained) / groups.totals(correct.to(gained.dtype))
    return Displacement(change, change <= eps)


def token_report(pieces: Sequence[str], told: HiddenReward, row: int = 0) -> str:
    """One completion token by token: its hidden reward, a bar of its size, and a star where it is dominant.

    >>> print(token_report(tokenizer.convert_ids_to_tokens(tokens[0]), told))
    """
    values, dominant = told.thr[row, : len(pieces)].tolist(), told.is_dominant[row, : len(pieces)].tolist()
    largest = max((abs(value) for value in values), default=0.0) or 1.0
    lines = [
        f"{piece!r:>12} {value:+10.3g} {('+' if value > 0 else '-') * round(20 * abs(value) / largest)}{' *' * star}"
        for piece, value, star in zip(pieces, values, dominant, strict=True)
    ]
    return "\n".join(lines)


class TokenHiddenReward(Probe):
    """What training on held-out completions would do to the right ones among them, token by token.

    Args:
        rollout: The same completions at every look, several a prompt; of any causal model of Hugging Face's interface.
        correct: Which of them are right.

    Cost: one forward pass of the completions, and two unembeddings of them.

    >>> rollout = sample(model, prompts, num_samples=8, max_new_tokens=64, stop_token=tokenizer.eos_token_id)
    >>> dynascope.watch(model, optimizer, every=50, probes=[TokenHiddenReward(rollout, correct)])
    """

    name = "hidden_reward"
    needs = frozenset({Need.MODEL})
    default = False
    series = (
        Series(
            "thr/concentration",
            ("top",),
            description="Share of all |THR| that the strongest tokens hold, of prompts with right and wrong answers.",
            coords={"top": [f"{share:.0%}" for share in TOP]},
        ),
        Series(
            "thr/histogram",
            ("decade",),
            description="Share of tokens by the power of ten of their |THR|, from 1e-8 (and below) to 1e4.",
            coords={"decade": [f"1e{power}" for power in DECADES]},
        ),
        Series("thr/positive", description="Share of all |THR| of tokens that make right answers likelier."),
        Series("thr/entropy_overlap", description="Share of the strongest fifth that is in the most uncertain fifth."),
        Series("thr/shared", description="Share of wrong answers' tokens whose punishment hurts right ones above tau."),
        Series("thr/at_risk", description="Share of prompts whose right answers a step would make rarer."),
        Series("thr/log_prob", unit="nat", description="Mean log-probability of the right answers."),
        Series("thr/displacement", unit="nat", description="Its mean change over prompts since the last look."),
    )

    def __init__(self, rollout: Rollout, correct: Bool[Tensor, " N"]) -> None:
        self.rollout, self.correct = rollout, correct
        self._before: Tensor | None = None

    def measure(self, view: ModelView) -> Mapping[str, Tensor]:
        """One look at the completions."""
        rollout, correct = self.rollout, self.correct
        told = score(view.model, rollout, {"hidden", "unembedding", "entropy"})
        reward = token_hidden_reward(
            told["hidden"],
            rollout.tokens,
            rollout.mask,
            correct,
            rollout.group_ids,
            unembedding=told["unembedding"],
            temperature=rollout.temperature,
        )
        now, self._before, before = told["log_probs"], told["log_probs"], self._before
        sizes = reward.thr.abs()
        wrong = rollout.mask & ~correct[:, None]
        # Tokens of prompts that are all right or all wrong have no hidden reward, rather than a weak one.
        mixed = rollout.mask & reward.is_mixed[:, None]
        measured = {
            "thr/concentration": concentration(reward.thr, mixed),
            "thr/histogram": decades(reward.thr, mixed),
            "thr/positive": reward.thr.clamp(min=0).sum() / sizes.sum(),
            "thr/entropy_overlap": top_overlap(reward.thr, told["entropy"], mixed),
            "thr/shared": (wrong & (reward.thr < -reward.tau.clamp(min=0)[:, None])).sum() / wrong.sum(),
            "thr/at_risk": (gwhes(reward.influence, correct, rollout.group_ids) > 0).float().mean(),
            "thr/log_prob": (now * rollout.mask).sum(1)[correct].mean(),
        }
        if before is not None:
            displaced = likelihood_displacement(before, now, rollout.mask, correct, rollout.group_ids)
            measured["thr/displacement"] = displaced.change.nanmean()
        return measured


def decades(thr: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]) -> Float[Tensor, " decades"]:
    """Share of tokens by the power of ten of their |THR|; both ends hold what lies beyond them.

    >>> decades(told.thr, mask)
    """
    powers = thr[mask].abs().log10().floor().clamp(DECADES[0], DECADES[-1]) - DECADES[0]
    counts = powers.long().bincount(minlength=len(DECADES))
    return counts / counts.sum()
