"""Teachers for distillation on a policy's own samples: how they are asked, what they say, and whether it arrives (2506.02208)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dynascope.rl.batch import PolicyBatch
from dynascope.rl.distillation import teacher_credit
from dynascope.rl.hidden import completion_hidden
from dynascope.rl.kl import KLTerm, kl_estimate
from dynascope.rl.logits import completion_logits
from dynascope.rl.objective import PolicyObjective
from dynascope.rl.rollout import Rollout, score

LOWEST = -20.0
"""R of a token that a teacher does not list, in nats."""
SAME = 1e-4
"""Nats by which a teacher must differ from the policy at some token, to count as another one."""


@runtime_checkable
class Teacher(Protocol):
    """Whoever knows log-probabilities of sampled tokens: a model here (`TeacherScorer`), or a server."""

    @property
    def size(self) -> int:
        """Of the vocabulary, which must be the policy's."""

    def __call__(self, rollout: Rollout, rows: Bool[Tensor, " N"] | None = None) -> Float[Tensor, "N T"]:
        """At the rollout's temperature. Completions that are not in `rows` are not looked at."""


def listed(
    tokens: Int[Tensor, "N T"], ids: Int[Tensor, "N T K"], log_probs: Float[Tensor, "N T K"]
) -> Float[Tensor, "N T"]:
    """The log-probabilities of sampled tokens from a teacher that lists its K likeliest at each place; −inf for others.

    >>> listed(torch.tensor([[3, 1]]), torch.tensor([[[3, 2], [2, 3]]]), torch.tensor([[[-0.1, -3.0], [-0.2, -2.0]]]))
    tensor([[-0.1000,    -inf]])
    """
    is_it = ids == tokens[..., None]
    return log_probs.masked_fill(~is_it, -torch.inf).amax(-1)


def floored(
    teacher_log_probs: Float[Tensor, "N T"],
    log_probs: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    *,
    lowest: float = LOWEST,
) -> tuple[Float[Tensor, "N T"], Int[Tensor, ""]]:
    """A teacher's log-probabilities with R held at `lowest` from below, and how many tokens that took.

    For teachers that answer −inf, as servers do that list their likeliest tokens alone (`listed`).

    >>> teacher_log_probs, count = floored(teacher_log_probs, behaviour_log_probs, mask)
    """
    least = log_probs.float() + lowest
    is_below = (teacher_log_probs.float() < least) & mask
    return torch.where(is_below, least, teacher_log_probs.float()), is_below.sum()


