"""Sums modulo 5 with a scratchpad: a chain of thought that a rule checks, and answers that a guess often hits.

    2+4+3=1,4>4$

The scratchpad has the running sums; after `>` comes the answer. Demonstrations are fluent but careless: a step that adds 2
often slips to another digit and goes on from there, one that adds more nearly always: then the last sum is as good as a guess.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from dynascope.rl.tasks.arithmetic import CHARACTERS, PAD, STOP, decode, encode

MODULUS = 5


@dataclass(frozen=True)
class Puzzle:
    """Digits to be summed modulo 5, and one careless demonstration.

    >>> Puzzle((2, 4, 3), "").chain, Puzzle((2, 4, 3), "").answer
    ('1,4', 4)
    """

    digits: tuple[int, ...]
    completion: str

    @property
    def prompt(self) -> str:
        """What the model is given."""
        return "+".join(map(str, self.digits)) + "="

    @property
    def chain(self) -> str:
        """The right scratchpad."""
        return ",".join(str(sum(self.digits[: place + 1]) % MODULUS) for place in range(1, len(self.digits)))

    @property
    def answer(self) -> int:
        """The sum modulo 5."""
        return sum(self.digits) % MODULUS

    @property
    def number(self) -> int:
        """Another number for each prompt."""
        return sum(digit * MODULUS**place for place, digit in enumerate(self.digits))

    def is_answer_right(self, completion: str) -> bool:
        """Whatever the scratchpad says."""
        return completion.partition(">")[2] == f"{self.answer}$"

    def is_chain_right(self, completion: str) -> bool:
        """Every step is right; what the answer says does not matter."""
        return completion.partition(">")[0] == self.chain


@dataclass(frozen=True)
class Scratchpads:
    """Where puzzles come from, and how careless demonstrations are.

    `kind` "guess": a step that adds 2 slips with chance `slip`, one that adds more with `hard_slip`, and the answer is the
    last sum, or any digit with chance 0.1; two slips cancel now and then. "shortcut" turns the Logic Prior round: only the
    last step slips, by one, with chance `slip`; the answer is one less than the last sum with chance 0.7 and otherwise
    another digit, so that it is right after a slip far more often than after a right scratchpad.
    """

    kind: Literal["guess", "shortcut"] = "guess"
    num_digits: int = 3
    slip: float = 0.5
    hard_slip: float = 0.995
    any_digit: ClassVar[float] = 0.1
    one_less: ClassVar[float] = 0.7

    stop_token: ClassVar[int] = STOP
    pad_token: ClassVar[int] = PAD
    vocabulary: ClassVar[int] = len(CHARACTERS)

    def __post_init__(self) -> None:
        if self.num_digits < 2 or not 0 < self.slip < 1 or not 0 < self.hard_slip < 1:
            raise ValueError("num_digits must be at least 2 and slip and hard_slip between 0 and 1")

    @property
    def max_new_tokens(self) -> int:
        """Tokens of every demonstration, and one more."""
        return 2 * self.num_digits + 1

    @property
    def max_length(self) -> int:
        """Tokens of a prompt and its completion."""
        return 2 * self.num_digits + self.max_new_tokens

    def draw(self, num: int, generator: torch.Generator) -> list[Puzzle]:
        """Puzzles at random, each with a demonstration."""
        digits = torch.randint(MODULUS, (num, self.num_digits), generator=generator)
        written, answers = self._demonstrated(digits, generator)
        return [
            Puzzle(tuple(of), f"{','.join(map(str, sums))}>{answer}$")
            for of, sums, answer in zip(digits.tolist(), written.tolist(), answers.tolist(), strict=True)
        ]

    def _demonstrated(self, digits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        num, steps = len(digits), self.num_digits - 1
        chance = torch.rand(num, steps + 1, generator=generator)
        other = torch.randint(1, MODULUS, (num, steps), generator=generator)
        guess = torch.randint(MODULUS, (num,), generator=generator)
        if self.kind == "shortcut":
            written = digits.cumsum(1)[:, 1:] % MODULUS
            written[:, -1] += chance[:, 0] < self.slip
            is_less = chance[:, 1] < self.one_less
            answers = written[:, -1] - torch.where(is_less, 1, (other[:, 0] + 1) % MODULUS)
            return written % MODULUS, answers % MODULUS
        slip = torch.tensor([0, 0, self.slip, self.hard_slip, self.hard_slip])[digits[:, 1:]]
        wrong_by = torch.where(chance[:, :-1] < slip, other, 0)
        written = (digits[:, 1:] + wrong_by).cumsum(1).add(digits[:, :1]) % MODULUS
        return written, torch.where(chance[:, -1] < self.any_digit, guess, written[:, -1])

    def prompts(self, problems: Sequence[Puzzle]) -> tuple[Int64[Tensor, "N P"], Bool[Tensor, "N P"]]:
        """Tokens of the prompts, and where they are."""
        return encode([one.prompt for one in problems], side="left")

    def texts(self, tokens: Int64[Tensor, "N T"]) -> list[str]:
        """What completions say."""
        return decode(tokens)

    def are_right(self, problems: Sequence[Puzzle], completions: Sequence[str]) -> list[bool]:
        """Whether each answer is right."""
        return [one.is_answer_right(text) for one, text in zip(problems, completions, strict=True)]

    def are_chains_right(self, problems: Sequence[Puzzle], completions: Sequence[str]) -> list[bool]:
        """Whether each scratchpad is right."""
        return [one.is_chain_right(text) for one, text in zip(problems, completions, strict=True)]
