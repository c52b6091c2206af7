"""Scoring completions of different lengths without working out most of their padding."""

from collections.abc import Collection
from dataclasses import fields, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.functional import pad

from dynascope.rl.rollout import Rollout, score

_FEWEST, _WORTHWHILE = 32, 1 / 16
"""Completions, and the share of their tokens that has to be saved, below which two passes take longer than one (on CPUs)."""


def score_by_length(
    model: nn.Module, rollout: Rollout, also: Collection[str] = (), **settings: Any
) -> dict[str, Tensor]:
    """What `score` tells, the shorter half of the completions and the longer one apart where that leaves out much padding.

    At padding values may be 0 in place of what the model would have said there.

    >>> score_by_length(model, rollout, {"entropy"})["log_probs"]
    """
    if rollout.tokens.device.type != "cpu":  # to ask for lengths would wait for the device
        return score(model, rollout, also, **settings)
    width, lengths = rollout.tokens.shape[1], rollout.lengths
    order = lengths.argsort(stable=True)
    short, long = order.tensor_split(2)
    reach = max(1, int(lengths[short].max())) if len(short) else width
    if len(rollout) < _FEWEST or len(short) * (width - reach) < _WORTHWHILE * len(rollout) * (
        width + rollout.prompts.shape[1]
    ):
        return score(model, rollout, also, **settings)
    parts = [
        score(model, _cut(rollout, short, reach), also, **settings),
        score(model, rollout.select(long), also, **settings),
    ]
    back = order.argsort()
    told = {
        name: torch.cat([_widened(part[name], width) for part in parts])[back]
        for name in parts[0]
        if name != "unembedding"
    }
    return told if "unembedding" not in parts[0] else {**told, "unembedding": parts[0]["unembedding"]}


def _cut(rollout: Rollout, rows: Int[Tensor, " rows"], width: int) -> Rollout:
    """Some completions, as wide as they need."""
    chosen = rollout.select(rows)
    by_token = {
        one.name: getattr(chosen, one.name)[:, :width]
        for one in fields(chosen)
        if one.name in ("tokens", "mask", "behaviour_log_probs", "sampling_log_probs", "hidden")
        and getattr(chosen, one.name) is not None
    }
    return replace(chosen, **by_token)


def _widened(values: Tensor, width: int) -> Tensor:
    return pad(values, (0, 0) * (values.ndim - 2) + (0, width - values.shape[1]))