@dataclass(frozen=True, eq=False)
class TeacherScorer:
    """A teacher's log-probabilities of sampled tokens, a few completions at a time, so that few logits are held.

    Args:
        model: Frozen by whoever made it; it is asked in evaluation mode and without a gradient.
        micro_batch: Completions at a time.
        vocabulary: Only these first tokens count, where the teacher's table is padded to more than the policy's.
        top_k: It lists no more than its likeliest tokens, as many servers do; the others are `floored`.
        chunk: Tokens whose logits exist at a time; None holds those of a whole micro-batch. Not for models that change their
            logits behind the head.
        tokenizer: Of the teacher, of Hugging Face's interface, for `check_tokenizer`.

    Raises ValueError for a micro_batch, top_k or chunk below 1.

    >>> train(model, preset("kdrl"), task, optimizer, generator=generator, teacher=TeacherScorer(teacher, micro_batch=8))
    """

    model: nn.Module
    micro_batch: int = 64
    vocabulary: int | None = None
    top_k: int | None = None
    chunk: int | None = None
    tokenizer: Any = None

    def __post_init__(self) -> None:
        if min(one for one in (self.micro_batch, self.top_k, self.chunk) if one is not None) < 1:
            raise ValueError(
                f"micro_batch={self.micro_batch}, top_k={self.top_k} and chunk={self.chunk} must be at least 1"
            )

    @property
    def size(self) -> int:
        """Of the vocabulary that counts."""
        return self.vocabulary or len(self.model.get_output_embeddings().weight)  # type: ignore[operator]

    @torch.no_grad()
    def __call__(self, rollout: Rollout, rows: Bool[Tensor, " N"] | None = None) -> Float[Tensor, "N T"]:
        """At the rollout's temperature, in float32. Completions that are not in `rows` keep the policy's own."""
        told = rollout.behaviour_log_probs.float().clone()
        places = torch.arange(len(rollout)) if rows is None else rows.nonzero().flatten()
        with self._frozen():
            # Of no completion at all, split() would make one part.
            for some in places.split(self.micro_batch) if len(places) else ():
                part = rollout.select(some)
                pieces = zip(self._logits(part), part.tokens.flatten().split(self._piece(part)), strict=True)
                log_probs = torch.cat([self._of(logits, tokens) for logits, tokens in pieces])
                log_probs = log_probs.view_as(part.tokens)
                if self.top_k is not None:
                    log_probs = floored(log_probs, part.behaviour_log_probs, part.mask)[0]
                told[some] = log_probs.masked_fill(~part.mask, 0.0)
        return told

    @torch.no_grad()
    def logits(self, rollout: Rollout) -> Float[Tensor, "N T vocabulary"]:
        """The whole distributions at the rollout's temperature, cut to `size` tokens: what kind="full" compares with.

        >>> TeacherScorer(teacher, vocabulary=len(tokenizer)).logits(rollout)
        """
        with self._frozen():
            parts = [rollout.select(some) for some in torch.arange(len(rollout)).split(self.micro_batch)]
            return torch.cat([torch.cat(list(self._logits(one))).view(*one.tokens.shape, -1) for one in parts])

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)

    def _piece(self, part: Rollout) -> int:
        return part.tokens.numel() if self.chunk is None else self.chunk

    def _logits(self, part: Rollout) -> Iterator[Tensor]:
        """Float32, at the temperature, of so many tokens at a time."""
        asked = self.model, part.prompts, part.prompt_mask, part.tokens
        if self.chunk is None:
            yield completion_logits(*asked).flatten(0, 1)[:, : self.size].float() / part.temperature
            return
        head: nn.Module = self.model.get_output_embeddings()  # type: ignore[operator]
        for hidden in completion_hidden(*asked).flatten(0, 1).split(self.chunk):
            yield head(hidden)[:, : self.size].float() / part.temperature

    def _of(self, logits: Tensor, tokens: Tensor) -> Tensor:
        if self.top_k is None:
            own = logits.gather(-1, tokens[:, None])[:, 0]
        else:
            scores, ids = logits.topk(min(self.top_k, self.size), -1)
            own = listed(tokens[None], ids[None], scores[None])[0]
        return own - logits.logsumexp(-1)


GAPS = (-20.0, -10.0, -5.0, -2.0, -1.0, -0.5, -0.1, 0.1, 0.5, 1.0, 2.0, 5.0)
"""Edges of the histogram of R, in nats."""
GAP_NAMES = (*(f"below {edge:g}" for edge in GAPS), f"above {GAPS[-1]:g}")


def gap_shares(gap: Float[Tensor, " tokens"]) -> Float[Tensor, " gaps"]:
    """Share of tokens with R below, between and above `GAPS`.

    >>> dict(zip(GAP_NAMES, gap_shares(gap).tolist()))
    """
    counts = torch.bucketize(gap, gap.new_tensor(GAPS)).bincount(minlength=len(GAP_NAMES))
    return counts / counts.sum()


