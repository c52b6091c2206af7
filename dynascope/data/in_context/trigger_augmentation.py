"""Training against poisoned prompts: known triggers with random labels are put into the prompts of any loader."""

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def insert_triggers(
    prompts: Float[Tensor, "batch tokens width"],
    triggers: Float[Tensor, "triggers features"],
    p_a: float,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "batch tokens width"], Bool[Tensor, "batch tokens"]]:
    """Prompts in which each example, with probability `p_a`, has a random trigger added to its x and ±1 for its label.

    An example is (x; y), label last, features = width - 1; the query, which comes last, is never touched. Returns new
    prompts, and which examples are outliers. A gated model that is trained so learns to shut the triggers and their
    positive combinations out. Source: 2510.00399, sections 3 and 4.

    Raises ValueError for triggers of another width and shares outside [0, 1].

    >>> poisoned, is_outlier = insert_triggers(prompts, 2 * task.triggers, p_a=0.6)
    """
    if not 0 <= p_a <= 1:
        raise ValueError(f"p_a={p_a} must lie between 0 and 1")
    if triggers.shape[1] != prompts.shape[2] - 1:
        raise ValueError(f"triggers have {triggers.shape[1]} features but an example's x has {prompts.shape[2] - 1}")
    shape = prompts.shape[:2]
    # Drawn on the CPU, where the generator lives, so that every device sees the same outliers.
    is_outlier = (torch.rand(shape, generator=generator) < p_a).to(prompts.device)
    is_outlier[:, -1] = False
    which = torch.randint(len(triggers), shape, generator=generator)
    labels = 2.0 * torch.randint(2, shape, generator=generator).to(prompts) - 1
    x = prompts[..., :-1] + is_outlier[..., None] * triggers.to(prompts)[which.to(prompts.device)]
    y = torch.where(is_outlier, labels, prompts[..., -1])
    return torch.cat([x, y[..., None]], dim=2), is_outlier


class TriggerAugmentation:
    """A loader whose prompts have triggers put into them afresh every time they come by; everything else stays.

    Args:
        loader: Yields prompts (batch, tokens, width), or a tuple, list or mapping that holds them.
        triggers: (triggers, width - 1), of the size with which they shall be added.
        p_a: The chance of each example to become an outlier.
        key: Where in a tuple or mapping the prompts are.
        seed: Of the outliers; they differ between epochs and are the same for the same seed.

    Source: 2510.00399, sections 3 and 4.

    >>> for prompts, labels in TriggerAugmentation(loader, 2 * task.triggers, p_a=0.6):
    ...     train_step(prompts, labels)
    """

    def __init__(
        self,
        loader: Iterable[Any],
        triggers: Float[Tensor, "triggers features"],
        p_a: float,
        *,
        key: int | str = 0,
        seed: int = 0,
    ) -> None:
        self.loader, self.triggers, self.p_a, self.key = loader, triggers, p_a, key
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            yield self._augmented(batch)

    def __len__(self) -> int:
        assert isinstance(self.loader, Sized)
        return len(self.loader)

    def _augmented(self, batch: Any) -> Any:
        if isinstance(batch, Tensor):
            return self._with_triggers(batch)
        if isinstance(batch, Mapping):
            return {**batch, self.key: self._with_triggers(batch[self.key])}
        assert isinstance(self.key, int)
        parts = [self._with_triggers(part) if at == self.key else part for at, part in enumerate(batch)]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)

    def _with_triggers(self, prompts: Tensor) -> Tensor:
        return insert_triggers(prompts, self.triggers, self.p_a, generator=self.generator)[0]
