"""What reasoning looks like in responses: behaviours, words that hint at them, and repetition (arXiv 2503.18892, appendix C)."""

import itertools
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor

BEHAVIOURS = ("backtracking", "verification", "subgoals", "enumeration")
"""Of the framework that the paper labels by (2503.01307)."""
REFLECTION_WORDS = ("recheck", "rethink", "try again", "wait", "alternatively", "retry", "however")
_REFLECTION = re.compile(r"\b(?:" + "|".join(re.escape(word) for word in REFLECTION_WORDS) + r")\b", re.IGNORECASE)


@runtime_checkable
class BehaviourLabeller(Protocol):
    """Says which behaviours each response shows: a model that judges, patterns, or the grammar of synthetic traces."""

    @property
    def behaviours(self) -> tuple[str, ...]:
        """The names of what is labelled."""

    def __call__(self, responses: Sequence[str], /) -> Bool[Tensor, "responses behaviours"]:
        """A row a response."""


@dataclass(frozen=True)
class PatternLabeller:
    """Labels by regular expressions, one a behaviour; the default ones are a baseline, and blind to the unusual.

    >>> PatternLabeller()(["Let me check: 7+5=12.", "12"])[:, 1]
    tensor([ True, False])
    """

    patterns: Mapping[str, str] = field(
        default_factory=lambda: {
            "backtracking": r"\b(?:wait|no,|that(?:'s| is) (?:wrong|not right)|go back|start over|try (?:again|another))",
            "verification": r"\b(?:check|verify|confirm|make sure|substitut\w+ back)",
            "subgoals": r"\b(?:first,|next,|then,|step \d|we (?:first )?need to find|let's first)",
            "enumeration": r"\b(?:case \d|cases|possibilit|for each|try (?:all|every)|option \d)",
        }
    )

    @property
    def behaviours(self) -> tuple[str, ...]:
        """In the order of the patterns."""
        return tuple(self.patterns)

    def __call__(self, responses: Sequence[str]) -> Bool[Tensor, "responses behaviours"]:
        compiled = [re.compile(pattern, re.IGNORECASE) for pattern in self.patterns.values()]
        rows = [[one.search(text) is not None for one in compiled] for text in responses]
        return torch.tensor(rows, dtype=torch.bool).view(len(rows), len(compiled))


def behaviour_prompt(response: str, behaviours: Sequence[str] = BEHAVIOURS) -> str:
    """What a judging model is asked; `parse_behaviours` reads its answer.

    >>> answers = ask([behaviour_prompt(text) for text in texts])
    """
    return (
        "Here is a solution to a problem, between the lines of dashes. Say which of these behaviours it really shows, not "
        f"only in words: {', '.join(behaviours)}.\n"
        "Backtracking: an approach is given up for another one. Verification: a result is tested. Subgoals: the problem is "
        "cut into parts. Enumeration: several cases or candidates are gone through.\n"
        f"----------\n{response}\n----------\n"
        "Answer with one line: the names of those that it shows, parted by commas, or none."
    )


def parse_behaviours(answer: str, behaviours: Sequence[str] = BEHAVIOURS) -> list[bool] | None:
    """A row of labels from a judge's answer, whose last line counts; None where it names nothing that is known.

    >>> parse_behaviours("Verification, subgoals")
    [False, True, True, False]
    """
    lines = [line.strip(" .`*").lower() for line in answer.splitlines() if line.strip()]
    if not lines:
        return None
    named = {part.strip() for part in lines[-1].split(",")}
    if named == {"none"}:
        return [False] * len(behaviours)
    return [name in named for name in behaviours] if named <= set(behaviours) else None


