"""A judge that thinks and then says which of two answers is better: its task, its rewards, its votes (arXiv 2505.02835).

The judge writes `<think>…</think><answer>1</answer>` or 2. Format, result and consistency are plain reward callables.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dynascope.rl.calls import Calls
from dynascope.rl.tasks.gsm8k import WordProblems
from dynascope.rl.tasks.rewards import FormatReward, texts_of

THINK_ANSWER = r"<think>((?!</?think>|</?answer>).)*</think>\s*<answer>((?!</?think>|</?answer>).)*</answer>"
"""One think block, directly followed by one answer block, each tag once, and nothing else."""

Referee = Callable[[str, str], int | None]
"""(last lines of the reasoning, answer) -> 1 where they agree, 0 where not, None where it cannot say."""


@dataclass(frozen=True)
class Comparison:
    """Two answers to a question in the order shown, and which is better (1 or 2)."""

    question: str
    first: str
    second: str
    label: int

    @property
    def prompt(self) -> str:
        """What a judge is asked."""
        return (
            f"Question:\n{self.question}\n\nAnswer 1:\n{self.first}\n\nAnswer 2:\n{self.second}\n\n"
            "Which answer is better? Think inside <think></think>, then write only 1 or 2 inside <answer></answer>."
        )


class PairwiseJudgeTask:
    """Preferences (question, better answer, worse answer) as comparisons in random order.

    Without the random order a judge learns to name the place where the better answer usually stands. With a tokenizer of
    Hugging Face's interface it is a task of the loop. Raises ValueError where there are no preferences.

    >>> task = PairwiseJudgeTask([("2 + 2?", "4", "5")], tokenizer, max_new_tokens=512)
    >>> train(model, preset("stable_reinforce"), task, optimizer, rewards=JudgeReward(), ref_model=start, generator=generator)
    """

    def __init__(
        self, preferences: Sequence[tuple[str, str, str]], tokenizer: Any = None, max_new_tokens: int = 1024
    ) -> None:
        if not preferences:
            raise ValueError("there are no preferences; give at least one (question, better, worse)")
        self.preferences, self.max_new_tokens = list(preferences), max_new_tokens
        self._words = WordProblems([], tokenizer, max_new_tokens)

    @property
    def stop_token(self) -> int:
        """The tokenizer's end of sequence."""
        return self._words.stop_token

    @property
    def pad_token(self) -> int:
        """The tokenizer's padding, or its end of sequence where it has none."""
        return self._words.pad_token

    def prompts(self, problems: Sequence[Comparison]) -> tuple[Int[Tensor, "N P"], Bool[Tensor, "N P"]]:
        """Tokens of the prompts, padded on the left, and where they are."""
        return self._words.prompts([{"prompt": one.prompt} for one in problems])

    def texts(self, tokens: Int[Tensor, "N T"]) -> list[str]:
        """What completions say."""
        return self._words.texts(tokens)

    def are_right(self, problems: Sequence[Comparison], completions: Sequence[str]) -> list[bool]:
        """Whether the better answer is named."""
        return [parse_judgement(text)[1] == str(one.label) for one, text in zip(problems, completions, strict=True)]

    def rows(self) -> list[dict[str, Any]]:
        """Every preference in both orders, with the columns `prompt` and `label`: a training set for TRL and `JudgeReward`.

        >>> GRPOTrainer(model, reward_funcs=JudgeReward(), args=args, train_dataset=Dataset.from_list(task.rows()))
        """
        return [{"prompt": one.prompt, "label": one.label} for one in self.both_orders()]

    def draw(self, num: int, generator: torch.Generator) -> list[Comparison]:
        """Comparisons at random, each in random order."""
        places = torch.randint(len(self.preferences), (num,), generator=generator).tolist()
        orders = (torch.rand(num, generator=generator) < 0.5).tolist()
        return [self.compared(place, is_swapped=swap) for place, swap in zip(places, orders, strict=True)]

    def both_orders(self) -> list[Comparison]:
        """Every preference twice, once in either order, to test with."""
        return [
            self.compared(place, is_swapped=swap) for place in range(len(self.preferences)) for swap in (False, True)
        ]

    def compared(self, place: int, *, is_swapped: bool) -> Comparison:
        """One preference with the better answer first, or second."""
        question, better, worse = self.preferences[place]
        return Comparison(question, worse, better, 2) if is_swapped else Comparison(question, better, worse, 1)


