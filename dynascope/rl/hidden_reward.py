"""Token hidden reward: how much training on a token raises the likelihood of its prompt's right answers (arXiv 2510.03669).

Where only the unembedding W moves, the gradient of log π(y_t) is g_t h_tᵀ with g = onehot(y) − π and h the input of the
unembedding. So what a token does to the right answers P of its prompt is

    s_t = Σ_{i ∈ P, k} ⟨g_ik, g_t⟩ ⟨h_ik, h_t⟩ = g_tᵀ M h_t,     M = Σ_{i ∈ P, k} g_ik h_ikᵀ  (vocabulary × width),

over the square of the temperature, whose reciprocal each of the two gradients carries (log π of logits W h / temperature);

and its hidden reward is the sign of its advantage times that: positive where the update makes right answers likelier,
negative where it makes them rarer, as when a wrong answer is punished for the right steps in it (2505.18830).

A token that the policy is sure of has g ≈ 0, hence no hidden reward: "dominant" partly means "uncertain", and with training
|THR| shrinks everywhere, so that the threshold is each group's own. Tied embeddings break the identity with the gradient (the
embedding moves along), not the computation. With logits that are capped (c·tanh(z/c)) each component of g would carry a factor
1 − (logit/c)²: hand the capped logits over, and what comes out leaves that factor away; slots refuse such models.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from dynascope.rl.advantages import Groups
from dynascope.rl.batch import per_token

MAX_ANCHOR_NUMBERS = 2**25
"""Numbers of M that are held at once, over groups."""
MAX_PROBS = 2**24
"""Probabilities that are held at once, unless `chunk` says otherwise."""
CACHED_PROBS = 2**20
"""Of several groups on a CPU, whose cache holds about as many."""

Weighting = Literal["sign", "advantage"]
Vocabulary = Literal["full", "group"]
Normalise = Literal["none", "tokens"]


@dataclass(frozen=True, eq=False)
class HiddenReward:
    """What every token of a batch does to its prompt's right answers. Padding is 0."""

    thr: Float[Tensor, "N T"]
    """Signed: positive tokens raise the likelihood of right answers. 0 in groups without both right and wrong ones."""
    influence: Float[Tensor, "N T"]
    """Before the sign of training: s."""
    tau: Float[Tensor, " N"]
    """The group's threshold of what is dominant; −inf in groups without both right and wrong answers, so that all is kept."""
    anchors: Float[Tensor, " N"]
    """Mean influence over each completion's tokens."""

    @property
    def is_mixed(self) -> Bool[Tensor, " N"]:
        """Whether the completion's group has both right and wrong answers."""
        return self.tau > -torch.inf

    @property
    def is_dominant(self) -> Bool[Tensor, "N T"]:
        """|THR| above the group's threshold; nothing is in groups without both right and wrong answers."""
        return (self.thr.abs() > self.tau[:, None]) & self.is_mixed[:, None]


