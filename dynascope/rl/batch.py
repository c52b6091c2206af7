"""What a policy objective sees: one frozen batch of tensors, completions along N and their tokens along T."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

_BY_TOKEN = (
    "log_probs", "behaviour_log_probs", "sampling_log_probs", "ref_log_probs", "teacher_log_probs", "entropy", "values", "tokens",
    "token_rewards",
)  # fmt: skip
_BY_TOKEN_AND_MORE = ("hidden", "logits", "ref_logits", "teacher_logits")
_BY_COMPLETION = ("rewards", "group_ids", "correct", "is_solved", "is_truncated", "is_demonstration")


def per_token(values: Shaped[Tensor, " N"] | Shaped[Tensor, "N T"]) -> Shaped[Tensor, "N _"]:
    """Values of whole completions as a column, which broadcasts over their tokens; those of tokens as they are.

    >>> per_token(batch.advantage) * batch.mask
    """
    return values if values.ndim == 2 else values[:, None]


@dataclass(frozen=True, eq=False)
class PolicyBatch:
    """N completions of at most T tokens, and what is known of them. Only mask, rewards and group ids are always there.

    Log-probabilities are natural, of the sampled tokens, all at the sampling temperature. Nothing but `log_probs`,
    `logits` and `entropy` carries gradients. A completion without tokens (an all-False row of `mask`) counts in its
    group's statistics and adds nothing to a loss.

    Raises ValueError when shapes do not go together; `check()` looks at the values too.

    >>> PolicyBatch(mask=torch.ones(4, 3).bool(), rewards=torch.tensor([1.0, 0, 0, 1]), group_ids=torch.tensor([0, 0, 1, 1]))
    """

    mask: Tensor
    """(N, T), True at the completion's tokens, its end token included."""
    rewards: Tensor
    """(N,)"""
    group_ids: Tensor
    """(N,), integers: completions of one prompt share a number."""
    behaviour_log_probs: Tensor | None = None
    """(N, T), of the policy that sampled; None says that it is the current one (one optimizer step a rollout)."""
    sampling_log_probs: Tensor | None = None
    """(N, T), of the distribution that was really drawn from, where a sampler changed the policy's."""
    log_probs: Tensor | None = None
    """(N, T), of the policy that is trained."""
    advantage: Tensor | None = None
    """(N,) or (N, T)"""
    tokens: Tensor | None = None
    """(N, T), integers"""
    token_rewards: Tensor | None = None
    """(N, T), rewards that came token by token, any penalty taken off; `rewards` are their sums."""
    ref_log_probs: Tensor | None = None
    """(N, T), of the model that training started from."""
    teacher_log_probs: Tensor | None = None
    """(N, T)"""
    entropy: Tensor | None = None
    """(N, T), of the whole next-token distribution, in nats."""
    values: Tensor | None = None
    """(N, T), a critic's estimate before each token."""
    hidden: Tensor | None = None
    """(N, T, width), inputs of the unembedding that predict each token."""
    unembedding: Tensor | None = None
    """(vocabulary, width)"""
    logits: Tensor | None = None
    """(N, T, vocabulary)"""
    ref_logits: Tensor | None = None
    teacher_logits: Tensor | None = None
    correct: Tensor | None = None
    """(N,), bool: whether the answer is right, whatever the reward was made of."""
    is_solved: Tensor | None = None
    """(N,), bool: whether the completion's prompt has a right answer, in this rollout."""
    is_truncated: Tensor | None = None
    """(N,), bool: whether the completion ended at the length limit."""
    is_demonstration: Tensor | None = None
    """(N,), bool: whether the completion was given, not sampled."""
    max_length: int | None = None
    """The length limit in tokens."""
    temperature: float = 1.0
    """At which completions were sampled; `hidden` times `unembedding`, over this, are the logits."""
    num_tokens: int | Tensor | None = None
    """Tokens of the whole optimizer step, over all its micro-batches and ranks; None says that this batch is all of it."""
    num_completions: int | Tensor | None = None
    """Completions of the whole optimizer step, likewise."""
    num_kept: tuple[int | Tensor | None, ...] | None = None
    """Tokens of the whole optimizer step that each KL term with `norm="kept"` keeps (`PolicyObjective.num_kept`), likewise."""
    step: int = 0
    """The training step, for coefficients that have a schedule."""

    def __post_init__(self) -> None:
        if self.mask.ndim != 2 or self.mask.dtype != torch.bool:
            raise ValueError(
                f"mask must be bool of shape (N, T), not {self.mask.dtype} of shape {tuple(self.mask.shape)}; "
                "use mask.bool()"
            )
        by_token, by_completion = self.mask.shape, self.mask.shape[:1]
        for names, expected, end in (
            (_BY_TOKEN, by_token, None),
            (_BY_TOKEN_AND_MORE, by_token, -1),
            (_BY_COMPLETION, by_completion, None),
        ):
            for name in names:
                value = getattr(self, name)
                if value is not None and value.shape[:end] != expected:
                    raise ValueError(f"{name} has shape {tuple(value.shape)}, but mask says {tuple(expected)}")
        if self.advantage is not None and self.advantage.shape not in (self.mask.shape[:1], self.mask.shape):
            num, width = self.mask.shape
            raise ValueError(f"advantage must be ({num},) or ({num}, {width}), not {tuple(self.advantage.shape)}")

    def __len__(self) -> int:
        return self.mask.shape[0]

    def check(self) -> "PolicyBatch":
        """This batch, after a look at its values; on a GPU this waits for the device, so do it once a rollout.

        Raises ValueError for a batch without any token, for rewards that are not finite, and for log-probabilities,
        values, entropies or hidden states that are not finite at a token of a completion.
        """
        if not bool(self.mask.any()):
            raise ValueError("mask is False everywhere: no completion has a token, so there is nothing to learn from")
        finite = self.rewards.isfinite()
        if not bool(finite.all()):
            bad = (~finite).nonzero().flatten().tolist()
            raise ValueError(
                f"rewards of completions {bad[:5]} are not finite; mend the reward, or drop them: select()"
            )
        for name in (
            "log_probs",
            "behaviour_log_probs",
            "ref_log_probs",
            "teacher_log_probs",
            "entropy",
            "values",
            "hidden",
        ):
            value = getattr(self, name)
            if value is None:
                continue
            is_bad = ~value.isfinite()
            is_bad = is_bad.any(2) if name == "hidden" else is_bad
            bad = (is_bad & self.mask).any(1).nonzero().flatten().tolist()
            if bad:
                raise ValueError(
                    f"{name} of completions {bad[:5]} are not finite at tokens that count; "
                    "floor them, or drop the completions: select()"
                )
        return self

    def require(self, names: Iterable[str], what: str) -> None:
        """Raises ValueError that says which of these fields are missing for `what`."""
        missing = sorted(name for name in names if getattr(self, name) is None)
        if missing:
            whence = "; train(mix=DemonstrationsInGroups(…)) brings it" if missing == ["is_demonstration"] else ""
            raise ValueError(f"{what} needs {', '.join(missing)}, which the batch does not have{whence}")

    def having(self, **changes: Any) -> "PolicyBatch":
        """The same batch with some fields changed.

        >>> batch.having(log_probs=log_probs)
        """
        return replace(self, **changes)

    def select(self, rows: Shaped[Tensor, " rows"]) -> "PolicyBatch":
        """Some of the completions, by numbers or by a boolean mask. `num_tokens` and `num_completions` stay as they are.

        >>> batch.select(batch.rewards > 0)
        """
        kept = {}
        for field in fields(self):
            value = getattr(self, field.name)
            is_per_row = isinstance(value, Tensor) and value.ndim > 0 and field.name != "unembedding"
            kept[field.name] = value[rows] if is_per_row else value
        return PolicyBatch(**kept)

    def split(self, size: int, generator: torch.Generator | None = None) -> Iterator[Int[Tensor, " rows"]]:
        """Row numbers of minibatches of at most `size` completions, shuffled when a generator is given.

        Raises ValueError for a size below 1.

        >>> [rows.tolist() for rows in batch.split(3)]
        [[0, 1, 2], [3]]
        """
        if size < 1:
            raise ValueError(f"minibatches of {size} completions: at least 1 is needed")
        num = len(self)
        order = torch.arange(num) if generator is None else torch.randperm(num, generator=generator)
        yield from order.to(self.mask.device).split(size)