class JudgeLabeller:
    """Labels by a model: `ask(prompts)` gives its answers. Each text is asked about once; at most `sample` a call.

    What was not asked about, and what got an answer that cannot be read, has no label: `known` of the last call tells which
    responses count; `num_unreadable` counts.

    >>> labeller = JudgeLabeller(ask=lambda prompts: [client.complete(one) for one in prompts], sample=64)
    """

    def __init__(
        self,
        ask: Callable[[list[str]], Sequence[str]],
        behaviours: tuple[str, ...] = BEHAVIOURS,
        *,
        sample: int | None = None,
        seed: int = 0,
    ) -> None:
        self.behaviours, self._ask, self._sample = behaviours, ask, sample
        self._generator = torch.Generator().manual_seed(seed)
        self._cache: dict[str, list[bool] | None] = {}
        self.known: Bool[Tensor, " responses"] = torch.zeros(0, dtype=torch.bool)
        self.num_unreadable = 0

    def __call__(self, responses: Sequence[str]) -> Bool[Tensor, "responses behaviours"]:
        order = torch.randperm(len(responses), generator=self._generator).tolist()
        chosen = set(order if self._sample is None else order[: self._sample])
        texts = list(dict.fromkeys(responses[place] for place in sorted(chosen)))
        new = [text for text in texts if text not in self._cache]
        if new:
            answers = self._ask([behaviour_prompt(text, self.behaviours) for text in new])
            labels = [parse_behaviours(answer, self.behaviours) for answer in answers]
            self.num_unreadable += labels.count(None)
            self._cache.update(zip(new, labels, strict=True))
        rows = [self._cache[text] if place in chosen else None for place, text in enumerate(responses)]
        self.known = torch.tensor([row is not None for row in rows], dtype=torch.bool)
        empty = [False] * len(self.behaviours)
        return torch.tensor([row or empty for row in rows], dtype=torch.bool).view(len(rows), len(empty))


@dataclass(frozen=True)
class Agreement:
    """Of two labellers on the same items."""

    raw: float
    """Share of items with the same label."""
    kappa: float
    """Cohen's: agreement beyond what their base rates give by chance; NaN where both say always the same."""


def agreement(first: Bool[Tensor, " items"], second: Bool[Tensor, " items"]) -> Agreement:
    """How far two labellers agree on one behaviour.

    Raises ValueError for no items.

    >>> agreement(torch.tensor([True, True, False, False]), torch.tensor([True, False, False, False]))
    Agreement(raw=0.75, kappa=0.5)
    """
    if not len(first) or len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} labels: give two of the same items, at least one")
    same = float((first == second).double().mean())
    one, other = float(first.double().mean()), float(second.double().mean())
    by_chance = one * other + (1 - one) * (1 - other)
    return Agreement(same, (same - by_chance) / (1 - by_chance) if by_chance < 1 else float("nan"))


def num_reflections(response: str) -> int:
    """How many of the paper's seven words of reflection a response holds, as whole words: "await" has no "wait".

    They hint at behaviours only weakly.

    >>> num_reflections("Wait, however we await ...")
    2
    """
    return len(_REFLECTION.findall(response))


def is_repetitive(response: str, *, window: int = 10, similarity: float = 0.85, sentence: int = 20) -> bool:
    """Whether a response repeats itself, by the rule of the authors' program: slow, kept as the reference.

    Jaccard similarity of the characters of two windows of 10 in a row, or of two sentences of at least 20 characters in a
    row (ends of lines and full stops part them), of 0.85 or more.

    >>> is_repetitive("1+1=2, 1+1=2, 1+1=2, 1+1=2, "), is_repetitive("7+5=12,4+8+1=13>132")
    (True, False)
    """
    windows = [response[place : place + window] for place in range(0, len(response) - window + 1, window)]
    sentences = [one.strip() for one in re.split(r"[\n.]", response)]
    sentences = [one for one in sentences if len(one) >= sentence]
    return any(
        len(set(one) & set(other)) >= similarity * len(set(one) | set(other))
        for parts in (windows, sentences)
        for one, other in itertools.pairwise(parts)
    )


def compression_ratio(response: str) -> float:
    """Bytes of a response over its bytes compressed (zlib), in linear time: high for what repeats itself; 1 for nothing.

    Compression costs a few bytes whatever the text, so that short texts stay near or below 1.

    >>> compression_ratio("abcabcabc " * 50) > 10
    True
    """
    data = response.encode()
    return len(data) / len(zlib.compress(data, 1)) if data else 1.0


REPETITIVE = 3.0
"""A compression ratio from which a response counts as repeating itself; prose is near 2 (our convention)."""