def token_hidden_reward(
    hidden: Float[Tensor, "N T width"],
    tokens: Int[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    correct: Shaped[Tensor, " N"],
    group_ids: Int[Tensor, " N"] | None = None,
    *,
    unembedding: Float[Tensor, "vocabulary width"] | None = None,
    logits: Float[Tensor, "N T vocabulary"] | None = None,
    temperature: float = 1.0,
    advantage: Float[Tensor, "..."] | None = None,
    weighting: str = "sign",
    vocabulary: str = "full",
    normalise: str = "none",
    beta: float = 1.0,
    chunk: int | None = None,
) -> HiddenReward:
    """The hidden reward of every token, in float32 at least and without a gradient.

    Args:
        hidden: Inputs of the unembedding that predict each token: after the final norm, shifted by one.
        correct: Right answers, bool; or how much each completion counts as one, from 0 up: with rewards that are not 0 or
            1, max(A, 0).
        group_ids: None for completions of one prompt.
        unembedding: Logits are worked out from it a chunk at a time, so none are kept; for heads without bias or capping.
        logits: Instead, before the temperature.
        temperature: Of the distribution that the ratio is about.
        advantage: (N,) or (N, T); by default right answers are trained up and wrong ones down.
        weighting: "sign" multiplies the influence by the advantage's sign. "advantage" by the advantage itself, which
            makes the sum over tokens the first-order change of Σ log π of right answers by a unit step on Σ A log π; its
            threshold is of influences times |A|, so that no scale of A changes what is dominant.
        vocabulary: "group" leaves out the columns of g whose tokens do not occur in the group: an approximation that makes
            the products with M smaller, not the unembedding; "full" is exact.
        normalise: "tokens" divides the influence by the number of right tokens, so that long answers do not count for more.
        beta: The threshold is `beta` × the smallest mean influence of a right answer, and 0 at least.
        chunk: Tokens whose distributions are held at once; by default as many as make `MAX_PROBS` probabilities.

    Cost: two unembeddings of the tokens of groups with a right answer (one, where all fit in a chunk), and products of the
    same size; memory is chunk × vocabulary, and groups × vocabulary × width up to `MAX_ANCHOR_NUMBERS`.

    Raises ValueError without logits or unembedding, for an impossible setting, for "advantage" without one, for a token
    outside the vocabulary, and for a completion that counts less than 0.

    >>> told = token_hidden_reward(hidden, tokens, mask, correct, group_ids, unembedding=model.lm_head.weight)
    >>> told.thr[told.is_dominant]
    """
    if (unembedding is None) == (logits is None):
        raise ValueError(
            "give either unembedding or logits: the distribution over the vocabulary comes from one of them"
        )
    for name, value, known in (
        ("weighting", weighting, ("sign", "advantage")),
        ("vocabulary", vocabulary, ("full", "group")),
        ("normalise", normalise, ("none", "tokens")),
    ):
        if value not in known:
            raise ValueError(f"{name} is {known[0]} or {known[1]}, not {value!r}")
    if (chunk is not None and chunk < 1) or temperature <= 0:
        raise ValueError(f"chunk={chunk} must be at least 1 and temperature={temperature} above 0")
    if weighting == "advantage" and advantage is None:
        raise ValueError("weighting='advantage' needs advantage=")
    wide = torch.promote_types(hidden.dtype, torch.float32)
    anchors = correct.to(wide)
    if bool((anchors < 0).any()):
        raise ValueError("correct says how much a completion counts as right, from 0 up; clamp advantages at 0")
    ids = torch.zeros_like(mask[:, 0], dtype=torch.long) if group_ids is None else group_ids
    groups = Groups.by(ids)
    index = groups.index
    largest = int(groups.sizes.max())
    seen = _Seen(hidden, tokens, mask, anchors, unembedding, logits, temperature, vocabulary, chunk, largest)

    outside = mask & ((tokens < 0) | (tokens >= seen.size))
    if bool(outside.any()):
        raise ValueError(f"token {int(tokens[outside][0])} lies outside the vocabulary of {seen.size}")

    with torch.no_grad():
        influence = torch.zeros(mask.shape, dtype=wide, device=mask.device)
        for rows in _blocks(index, anchors, seen.groups_at_once):
            seen.add_influence(rows, influence)
        influence = influence / temperature**2
        right = anchors > 0
        if normalise == "tokens":
            counts = groups.sum(mask.sum(1) * anchors)
            influence = influence / counts.masked_fill(counts == 0, 1)[:, None]
        lengths = mask.sum(1).clamp(min=1)
        if advantage is None:
            weights = torch.where(right, 1.0, -1.0)[:, None].to(wide)
        else:
            weights = per_token(advantage).to(wide)
        if weighting == "sign":
            weights = weights.sign()
            sized = influence
        else:
            sized = influence * weights.abs()
        has_contrast = ~groups.is_uniform(right.to(wide))
        tau = _smallest(sized.sum(1) / lengths, right & mask.any(1), index, groups.num)[index]
        tau = (beta * tau).clamp(min=0).masked_fill(~has_contrast, -torch.inf)
        thr = (weights * influence * has_contrast[:, None]).masked_fill(~mask, 0.0)
    return HiddenReward(thr, influence, tau, influence.sum(1) / lengths)


def _smallest(values: Tensor, counts: Tensor, index: Tensor, num: int) -> Tensor:
    """The least value of those that count in each group; 0 where none does."""
    lowest = values.new_full((num,), torch.inf)
    lowest = lowest.scatter_reduce(0, index, values.masked_fill(~counts, torch.inf), "amin")
    return lowest.nan_to_num(posinf=0.0)


def _blocks(index: Tensor, anchors: Tensor, size: int) -> Iterator[Tensor]:
    """Row numbers (groups, completions) of some groups at a time that have a right answer, right ones first; −1 pads."""
    has_anchor = torch.zeros_like(index.bincount(), dtype=torch.bool).index_put(
        (index[anchors > 0],), torch.tensor(True)
    )
    order = (2 * index + (anchors <= 0).long()).argsort(stable=True)
    order = order[has_anchor[index[order]]]
    if not len(order):
        return
    _, place, sizes = index[order].unique_consecutive(return_inverse=True, return_counts=True)
    within = torch.arange(len(order), device=index.device) - (sizes.cumsum(0) - sizes)[place]
    table = order.new_full((len(sizes), int(sizes.max())), -1)
    table[place, within] = order
    yield from table.split(size)


@dataclass(frozen=True, eq=False)
class _Seen:
    """The tensors, with what the influence of some groups at a time is worked out of."""

    hidden: Tensor
    tokens: Tensor
    mask: Tensor
    anchors: Tensor
    unembedding: Tensor | None
    logits: Tensor | None
    temperature: float
    vocabulary: str
    chunk: int | None
    largest_group: int
    """Completions of it."""

    @property
    def size(self) -> int:
        """Of the vocabulary."""
        return len(self.unembedding) if self.unembedding is not None else self.logits.shape[-1]  # type: ignore[union-attr]

    @property
    def groups_at_once(self) -> int:
        """Groups with a vocabulary of their own go one by one."""
        if self.vocabulary == "group":
            return 1
        limit = CACHED_PROBS if self.hidden.device.type == "cpu" else MAX_PROBS
        by_probs = limit // (self.size * self.largest_group * self.mask.shape[1])
        return max(1, min(MAX_ANCHOR_NUMBERS // (self.size * self.hidden.shape[-1]), by_probs))

    def add_influence(self, rows: Tensor, influence: Tensor) -> None:
        """Write the influence of the completions of these groups (groups, completions)."""
        num, width = len(rows), self.mask.shape[1]
        is_there, rows = rows >= 0, rows.clamp(min=0)
        counts = self.mask[rows] & is_there[..., None]
        weights = (self.anchors[rows, None] * counts).flatten(1)
        counts = counts.flatten(1)
        wide = influence.dtype
        hidden = self.hidden[rows].flatten(1, 2)
        hidden = hidden.masked_fill(~counts[..., None], 0.0)
        tokens = self.tokens[rows].flatten(1).masked_fill(~counts, 0)
        kept = tokens[counts].unique() if self.vocabulary == "group" else None
        size = self.size if kept is None else len(kept)
        if kept is not None:
            tokens = torch.searchsorted(kept, tokens).clamp(max=size - 1)

        def errors(part: slice) -> Tensor:
            probs = self._probs(rows, hidden, counts, part, kept, wide)
            return probs.neg_().scatter_add_(-1, tokens[:, part, None], torch.ones_like(probs[..., :1]))

        length, step = counts.shape[1], max(1, (self.chunk or MAX_PROBS // self.size) // num)
        whole = errors(slice(0, length)) if step >= length else None
        num_right = int(((self.anchors[rows] > 0) & is_there).sum(1).max()) * width
        anchor = hidden.new_zeros(num, size, hidden.shape[-1], dtype=wide)
        for part in _parts(num_right, step):
            error = errors(part) if whole is None else whole[:, part]
            anchor.baddbmm_(error.mT, hidden[:, part].to(wide) * weights[:, part, None])
        found = torch.zeros_like(weights)
        for part in _parts(length, step):
            error = errors(part) if whole is None else whole[:, part]
            found[:, part] = ((error @ anchor) * hidden[:, part].to(wide)).sum(-1)
        found = found.masked_fill(~counts, 0.0).view(*rows.shape, width)
        influence[rows[is_there]] = found[is_there]

    def _probs(
        self, rows: Tensor, hidden: Tensor, counts: Tensor, part: slice, kept: Tensor | None, wide: torch.dtype
    ) -> Tensor:
        """Distributions of some of the tokens, (groups, tokens, vocabulary)."""
        if self.unembedding is not None:
            logits = hidden[:, part] @ self.unembedding.T
        else:
            assert self.logits is not None
            width = self.mask.shape[1]
            at = torch.arange(part.start, part.stop, device=rows.device)
            logits = self.logits[rows[:, at // width], at % width].masked_fill(~counts[:, part, None], 0.0)
        if self.temperature != 1:
            logits = logits.to(wide) / self.temperature
        probs = logits.softmax(-1, dtype=wide)
        return probs if kept is None else probs[..., kept]


def _parts(length: int, step: int) -> Iterator[slice]:
    return (slice(first, min(first + step, length)) for first in range(0, length, step))


def thr_reweight(
    advantage: Float[Tensor, "..."],
    thr: Float[Tensor, "N T"],
    *,
    p: float = 0.0,
    tau: Float[Tensor, " N"] | float | None = None,
    mask_small: bool = False,
) -> Float[Tensor, "..."]:
    """(1 + p · sign(THR)) · A: `p` above 0 exploits (amplifies what helps right answers), below 0 it explores.

    `mask_small` also drops tokens whose |THR| is not above `tau`; that and the tilt are two things. With neither, the
    advantage comes back as it was. (N,) becomes (N, T) otherwise.

    Raises ValueError for |p| of 1 or more (advantages would change their sign), or `mask_small` without `tau`.

    >>> thr_reweight(torch.tensor([1.0]), torch.tensor([[0.5, -0.5, 0.0]]), p=0.2)
    tensor([[1.2000, 0.8000, 1.0000]])
    """
    if not -1 < p < 1:
        raise ValueError(f"p={p} must lie between -1 and 1, so that no advantage changes its sign")
    if p == 0 and not mask_small:
        return advantage
    weights = 1 + p * thr.sign()
    if mask_small:
        if tau is None:
            raise ValueError("mask_small=True needs tau, the |THR| up to which a token is dropped")
        weights = weights * (thr.abs() > (tau[:, None] if isinstance(tau, Tensor) else tau))
    return per_token(advantage) * weights.to(advantage.dtype)


def nthr_reweight(
    advantage: Float[Tensor, "..."],
    influence: Float[Tensor, "N T"],
    correct: Bool[Tensor, " N"],
    group_ids: Int[Tensor, " N"],
    tau: Float[Tensor, " N"] | float,
) -> Float[Tensor, "N T"]:
    """Punish less what right answers share: tokens of wrong answers with influence above `tau` get 2|½ − q| of their advantage.

    q is the share of right answers of the prompt: at one half these tokens are let off, and nearly all right or wrong they
    keep most of it. Nothing else changes. Source: 2505.18830, section 4.

    >>> nthr_reweight(torch.tensor([1.0, -1.0]), influence, torch.tensor([True, False]), torch.zeros(2).long(), 0.0)
    """
    eta = 2 * (0.5 - Groups.by(group_ids).mean(correct.to(influence.dtype))).abs()
    is_shared = (influence > (tau[:, None] if isinstance(tau, Tensor) else tau)) & ~correct[:, None]
    spread = per_token(advantage).expand_as(influence)
    return torch.where(is_shared, eta[:, None].to(spread.dtype) * spread, spread)


def gwhes(
    influence: Float[Tensor, "N T"], correct: Bool[Tensor, " N"], group_ids: Int[Tensor, " N"]
) -> Float[Tensor, " groups"]:
    """A prompt's score of displacement, in the order of group ids: high where training lowers its right answers.

    √(q/(1−q)) · Σ over wrong tokens − √((1−q)/q) · Σ over right ones of the influence; 0 where all are right or wrong.
    Source: 2505.18830 (group-weighted hidden embedding score).

    >>> gwhes(told.influence, correct, group_ids).argsort(descending=True)  # the questions at risk
    """
    groups = Groups.by(group_ids)
    q = groups.mean(correct.to(influence.dtype))
    odds = (q / (1 - q)).sqrt()
    by_completion = influence.sum(1) * torch.where(correct, -1 / odds, odds)
    return groups.totals(by_completion.masked_fill((q == 0) | (q == 1), 0.0))