def position_report(labels: Int[Tensor, " N"], answers: Int[Tensor, " N"]) -> dict[str, float]:
    """Accuracy where the better answer came first and where second, and how often "1" was said; 0 stands for no answer.

    A judge without a bias has the same accuracy in both orders. Where no better answer came first, or none second, the accuracy
    of that order is NaN.

    >>> position_report(torch.tensor([1, 2]), torch.tensor([1, 1]))
    {'accuracy': 0.5, 'accuracy_first': 1.0, 'accuracy_second': 0.0, 'says_first': 1.0}
    """
    right = (labels == answers).double()
    return {
        "accuracy": float(right.mean()),
        "accuracy_first": float(right[labels == 1].mean()),
        "accuracy_second": float(right[labels == 2].mean()),
        "says_first": float((answers == 1).double().mean()),
    }


def vote(answers: Int[Tensor, "N samples"], k: int) -> Int[Tensor, " N"]:
    """The majority of the first k answers of each comparison, 1 or 2; 0 on a tie, and where none of them is an answer.

    Raises ValueError unless 1 <= k <= samples.

    >>> vote(torch.tensor([[1, 2, 2], [1, 0, 2]]), 3)
    tensor([2, 0])
    """
    if not 1 <= k <= answers.shape[1]:
        raise ValueError(f"k={k} must lie between 1 and the {answers.shape[1]} samples of a comparison")
    ones, twos = ((answers[:, :k] == side).sum(1) for side in (1, 2))
    return torch.where(ones > twos, 1, torch.where(twos > ones, 2, 0))


def difficulty_by_attempts(is_right: Bool[Tensor, "pairs attempts"]) -> Int[Tensor, " pairs"]:
    """The attempt at which a pair was first judged rightly, counted from 1; attempts + 1 where none was.

    Pairs of difficulty 2 and more are those worth reinforcement learning; all of them are worth supervised training.

    >>> difficulty_by_attempts(torch.tensor([[True, False], [False, True], [False, False]]))
    tensor([1, 2, 3])
    """
    if not is_right.shape[1]:
        raise ValueError("no attempt was made at the pairs: at least one is needed")
    first = is_right.long().argmax(1) + 1
    return torch.where(is_right.any(1), first, is_right.shape[1] + 1)


def parse_judgement(text: str) -> tuple[str, str]:
    """(reasoning, answer) of a completion; the answer is "" where there is not exactly one answer block.

    >>> parse_judgement("<think>4 is right</think><answer>1</answer>")
    ('4 is right', '1')
    """
    blocks = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    reasoning = text.partition("<answer>")[0].replace("<think>", "").replace("</think>", "")
    return reasoning.strip(), blocks[0].strip() if len(blocks) == 1 else ""