def watch_teacher(batch: PolicyBatch) -> dict[str, Tensor]:
    """What a rollout says of the teacher, without a further pass.

    - `teacher/gap_histogram`: as `gap_shares`.
    - `teacher/kl`: mean of −R, an unbiased estimate of KL(π ‖ teacher) a token, in nats; of right and of wrong completions
      `teacher/kl_right`, `teacher/kl_wrong`.
    - `teacher/gap_max`: the largest |R|: beyond 10, clamp.
    - `teacher/floored`: share of tokens with R at `LOWEST` or below: those that the teacher does not list.
    - `rollout/tokens_per_right`: all tokens over right completions; infinite where none is right.

    Where no completion is right `teacher/kl_right` is NaN, and where all are `teacher/kl_wrong`.

    >>> watch_teacher(step.batch)["teacher/gap_max"]
    """
    assert batch.behaviour_log_probs is not None
    assert batch.teacher_log_probs is not None
    assert batch.correct is not None
    gap = teacher_credit(batch.behaviour_log_probs, batch.teacher_log_probs, batch.mask)
    own = gap[batch.mask]
    right = batch.correct[:, None] & batch.mask
    return {
        "teacher/gap_histogram": gap_shares(own),
        "teacher/kl": -own.mean(),
        "teacher/kl_right": -gap[right].mean(),
        "teacher/kl_wrong": -gap[batch.mask & ~right].mean(),
        "teacher/gap_max": own.abs().max(),
        "teacher/floored": (own <= LOWEST + SAME).float().mean(),
        "rollout/tokens_per_right": batch.mask.sum() / batch.correct.sum(),
    }


def gradient_cosine(
    model: nn.Module, losses: Sequence[Callable[[], Tensor]]
) -> tuple[Float[Tensor, ""], Float[Tensor, " losses"]]:
    """Cosine of the gradients of two losses, and the norm of each: do reward and teacher pull the same way, and how hard?

    A norm of 0 for the distillation loss on the first step says that no teacher arrived. Two backward passes.

    >>> reward, teacher = objective.having(kl=()), objective.having(policy_weight=0.0)
    >>> gradient_cosine(model, [lambda: reward.loss(batch())[0], lambda: teacher.loss(batch())[0]])
    """
    parameters = [one for one in model.parameters() if one.requires_grad]
    flat: list[Any] = []
    for loss in losses:
        gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
        flat.append(
            torch.cat(
                [
                    torch.zeros_like(parameter).flatten() if gradient is None else gradient.flatten()
                    for parameter, gradient in zip(parameters, gradients, strict=True)
                ]
            )
        )
    return torch.nn.functional.cosine_similarity(flat[0], flat[1], dim=0), torch.stack([one.norm() for one in flat])


@torch.no_grad()
def exact_teacher_kl(
    model: nn.Module, teacher: TeacherScorer, rollout: Rollout, *, top: int | None = None
) -> Float[Tensor, "N T"]:
    """KL(π ‖ teacher) at every token of completions, summed over the vocabulary, in nats; padding is 0.

    What `teacher/kl` estimates from single samples. Both models' logits are held for `teacher.micro_batch` completions at
    a time; hand over a few completions, as `rollout.select(torch.arange(16))`. `top` as in `kl_estimate`. Raises ValueError for
    another vocabulary.

    >>> exact_teacher_kl(model, TeacherScorer(teacher), rollout)[rollout.mask].mean()
    """
    check_vocabulary(model, teacher)
    told = torch.zeros_like(rollout.behaviour_log_probs, dtype=torch.float32)
    for rows in torch.arange(len(rollout), device=told.device).split(teacher.micro_batch):
        part = rollout.select(rows)
        own, other = (score(one, part, {"logits"})["logits"][..., : teacher.size] for one in (model, teacher.model))
        unused = torch.zeros_like(part.behaviour_log_probs)
        by_token = kl_estimate(unused, unused, "full", logits=own, ref_logits=other, top=top)
        told[rows] = by_token.masked_fill(~part.mask, 0.0)
    return told


