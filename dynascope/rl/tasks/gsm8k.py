"""Real word problems (GSM8K, 2110.14168) from a folder of yours, with numeric checking of answers."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from dynascope.rl.tasks.rewards import texts_of

_NUMBER = re.compile(r"[-+]?\$?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?")


def read_gsm8k(folder: str | Path, split: str = "train") -> list[dict[str, str]]:
    """Rows with "prompt", "answer" (the number) and "solution" (worked, ending in `#### number`) from `split`.jsonl.

    Raises ValueError when the file is not there or a line is not of the set's form.

    >>> read_gsm8k("data/gsm8k")[0]["answer"]
    '72'
    """
    path = Path(folder) / f"{split}.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; --data names a folder with train.jsonl") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            question, solution = row["question"], row["answer"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}: not a JSON object with question and answer") from None
        answer = final_number(solution)
        if answer is None:
            raise ValueError(f"{path}, line {number}: the answer holds no number")
        rows.append({"prompt": f"Question: {question}\nAnswer:", "answer": str(answer), "solution": solution})
    return rows


def final_number(text: str) -> Decimal | None:
    """The number that a text gives as its answer, or None.

    What follows the last `####` or stands in the last `\\boxed{…}` counts, and else the last number of the text. Signs,
    thousands separators, decimals and fractions are read.

    >>> final_number("so 3 * 4 = 12\\n#### 1,200")
    Decimal('1200')
    """
    marked = text.rsplit("####", 1)[1] if "####" in text else boxed(text)
    numbers = _NUMBER.findall(text if marked is None else marked)
    if not numbers:
        return None
    top, _, bottom = re.sub(r"[,$\s]", "", numbers[0 if marked is not None else -1]).partition("/")
    try:
        return Decimal(top) / Decimal(bottom) if bottom else Decimal(top)
    except (InvalidOperation, ZeroDivisionError):
        return None


def boxed(text: str) -> str | None:
    """What the last `\\boxed{…}` of a text holds, braces inside it included; None where there is none or it never ends.

    >>> boxed(r"so \\boxed{\\frac{1}{2}}")
    '\\\\frac{1}{2}'
    """
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, inside = 1, text[start + len("\\boxed{") :]
    for place, character in enumerate(inside):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return inside[:place]
    return None


def numeric_reward(completions: Sequence[Any], answer: Sequence[str], **columns: Any) -> list[float]:
    """1 where a completion's final number is the answer, else 0; a completion without a number is wrong.

    >>> numeric_reward(["That makes 72.0 clips."], answer=["72"])
    [1.0]
    """
    pairs = zip(texts_of(completions), answer, strict=True)
    return [float(final_number(text) == Decimal(right)) for text, right in pairs]


@dataclass(frozen=True)
class WordProblems:
    """Word problems as a task of the loop, with a tokenizer of Hugging Face's interface.

    Prompts are texts, or conversations, which go through the tokenizer's chat template.

    >>> task = WordProblems(read_gsm8k("data/gsm8k"), tokenizer, max_new_tokens=256)
    """

    rows: Sequence[Mapping[str, Any]]
    tokenizer: Any
    max_new_tokens: int = 256

    @property
    def stop_token(self) -> int:
        """The tokenizer's end of sequence."""
        return int(self.tokenizer.eos_token_id)

    @property
    def pad_token(self) -> int:
        """The tokenizer's padding, or its end of sequence where it has none."""
        pad = self.tokenizer.pad_token_id
        return self.stop_token if pad is None else int(pad)

    def draw(self, num: int, generator: torch.Generator) -> list[Mapping[str, Any]]:
        """Problems at random."""
        return [self.rows[place] for place in torch.randint(len(self.rows), (num,), generator=generator).tolist()]

    def prompts(self, problems: Sequence[Mapping[str, Any]]) -> tuple[Int64[Tensor, "N P"], Bool[Tensor, "N P"]]:
        """Tokens of the prompts, padded on the left, and where they are."""
        ids = [self._ids(one["prompt"]) for one in problems]
        width = max(map(len, ids))
        tokens = torch.tensor([[self.pad_token] * (width - len(one)) + one for one in ids])
        return tokens, torch.arange(width) >= width - torch.tensor([[len(one)] for one in ids])

    def _ids(self, prompt: Any) -> list[int]:
        ids: list[int] = (
            self.tokenizer(prompt)["input_ids"]
            if isinstance(prompt, str)
            else self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        )
        return ids

    def completions(self, texts: Sequence[str]) -> tuple[Int64[Tensor, "N T"], Bool[Tensor, "N T"]]:
        """Tokens of completions that are given, each with its end, padded on the right, and where they are."""
        ids = [[*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.stop_token] for text in texts]
        width = max(map(len, ids))
        tokens = torch.tensor([one + [self.pad_token] * (width - len(one)) for one in ids])
        return tokens, torch.arange(width) < torch.tensor([[len(one)] for one in ids])

    def texts(self, tokens: Int64[Tensor, "N T"]) -> list[str]:
        """What completions say."""
        texts: list[str] = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return texts

    def are_right(self, problems: Sequence[Mapping[str, Any]], completions: Sequence[str]) -> list[bool]:
        """Whether each completion's final number is the answer."""
        return [value > 0 for value in numeric_reward(completions, [one["answer"] for one in problems])]
