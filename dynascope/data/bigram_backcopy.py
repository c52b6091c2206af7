"""Bigram-Backcopy: a Markov chain on which some tokens call for a copy, the smallest task that breeds attention sinks.

Characters follow a bigram law, but after one of the most frequent ones (a trigger) comes the character that stood before
it. A head that copies has nothing to do elsewhere: it falls dormant there. Source: 2410.13835, section 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dynascope.data.alias_tables import AliasTables, columns_and_chances

RULES = ("copy", "markov", "dormant", "induction")


@dataclass(frozen=True)
class Bigram:
    """The law of the next token given this one, how frequent tokens are, and what they stand for."""

    transitions: Float[Tensor, "tokens tokens"]
    marginal: Float[Tensor, " tokens"]
    characters: Sequence[str] = ()


def bigram_from_text(text: str) -> Bigram:
    """Bigram law of a text's characters from counts; a character that nothing follows is followed by the marginal law.

    Raises ValueError for a text of fewer than two different characters.

    >>> bigram_from_text("abab").transitions
    tensor([[0., 1.],
            [1., 0.]], dtype=torch.float64)
    """
    characters = sorted(set(text))
    if len(characters) < 2:
        raise ValueError("a text of fewer than two different characters has no bigram law")
    number = {character: index for index, character in enumerate(characters)}
    ids = torch.tensor([number[character] for character in text])
    size = len(characters)
    pairs = torch.bincount(ids[:-1] * size + ids[1:], minlength=size**2).view(size, size).double()
    marginal = torch.bincount(ids, minlength=size).double() / len(ids)
    totals = pairs.sum(1, keepdim=True)
    return Bigram(torch.where(totals > 0, pairs / totals.clamp(min=1), marginal), marginal, characters)


def dirichlet_bigram(num_tokens: int, concentration: float = 0.3, seed: int = 0) -> Bigram:
    """A random bigram law with independent Dirichlet rows, and its stationary marginal.

    >>> dirichlet_bigram(32).transitions.sum(1)  # ones
    """
    if num_tokens < 2 or concentration <= 0:
        raise ValueError(f"num_tokens={num_tokens} must be at least 2 and concentration={concentration} positive")
    rows = np.random.default_rng(seed).dirichlet(np.full(num_tokens, concentration), num_tokens)
    transitions = torch.from_numpy(rows)
    return Bigram(transitions, stationary_law(transitions))


def stationary_law(transitions: Float[Tensor, "tokens tokens"]) -> Float[Tensor, " tokens"]:
    """The law that the chain keeps, by least squares (of the smallest norm, where there are several).

    >>> stationary_law(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    tensor([0.6667, 0.3333], dtype=torch.float64)
    """
    rows = transitions.double()
    size = len(rows)
    system = torch.cat([rows.T - torch.eye(size, dtype=rows.dtype, device=rows.device), torch.ones_like(rows[:1])])
    law: Tensor = torch.linalg.lstsq(system, F.one_hot(torch.tensor(size), size + 1).to(rows)[:, None]).solution[:, 0]
    return law.clamp(min=0) / law.clamp(min=0).sum()


@dataclass(frozen=True)
class Risks:
    """Cross-entropy against the oracle, in nats a token, where it is bigram's turn and where it is the rule's.

    An excess is that less the oracle's own entropy: 0 for a model that knows the law. NaN where there are no such places.
    """

    markov: Tensor
    copy: Tensor
    markov_excess: Tensor
    copy_excess: Tensor


class BigramBackcopy:
    """Sequences of the Bigram-Backcopy task, drawn for a whole batch at once, and the law that they follow.

    Args:
        bigram: A `Bigram`, a text to count, or a matrix of transitions (its marginal is then the stationary one).
        k_triggers: The so many most frequent tokens are triggers.
        seq_len: Number of inputs; `sample` draws one token more.
        rule: What follows a trigger: the token before it ("copy"), a draw from the law of the token before it ("dormant"),
            whatever followed it the first time in this sequence ("induction"), or nothing special ("markov").
        mix_p: The probability with which the rule acts; otherwise the bigram law does.
        n_bos: How many <s> stand first (0, 1 or 2). The first character after them is no trigger, unless `rule="markov"`.
        delimiter_p: The probability with which a bigram draw gives the delimiter, after which the sequence starts anew.

    `bos` is the id of <s> (the one after the characters), `delimiter` the next, where there is one. Nothing emits <s>
    later in the sequence.

    Raises ValueError for another rule, or settings that leave nothing to draw. Source: 2410.13835, section 3.1.

    >>> task = BigramBackcopy(dirichlet_bigram(32), k_triggers=3, seq_len=48)
    >>> tokens = task.sample(64, torch.Generator().manual_seed(0))  # (64, 49)
    >>> inputs, targets = tokens[:, :-1], tokens[:, 1:]
    """

    def __init__(
        self,
        bigram: Bigram | str | Float[Tensor, "tokens tokens"],
        k_triggers: int = 3,
        seq_len: int = 256,
        *,
        rule: str = "copy",
        mix_p: float = 1.0,
        n_bos: int = 1,
        delimiter_p: float = 0.0,
    ) -> None:
        if isinstance(bigram, str):
            bigram = bigram_from_text(bigram)
        elif isinstance(bigram, Tensor):
            bigram = Bigram(bigram, stationary_law(bigram))
        if rule not in RULES:
            raise ValueError(f"rule is one of {', '.join(RULES)}, not {rule!r}")
        if not (0 <= mix_p <= 1 and 0 <= delimiter_p < 1):
            raise ValueError(f"mix_p={mix_p} and delimiter_p={delimiter_p} are probabilities; the latter is below 1")
        if n_bos not in (0, 1, 2) or seq_len < max(n_bos, 1):
            raise ValueError(f"n_bos={n_bos} must be 0, 1 or 2, and seq_len={seq_len} at least that and 1")
        num_characters = len(bigram.transitions)
        if not 0 <= k_triggers < int((bigram.marginal > 0).sum()):
            raise ValueError(f"k_triggers={k_triggers} leaves no token to begin with, of {num_characters}")
        self.bigram, self.seq_len, self.rule, self.mix_p, self.n_bos = bigram, seq_len, rule, mix_p, n_bos
        self.bos, self.delimiter = num_characters, num_characters + 1 if delimiter_p > 0 else None
        self.vocab_size = num_characters + 1 + (delimiter_p > 0)
        self.triggers = bigram.marginal.argsort(descending=True, stable=True)[:k_triggers]

        start = bigram.marginal.double().clone()
        if rule != "markov":
            start[self.triggers] = 0
        laws = torch.zeros(self.vocab_size, self.vocab_size, dtype=torch.float64)
        laws[:num_characters, :num_characters] = (1 - delimiter_p) * bigram.transitions.double()
        laws[num_characters:, :num_characters] = start / start.sum()
        if self.delimiter is not None:
            laws[:num_characters, self.delimiter] = delimiter_p
        self.laws = laws / laws.sum(1, keepdim=True)
        self._is_trigger = torch.zeros(self.vocab_size, dtype=torch.bool)
        self._is_trigger[self.triggers] = True
        self._tables = AliasTables.of(self.laws)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Int[Tensor, "count length"]:
        """`count` sequences of seq_len + 1 tokens, on the generator's device: two look-ups for the batch a position."""
        device = generator.device if generator is not None else torch.device("cpu")
        is_trigger, tables = self._is_trigger.to(device), self._tables.to(device)
        length = self.seq_len + 1
        column, chance = columns_and_chances((length, count), self.vocab_size, generator, device)
        acts = None
        if self.mix_p < 1:
            acts = torch.rand(length, count, device=device, generator=generator) < self.mix_p
        tokens = torch.full((length, count), self.bos, device=device)
        first_follower = torch.full((count, self.vocab_size if self.rule == "induction" else 0), -1, device=device)
        places, columns, chances = tokens.unbind(), column.unbind(), chance.unbind()
        before = now = places[0]
        for t in range(self.n_bos, length):
            if t:
                before, now = now, places[t - 1]
            is_rule = is_trigger.take(now)
            if acts is not None:
                is_rule = is_rule & acts[t]
            row = torch.where(is_rule, before, now) if self.rule == "dormant" else now
            drawn = tables.draw(row, columns[t], chances[t])
            if self.rule == "copy":
                drawn = torch.where(is_rule, before, drawn)
            elif self.rule == "induction":
                known = first_follower.gather(1, now[:, None])[:, 0]
                is_new = is_trigger[now] & (known < 0)
                drawn = torch.where(is_rule & (known >= 0), known, drawn)
                first_follower.scatter_(1, now[:, None], torch.where(is_new, drawn, known)[:, None])
            places[t].copy_(drawn)
        return tokens.T.contiguous()

    def trigger_mask(self, x: Int[Tensor, "count length"]) -> Bool[Tensor, "count length"]:
        """Where a trigger stands: there a copying head is active."""
        return self._is_trigger.to(x.device)[x]

    def oracle(self, x: Int[Tensor, "count length"]) -> Float[Tensor, "count length tokens"]:
        """The exact law of the next token at every position of sequences of this task."""
        laws = self.laws.to(x.device)
        law = laws[x]
        before = torch.cat([x[:, :1], x[:, :-1]], dim=1)
        if self.rule == "copy":
            ruled, acts = F.one_hot(before, self.vocab_size).to(law), self.trigger_mask(x)
        elif self.rule == "dormant":
            ruled, acts = laws[before], self.trigger_mask(x)
        elif self.rule == "induction":
            ruled, acts = self._first_followers(x)
        else:
            ruled, acts = law, torch.zeros_like(x, dtype=torch.bool)
        law = torch.where(acts[..., None], self.mix_p * ruled + (1 - self.mix_p) * law, law)
        if self.n_bos == 2:
            law[:, 0] = F.one_hot(torch.tensor(self.bos), self.vocab_size).to(law)
        return law

    def risks(self, logits: Float[Tensor, "count length tokens"], x: Int[Tensor, "count length"]) -> Risks:
        """How far a model's next-token logits on inputs `x` are from the oracle, on triggers and elsewhere.

        >>> task.risks(model(inputs), inputs).copy_excess
        """
        law = self.oracle(x)
        losses = -(law * logits.double().log_softmax(-1)).nan_to_num(nan=0.0).sum(-1)
        entropy = torch.special.entr(law).sum(-1)
        is_trigger = self.trigger_mask(x)
        markov, copy = losses[~is_trigger].mean(), losses[is_trigger].mean()
        return Risks(markov, copy, markov - entropy[~is_trigger].mean(), copy - entropy[is_trigger].mean())

    def _first_followers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """One-hot laws of what first followed each trigger in its sequence, and where there has been such."""
        ruled = torch.zeros(*x.shape, self.vocab_size, dtype=torch.float64, device=x.device)
        acts = torch.zeros_like(x, dtype=torch.bool)
        position = torch.arange(x.shape[1], device=x.device)
        for trigger in self.triggers.tolist():
            occurs = x == trigger
            first = occurs.to(torch.uint8).argmax(1, keepdim=True)
            follower = x.gather(1, (first + 1).clamp(max=x.shape[1] - 1))
            again = occurs & (position > first)
            ruled = torch.where(again[..., None], F.one_hot(follower, self.vocab_size).to(ruled), ruled)
            acts |= again
        return ruled, acts
