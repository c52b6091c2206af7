"""Real word problems (GSM8K, 2110.14168) from a folder of yours, with numeric checking of answers."""

import json
import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

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


def numeric_reward(completions: Sequence[str], answer: Sequence[str], **columns: Any) -> list[float]:
    """1 where a completion's final number is the answer, else 0; a completion without a number is wrong.

    >>> numeric_reward(["That makes 72.0 clips."], answer=["72"])
    [1.0]
    """
    return [float(final_number(text) == Decimal(right)) for text, right in zip(completions, answer, strict=True)]
