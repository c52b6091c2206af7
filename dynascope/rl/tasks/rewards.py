"""Rewards are plain callables: `reward(prompts=…, completions=…, **columns)` gives one number a completion.

That is TRL's signature too, so a reward of ours works there and one of theirs here.
"""

import math
import re
import reprlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Reward: TypeAlias = Callable[..., Sequence[float | None]]


def evaluate_rewards(
    rewards: Reward | Mapping[str, Reward],
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]] | None = None,
    *,
    weights: Mapping[str, float] | None = None,
    time_limit: float | None = 60.0,
) -> tuple[Float[Tensor, " N"], dict[str, Float[Tensor, " N"]]]:
    """The weighted sum of the rewards of each completion, and each reward by its name.

    Args:
        rewards: One callable, or several by name.
        columns: What the callables are given beside prompts and completions, one value a completion.
        weights: By name; 1 where nothing is said.
        time_limit: Seconds that one call may take; None for no limit. A call that hangs is left behind in its thread.

    Raises ValueError without a reward, and one that names the reward when it raises, takes too long, returns another number
    of values, or gives a value that is no finite number.

    >>> total, _ = evaluate_rewards(lambda completions, **_: [float("4" in c) for c in completions], ["2+2="], ["4"])
    """
    named = rewards if isinstance(rewards, Mapping) else {name_of(rewards): rewards}
    if not named:
        raise ValueError("there is no reward: give a callable, or several by name")
    unknown = sorted(set(weights or {}) - set(named))
    if unknown:
        raise ValueError(f"weights name rewards that there are not: {', '.join(unknown)}")
    given = {"prompts": list(prompts), "completions": list(completions), **(columns or {})}
    each = {name: _values(name, reward, given, len(completions), time_limit) for name, reward in named.items()}
    for name, values in each.items():
        bad = (~values.isfinite()).nonzero().flatten().tolist()
        if bad:
            raise ValueError(_NOT_FINITE.format(name, bad[:5]))
    total = torch.stack([(weights or {}).get(name, 1.0) * values for name, values in each.items()]).sum(0)
    return total, each


def guarded(reward: Reward, *, time_limit: float | None = None) -> Reward:
    """The same reward, for whoever calls rewards himself, as TRL does: raises what `evaluate_rewards` raises, but takes None.

    None says nothing of a completion; NaN is no None, and raises as infinity does.

    >>> GRPOTrainer(model, reward_funcs=guarded(reward, time_limit=60.0), args=args, train_dataset=prompts)
    """
    name = name_of(reward)

    def call(completions: Sequence[Any], **columns: Any) -> list[float | None]:
        values = _values(name, reward, {"completions": completions, **columns}, len(completions), time_limit)
        return [None if math.isnan(value) else value for value in values.tolist()]

    call.__name__ = name
    return call


def name_of(reward: Reward) -> str:
    """Of a function its own, of an object its class's.

    >>> name_of(FormatReward("a"))
    'format'
    """
    return str(getattr(reward, "__name__", type(reward).__name__))


_NOT_FINITE = "reward {!r} gave no finite number for completions {}"


def _values(name: str, reward: Reward, given: Mapping[str, Any], num: int, time_limit: float | None) -> Tensor:
    """What a reward says of each completion; NaN where that is None."""
    told: dict[str, Any] = {}

    def call() -> None:
        try:
            told["values"] = reward(**given)
        except (Exception, SystemExit) as error:  # noqa: BLE001 whatever a user's reward raises is told with its name
            told["error"] = error

    if time_limit is None:
        call()
    else:
        thread = threading.Thread(target=call, daemon=True)  # a daemon, so that a hanging one cannot keep the process
        thread.start()
        thread.join(time_limit)
        if thread.is_alive():
            raise ValueError(f"reward {name!r} took more than {time_limit:g} s for {num} completions; is it hanging?")
    if "error" in told:
        error = told["error"]
        raise ValueError(f"reward {name!r} raised {type(error).__name__}: {error}") from error
    values = told["values"].tolist() if isinstance(told["values"], Tensor) else told["values"]
    try:
        numbers = [None if value is None else float(value) for value in values]
    except (TypeError, ValueError):
        shown = reprlib.repr(values)
        raise ValueError(f"reward {name!r} gave {shown}, which is not one number a completion") from None
    bad = [place for place, value in enumerate(numbers) if value is not None and not math.isfinite(value)]
    if bad:
        raise ValueError(_NOT_FINITE.format(name, bad[:5]))
    found = torch.tensor([math.nan if value is None else value for value in numbers])
    if len(found) != num:
        raise ValueError(f"reward {name!r} gave {len(found)} values for {num} completions")
    return found


def texts_of(completions: Sequence[Any]) -> list[str]:
    """What completions or prompts say; of a conversation, as TRL hands it to rewards, the last message.

    >>> texts_of(["4", [{"role": "assistant", "content": "5"}]])
    ['4', '5']
    """
    return [one if isinstance(one, str) else str(one[-1]["content"]) for one in completions]


class FormatReward:
    """1 for a completion that the pattern matches as a whole, else 0.

    >>> FormatReward(r"<think>.*</think><answer>.*</answer>")(completions=["<think>so</think><answer>2</answer>"])
    [1.0]
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = re.compile(pattern, re.DOTALL)
        self.__name__ = "format"

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float]:
        return [float(self.pattern.fullmatch(one) is not None) for one in texts_of(completions)]


def overlong_penalty(
    lengths: Int[Tensor, " N"], is_truncated: Bool[Tensor, " N"], *, max_length: int, buffer: int
) -> Float[Tensor, " N"]:
    """0 up to `max_length` − `buffer` tokens, then falling to −1 at `max_length`; −1 when truncated (2503.14476, eq. 13).

    Raises ValueError for a buffer that is not between 1 and `max_length`.

    >>> overlong_penalty(torch.tensor([8, 15]), torch.tensor([False, False]), max_length=20, buffer=10)
    tensor([ 0.0000, -0.5000])
    """
    if not 1 <= buffer <= max_length:
        raise ValueError(f"buffer={buffer} must be between 1 and max_length={max_length}")
    over = (lengths - (max_length - buffer)).clamp(min=0, max=buffer) / buffer
    return -torch.where(is_truncated, 1.0, over)
