"""A verifiable task with a chain of thought that a rule can check: sums with written steps.

    47+85=7+5=12,4+8+1=13>132$

The prompt ends at the first `=`; then, from the last digit to the first, each column's digits with the carry and their
sum; after `>` the answer; `$` ends. The number of digits is the difficulty.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

CHARACTERS = " 0123456789+=,>$"
"""What the tokens stand for; the space is padding and `$` the end."""
PAD, STOP = 0, CHARACTERS.index("$")
_NUMBER = {character: place for place, character in enumerate(CHARACTERS)}


def encode(texts: Sequence[str], *, side: str = "right") -> tuple[Int64[Tensor, "N T"], Bool[Tensor, "N T"]]:
    """Texts as tokens, padded to the longest on the "right" (completions) or "left" (prompts), and where tokens are.

    Raises ValueError for a character that is none of `CHARACTERS`.

    >>> encode(["1+2=", "10+2="], side="left")[1].sum(1)
    tensor([4, 5])
    """
    width = max(map(len, texts))
    padded = [text.rjust(width) if side == "left" else text.ljust(width) for text in texts]
    try:
        tokens = torch.tensor([[_NUMBER[character] for character in text] for text in padded])
    except KeyError as error:
        raise ValueError(f"{error.args[0]!r} is no character of this task; there are {CHARACTERS[1:]}") from None
    return tokens, tokens != PAD


def decode(tokens: Int64[Tensor, "N T"]) -> list[str]:
    """Texts of tokens, without padding.

    >>> decode(encode(["1+2="])[0])
    ['1+2=']
    """
    return ["".join(CHARACTERS[place] for place in row if place != PAD) for row in tokens.tolist()]


@dataclass(frozen=True)
class Checked:
    """What the rule says of one completion."""

    is_answer_right: bool
    is_chain_right: bool
    """Every step is the one that the sum asks for, in order; what the answer says does not matter."""
    num_right_steps: int
    """Steps that are right before the first that is not."""
    is_formatted: bool
    """Ends with `>`, digits and `$`."""


@dataclass(frozen=True)
class Sum:
    """One problem.

    >>> Sum(47, 85).prompt, Sum(47, 85).completion
    ('47+85=', '7+5=12,4+8+1=13>132$')
    """

    first: int
    second: int

    @property
    def prompt(self) -> str:
        """What the model is given."""
        return f"{self.first}+{self.second}="

    @property
    def steps(self) -> list[str]:
        """The right chain."""
        first, second, carry = self.first, self.second, 0
        told: list[str] = []
        while first or second or not told:
            column = first % 10 + second % 10 + carry
            told.append(f"{first % 10}+{second % 10}{'+1' if carry else ''}={column}")
            first, second, carry = first // 10, second // 10, column // 10
        return told

    @property
    def completion(self) -> str:
        """The right chain and answer."""
        return f"{','.join(self.steps)}>{self.first + self.second}$"

    def check(self, completion: str) -> Checked:
        """Check a completion's chain and answer apart from each other; whatever it holds, this raises nothing.

        >>> Sum(47, 85).check("7+5=12,4+8=12>132$")
        Checked(is_answer_right=True, is_chain_right=False, num_right_steps=1, is_formatted=True)
        """
        chain, _, answer = completion.partition(">")
        is_formatted = answer.endswith("$") and answer[:-1].isdigit()
        written, right = chain.split(","), self.steps
        wrong = [place for place, (one, other) in enumerate(zip(written, right, strict=False)) if one != other]
        return Checked(
            is_answer_right=is_formatted and answer[:-1] == str(self.first + self.second),
            is_chain_right=written == right,
            num_right_steps=wrong[0] if wrong else min(len(written), len(right)),
            is_formatted=is_formatted,
        )


@dataclass(frozen=True)
class Arithmetic:
    """Sums of two numbers of as many digits each, drawn evenly from the levels.

    `max_new_tokens` holds the longest right completion and a little more. Raises ValueError for levels that are not
    between 1 and 9 digits.

    >>> problems = Arithmetic(digits=(2, 3)).draw(4, torch.Generator().manual_seed(0))
    """

    digits: tuple[int, ...] = (2,)
    """The levels of difficulty."""

    def __post_init__(self) -> None:
        if not self.digits or not all(1 <= one <= 9 for one in self.digits):
            raise ValueError(f"digits={self.digits} must be numbers from 1 to 9, at least one")

    stop_token: ClassVar[int] = STOP
    pad_token: ClassVar[int] = PAD
    vocabulary: ClassVar[int] = len(CHARACTERS)

    @property
    def max_new_tokens(self) -> int:
        """Tokens that the longest right completion has (every column with a carry), and four more."""
        longest = max(self.digits)
        return len(Sum(10**longest - 1, 10**longest - 1).completion) + 4

    @property
    def max_length(self) -> int:
        """Tokens of the longest prompt and completion together."""
        return 2 * max(self.digits) + 2 + self.max_new_tokens

    def draw(self, num: int, generator: torch.Generator) -> list[Sum]:
        """Problems at random, each of a random level."""
        levels = torch.tensor(self.digits)[torch.randint(len(self.digits), (num,), generator=generator)]
        lowest = torch.where(levels > 1, 10 ** (levels - 1), torch.zeros_like(levels))
        share = torch.rand(2, num, generator=generator, dtype=torch.float64)
        first, second = (lowest + (share * (10**levels - lowest)).long()).tolist()
        return [Sum(*numbers) for numbers in zip(first, second, strict=True)]

    def prompts(self, problems: Sequence[Sum]) -> tuple[Int64[Tensor, "N P"], Bool[Tensor, "N P"]]:
        """Tokens of the prompts, padded on the left, and where they are."""
        return encode([one.prompt for one in problems], side="left")

    def completions(self, texts: Sequence[str]) -> tuple[Int64[Tensor, "N T"], Bool[Tensor, "N T"]]:
        """Tokens of completions that are given, padded on the right, and where they are; the end is added where it lacks."""
        return encode([text if text.endswith(CHARACTERS[STOP]) else text + CHARACTERS[STOP] for text in texts])

    def texts(self, tokens: Int64[Tensor, "N T"]) -> list[str]:
        """What completions say."""
        return decode(tokens)

    def are_right(self, problems: Sequence[Sum], completions: Sequence[str]) -> list[bool]:
        """Whether each completion's answer is right."""
        return [one.check(text).is_answer_right for one, text in zip(problems, completions, strict=True)]

    def are_chains_right(self, problems: Sequence[Sum], completions: Sequence[str]) -> list[bool]:
        """Whether each completion's chain is right."""
        return [one.check(text).is_chain_right for one, text in zip(problems, completions, strict=True)]


def answer_reward(completions: Sequence[str], problem: Sequence[Sum], **columns: Any) -> list[float]:
    """1 for a right answer, whatever the chain, else 0.

    >>> answer_reward(["1+2=3>3$"], problem=[Sum(1, 2)])
    [1.0]
    """
    return [float(one.check(text).is_answer_right) for one, text in zip(problem, completions, strict=True)]


def chain_reward(completions: Sequence[str], problem: Sequence[Sum], **columns: Any) -> list[float]:
    """1 for a right chain, whatever the answer, else 0.

    >>> chain_reward(["1+2=3>4$"], problem=[Sum(1, 2)])
    [1.0]
    """
    return [float(one.check(text).is_chain_right) for one, text in zip(problem, completions, strict=True)]