def compose_rewards(
    form: Float[Tensor, " N"], result: Float[Tensor, " N"], consistency: Float[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """0.5 · format + result · (1 + 0.5 · consistency): being consistent pays only where the answer is right.

    Format and result are 0 or 1, consistency is 1, 0 (unknown) or −1.

    >>> compose_rewards(torch.tensor([1.0]), torch.tensor([1.0]), torch.tensor([-1.0]))
    tensor([1.])
    """
    return 0.5 * form + result * (1 + 0.5 * consistency)


class ConsistencyReward:
    """Whether the end of the reasoning supports the answer, by a referee: 1, −1, or 0 where it cannot say.

    The referee sees the last `tail_lines` lines of the reasoning and the answer, `num_workers` of them in threads at a time. A
    referee that raises, says None, or is silent for `timeout` seconds, is asked up to `retries` times, then counts as 0;
    `num_failures` counts those. Same reasoning and answer are asked about once. Raises ValueError for numbers below 1, or a
    timeout that is not positive.

    >>> ConsistencyReward(lambda reasoning, answer: int(answer in reasoning)).one("so answer 2", "2")
    1.0
    """

    def __init__(
        self,
        referee: Referee,
        tail_lines: int = 3,
        retries: int = 3,
        num_workers: int = 8,
        timeout: float | None = 10.0,
    ) -> None:
        if min(tail_lines, retries, num_workers) < 1:
            raise ValueError("tail_lines, retries and num_workers must be at least 1")
        self.referee, self.tail_lines, self.retries = referee, tail_lines, retries
        self._calls = Calls(num_workers, timeout)
        self.num_calls = self.num_failures = 0
        self._known: dict[tuple[str, str], float] = {}
        self.__name__ = "consistency"

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float]:
        return self.many([parse_judgement(text) for text in texts_of(completions)])

    def one(self, reasoning: str, answer: str) -> float:
        """Of one piece of reasoning and its answer."""
        return self.many([(reasoning, answer)])[0]

    def many(self, judgements: Sequence[tuple[str, str]]) -> list[float]:
        """Of pieces of reasoning, each with its answer."""
        keys = [("\n".join(reasoning.splitlines()[-self.tail_lines :]), answer) for reasoning, answer in judgements]
        unknown = list(dict.fromkeys(key for key in keys if key not in self._known))
        for _ in range(self.retries):
            calls = [(key, self._calls.submit(self.referee, *key)) for key in unknown]
            self.num_calls += len(calls)
            for key, call in calls:
                # A referee is somebody's server; what it raises counts as no verdict.
                if call.exception() is None and call.result() in (0, 1):
                    self._known[key] = 1.0 if call.result() else -1.0
            unknown = [key for key in unknown if key not in self._known]
        self.num_failures += len(unknown)
        return [self._known.get(key, 0.0) for key in keys]


class JudgeReward:
    """Format, result and consistency of a judge's completions in one reward, `compose_rewards` of them.

    The label is the column `label` (1 or 2), or that of each `problem`, as the loop hands them over. The referee is
    asked only where the answer is right: elsewhere its word does
    not count. A completion whose answer cannot be read has result 0. `consistency=None` leaves that part out. Raises ValueError
    for labels that are neither 1 nor 2, and where there are none. `read` gives reasoning and answer of a completion.

    >>> reward = JudgeReward(ConsistencyReward(referee))
    >>> GRPOTrainer(model, reward_funcs=reward, args=args, train_dataset=comparisons)
    """

    def __init__(
        self,
        consistency: ConsistencyReward | None = None,
        pattern: str = THINK_ANSWER,
        read: Callable[[str], tuple[str, str]] = parse_judgement,
    ) -> None:
        self.consistency, self.form, self.read = consistency, FormatReward(pattern), read
        self.__name__ = "judge"

    def __call__(
        self,
        completions: Sequence[Any],
        label: Sequence[Any] | None = None,
        problem: Sequence[Any] | None = None,
        **columns: Any,
    ) -> list[float]:
        if label is None and problem is None:
            raise ValueError("a judge's reward needs the column label, 1 or 2, or problems that have one")
        labels = [one.label for one in problem or ()] if label is None else label
        strange = [one for one in labels if str(one) not in ("1", "2")]
        if strange:
            raise ValueError(f"a label says which answer is better, 1 or 2, not {strange[0]!r}")
        read = [self.read(text) for text in texts_of(completions)]
        result = [float(answer == str(right)) for (_, answer), right in zip(read, labels, strict=True)]
        consistency = [0.0] * len(read)
        right_ones = [place for place, right in enumerate(result) if right]
        about = [problem[place] for place in right_ones] if problem else [None] * len(right_ones)
        told = self.agreeing([read[place] for place in right_ones], about)
        for place, value in zip(right_ones, told, strict=True):
            consistency[place] = value
        parts = (torch.tensor(one) for one in (self.form(completions), result, consistency))
        total: list[float] = compose_rewards(*parts).tolist()
        return total

    def agreeing(self, judgements: Sequence[tuple[str, str]], problems: Sequence[Any]) -> list[float]:
        """Consistency of right judgements, each of a problem (None where they are not known): by the referee."""
        return [0.0] * len(judgements) if self.consistency is None else self.consistency.many(judgements)