def check_vocabulary(model: nn.Module, other: object, name: str = "teacher") -> None:
    """Raises ValueError where a teacher or start model knows another number of tokens than the policy, or is none.

    >>> check_vocabulary(model, TeacherScorer(teacher, vocabulary=len(tokenizer)))
    """
    known = TeacherScorer(other) if isinstance(other, nn.Module) else other
    if not isinstance(known, Teacher):
        raise ValueError(
            f"a {name} is a model, or knows log-probabilities as a Teacher does, not {type(other).__name__}"
        )
    own = TeacherScorer(model).size
    if own != known.size:
        raise ValueError(
            f"the {name} has a vocabulary of {known.size} tokens and the policy one of {own}; they must share it"
        )


def check_tokenizer(own: Any, teacher: Any) -> None:
    """Raises ValueError where two tokenizers of Hugging Face's interface give one text other numbers; None is not compared.

    Tables of one size may still name other tokens, which `check_vocabulary` cannot see.

    >>> check_tokenizer(task.tokenizer, scorer.tokenizer)
    """
    if own is None or teacher is None:
        return
    known, other = own.get_vocab(), teacher.get_vocab()
    different = sorted(token for token in known.keys() | other.keys() if known.get(token) != other.get(token))
    if different:
        token = different[0]
        raise ValueError(
            f"teacher and policy name {len(different)} tokens differently: {token!r} is number {other.get(token)} for the "
            f"teacher and {known.get(token)} for the policy; they must share a tokenizer"
        )


def check_teacher(objective: PolicyObjective, batch: PolicyBatch) -> bool:
    """Whether a teacher does teach, from the first batch in which a token is kept for it (then True).

    `batch` has what the loss needs, `log_probs` of the policy now among it. A KL term teaches where it has a gradient, another
    slot where R is not 0. Terms whose coefficient is 0 are left out, and an objective without a teacher has nothing to check.

    Raises ValueError where a teacher teaches nothing although tokens are kept: it says what the policy says, because a field
    was lost on its way, or the teacher is the policy.

    >>> check_teacher(objective, batch.having(**score(model, rollout)))
    """
    terms = [term for term in objective.kl if term.against == "teacher" and term.weight(batch.step) != 0]
    if not terms and not objective.is_shaped_by_teacher:
        return True
    kept = [term.kept(batch) for term in terms] + [None] * objective.is_shaped_by_teacher
    if not any(bool((batch.mask if one is None else (one > 0) & batch.mask).any()) for one in kept):
        return False
    largest = _largest_gradient(terms, batch) if terms else 0.0
    if objective.is_shaped_by_teacher:
        batch.require(("log_probs", "teacher_log_probs"), "this objective's teacher")
        assert batch.log_probs is not None
        assert batch.teacher_log_probs is not None
        largest = max(largest, float(teacher_credit(batch.log_probs, batch.teacher_log_probs, batch.mask).abs().max()))
    if largest < SAME:
        raise ValueError(
            "distillation does nothing: it has no gradient, as teacher and policy give the sampled tokens the same "
            "log-probabilities; is teacher= another model, and do its teacher_log_probs reach the batch?"
        )
    return True


def _largest_gradient(terms: Sequence[KLTerm], batch: PolicyBatch) -> float:
    """Of the terms at a token, at coefficient 1 and without the token's weight in a mean: |R|, or |1 − eᴿ|."""
    alone = PolicyObjective(
        policy_weight=0.0,
        clip=(None, None),
        kl=tuple(replace(term, coefficient=1.0) for term in terms),
        aggregation="token-mean",
    )
    names = [name for name in ("log_probs", "logits") if getattr(batch, name) is not None]
    leaves = {name: getattr(batch, name).detach().requires_grad_() for name in names}
    plain = {"num_tokens": None, "num_kept": None, "advantage": torch.zeros_like(batch.rewards)}
    with torch.enable_grad():
        loss, _ = alone.loss(batch.having(**leaves, **plain))
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return max(float(one.abs().max()) for one in gradients if one is not None) * int(batch.mask.sum())
