"""A buffer of questions that no answer solved, waiting for a batch of fine-tuning (arXiv 2506.07527, section 3)."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

Policy = Literal["newest", "fifo", "random"]


@dataclass(frozen=True)
class Entry:
    """A question, what came with it (its demonstration), and the step at which it entered."""

    question: Hashable
    value: Any = None
    step: int = 0


def hardest_questions(
    questions: Sequence[Hashable], accuracy: Float[Tensor, " questions"], threshold: float = 0.0
) -> list[Hashable]:
    """Questions whose share of right answers is at most the threshold; 0 is the paper's: none was right.

    Hardness is a matter of correctness, whatever number the reward gives to wrong or unformatted answers.

    >>> hardest_questions(["a", "b"], torch.tensor([0.0, 0.5]))
    ['a']
    """
    if len(questions) != len(accuracy):
        raise ValueError(f"{len(questions)} questions for {len(accuracy)} rows of answers")
    chosen = (accuracy <= threshold + 1e-6).tolist()
    return [question for question, is_hard in zip(questions, chosen, strict=True) if is_hard]


class HardestQuestionBuffer:
    """Collects questions until a batch of them is there.

    Args:
        batch_size: How many `pop` takes.
        policy: Which go first: the "newest" (the authors' program; old ones may starve), the oldest ("fifo"), or a "random"
            sample (the paper's text).
        max_size: Beyond it the oldest are dropped; None keeps all.
        max_age: Entries that waited longer, in steps, are dropped: they may no longer be hard.
        dedup: A question that is there already is renewed instead of entered twice.
        seed: Of the random policy.

    Under torch.distributed enter the questions of all processes (`gathered`), so that every process holds the same buffer and
    pops the same batch, as `Interleaver` does.

    >>> buffer = HardestQuestionBuffer(batch_size=4)
    >>> buffer.put([Entry(one, step=step) for one in hardest_questions(ids, correct.float().mean(1))])
    >>> batch = buffer.pop(step) if buffer.ready(step) else []
    """

    def __init__(
        self,
        batch_size: int,
        *,
        policy: str = "newest",
        max_size: int | None = None,
        max_age: int | None = None,
        dedup: bool = True,
        seed: int = 0,
    ) -> None:
        if policy not in ("newest", "fifo", "random"):
            raise ValueError(f"policy is newest, fifo or random, not {policy!r}")
        if batch_size < 1 or (max_size is not None and max_size < batch_size) or (max_age is not None and max_age < 0):
            raise ValueError("batch_size must be at least 1, max_size at least batch_size, and max_age not negative")
        self.batch_size, self.policy, self.max_size, self.max_age, self.dedup = (
            batch_size,
            policy,
            max_size,
            max_age,
            dedup,
        )
        self.num_dropped = 0
        """Entries that left without being used: too old or too many."""
        self._entries: list[Entry] = []  # the oldest first
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, entries: Iterable[Entry]) -> None:
        """Enter questions with what belongs to them."""
        for entry in entries:
            if self.dedup:
                self._entries = [one for one in self._entries if one.question != entry.question]
            self._entries.append(entry)
        if self.max_size is not None and len(self) > self.max_size:
            self._keep(self._entries[-self.max_size :])

    def ready(self, step: int = 0) -> bool:
        """Whether a whole batch is there, once what is too old was dropped. An empty buffer is not."""
        if self.max_age is not None:
            self._keep([one for one in self._entries if step - one.step <= self.max_age])
        return len(self) >= self.batch_size

    def pop(self, step: int = 0, size: int | None = None) -> list[Entry]:
        """Take out a batch, or `size` entries, in the order of the policy.

        Raises ValueError when there are not so many.
        """
        size = self.batch_size if size is None else size
        self.ready(step)
        if len(self) < size:
            raise ValueError(f"the buffer holds {len(self)} questions of the {size} that are wanted; ask ready() first")
        if self.policy == "random":
            places = torch.randperm(len(self), generator=self._generator)[:size].tolist()
        elif self.policy == "fifo":
            places = list(range(size))
        else:
            places = list(range(len(self) - 1, len(self) - size - 1, -1))
        taken = [self._entries[place] for place in places]
        self._entries = [one for place, one in enumerate(self._entries) if place not in set(places)]
        return taken

    def _keep(self, entries: list[Entry]) -> None:
        self.num_dropped += len(self) - len(entries)
        self._entries = entries

    def state_dict(self) -> dict[str, Any]:
        """All that later pops depend on."""
        return {
            "entries": [(one.question, one.value, one.step) for one in self._entries],
            "num_dropped": self.num_dropped,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self._entries = [Entry(*one) for one in state["entries"]]
        self.num_dropped = state["num_dropped"]
        self._generator.set_state(state["generator"])


def gathered(own: list[Any]) -> list[Any]:
    """The lists of all processes, one after the other in the order of ranks; `own` where there is only one.

    >>> gathered(["1+2="])
    ['1+2=']
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return own
    lists: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(lists, own)
    return [one for each in lists for one in each]
