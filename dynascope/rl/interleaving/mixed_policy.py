"""LUFFY: a demonstration beside a prompt's own samples, in one group with them (arXiv 2504.14945)."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.functional import pad

from dynascope.rl.interleaving.demonstrations import DemoBudget, DemonstrationSource
from dynascope.rl.interleaving.interleave import TeachableTask, prompt_of
from dynascope.rl.rollout import Rollout, score


class GroupDemonstrations:
    """The demonstrations that prompts have, each asked for once and kept; longer ones than `max_new_tokens` are left out.

    >>> GroupDemonstrations(task, Demonstrations(solutions)).of([problem])
    {0: '1+2=3>3$'}
    """

    def __init__(
        self, task: TeachableTask, source: DemonstrationSource, *, name: Callable[[Any], Hashable] = prompt_of
    ) -> None:
        self.task, self.source = task, source
        self.budget = DemoBudget(available=source.available)
        self.num_too_long = 0
        self._name = name
        self._known: dict[Hashable, str] = {}

    def of(self, problems: Sequence[Any]) -> dict[int, str]:
        """By a problem's place, the solutions that are there; each of them counts as used."""
        names = [self._name(one) for one in problems]
        self.source.request({name: one for name, one in zip(names, problems, strict=True) if name not in self._known})
        for name, _, solution in self.source.collect():
            if self.task.completions([solution])[0].shape[1] > self.task.max_new_tokens:
                self.num_too_long += 1
            else:
                self._known[name] = solution
        found = {place: self._known[name] for place, name in enumerate(names) if name in self._known}
        if found:
            self.budget.spend([names[place] for place in found])
        return found


class DemonstrationsInGroups(GroupDemonstrations):
    """Puts a demonstration in the place of each prompt's last completion; goes into `train` as `mix=`.

    It is rewarded and compared with the samples of its group, so a group in which no sample is right has a gradient; where
    all are right it adds nothing. Its behaviour log-probabilities are those of `model` as it is. Prompts whose
    demonstration is missing, not there yet, or longer than the task's `max_new_tokens` keep their samples.

    >>> mix = DemonstrationsInGroups(model, task, Demonstrations(solutions, accept=verify))
    >>> train(model, preset("luffy"), task, optimizer, generator=generator, mix=mix)
    """

    def __init__(
        self,
        model: nn.Module,
        task: TeachableTask,
        source: DemonstrationSource,
        *,
        name: Callable[[Any], Hashable] = prompt_of,
    ) -> None:
        super().__init__(task, source, name=name)
        self.model = model

    @torch.no_grad()
    def __call__(self, problems: Sequence[Any], rollout: Rollout) -> tuple[Rollout, Bool[Tensor, " N"]]:
        """The rollout with demonstrations in it, and which of its completions they are; one problem a completion.

        >>> rollout, is_demonstration = mix(problems, rollout)
        """
        is_last = torch.ones_like(rollout.is_truncated)
        is_last[:-1] = rollout.group_ids[1:] != rollout.group_ids[:-1]
        places = is_last.nonzero().flatten().tolist()
        found = self.of([problems[place] for place in places])
        is_given = torch.zeros_like(is_last)
        if not found:
            return rollout, is_given
        device = rollout.tokens.device
        rows = torch.tensor([places[one] for one in found], device=device)
        tokens, mask = (one.to(device) for one in self.task.completions(list(found.values())))
        width = max(tokens.shape[1], rollout.tokens.shape[1])

        def put(values: Tensor, given: Tensor, filling: int = 0) -> Tensor:
            wide, own = (pad(one, (0, width - one.shape[1]), value=filling) for one in (values, given))
            return wide.index_copy(0, rows, own)

        is_given[rows] = True
        mixed = replace(
            rollout,
            tokens=put(rollout.tokens, tokens, self.task.pad_token),
            mask=put(rollout.mask, mask),
            is_truncated=rollout.is_truncated & ~is_given,
            hidden=None,
        )
        log_probs = score(self.model, mixed.select(rows))["log_probs"].masked_fill(~mixed.mask[rows], 0.0)
        behaviour, drawn = (put(one, log_probs) for one in (rollout.behaviour_log_probs, rollout.sampling_log_probs))
        return replace(mixed, behaviour_log_probs=behaviour, sampling_log_probs=drawn), is_given
