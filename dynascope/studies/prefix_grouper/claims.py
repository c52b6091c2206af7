"""What `prefix-grouper` claims, and what is measured of its records to tell."""

from typing import Any

import numpy as np

from dynascope.studies.harness import Claim, Runs


def largest(runs: Runs, arm: str, name: str) -> float:
    """Over all steps."""
    return float(runs[arm][name].max())


def grid(runs: Runs, name: str) -> Any:
    """Of the costs, (prompt, completion, group)."""
    return runs["cost"][name].values[0]


def at_long_prompt(runs: Runs, name: str) -> float:
    """At the longest prompt, the middle completion and the largest group: 512, 32 and 8 in the preset small."""
    values = grid(runs, name)
    return float(values[-1, values.shape[1] // 2, -1])


def growth(runs: Runs, axis: int) -> float:
    """How much larger the speedup is at the last value of an axis than at its first; a geometric mean over the others."""
    logs = np.log(grid(runs, "speedup"))
    return float(np.exp(np.mean(logs.take(-1, axis) - logs.take(0, axis))))


CLAIMS = [
    Claim(
        id="A-loss-32",
        statement="Training with shared prompts has the losses of training with repeated ones, in single precision.",
        source="Lemma 2.1",
        paper_value="equal",
        quantity="largest difference of losses over 30 steps",
        measure=lambda runs: largest(runs, "float32", "loss_difference"),
        op="<",
        threshold=1e-4,
    ),
    Claim(
        id="A-loss-64",
        statement="So it has in double precision.",
        source="Lemma 2.1",
        paper_value="equal",
        quantity="largest difference of losses over 30 steps",
        measure=lambda runs: largest(runs, "float64", "loss_difference"),
        op="<",
        threshold=1e-10,
    ),
    Claim(
        id="A-weights",
        statement="Both come to the same weights.",
        source="Lemma 2.1",
        paper_value="equal",
        quantity="largest difference of weights, double precision",
        measure=lambda runs: largest(runs, "float64", "weight_difference"),
        op="<",
        threshold=1e-8,
    ),
    Claim(
        id="B-long",
        statement="With a long prompt a step takes a third of the time or less.",
        source="Lemma 2.2, Figure 2",
        paper_value="ratio of FLOPs, 1/8 in the limit",
        quantity="speedup at 512 prompt tokens, 8 completions of 32",
        measure=lambda runs: at_long_prompt(runs, "speedup"),
        op=">=",
        threshold=3.0,
    ),
    Claim(
        id="B-never-slower",
        statement="The automatic choice is nowhere slower than repeating prompts.",
        source="Figure 2",
        paper_value="always lower than repeating",
        quantity="least speedup on the grid",
        measure=lambda runs: float(grid(runs, "speedup").min()),
        op=">=",
        threshold=0.95,
    ),
    Claim(
        id="B-prompt",
        statement="The gain grows with the length of the prompt.",
        source="Lemma 2.2",
        paper_value="towards the size of the group",
        quantity="speedup at the longest prompt over that at the shortest",
        measure=lambda runs: growth(runs, axis=0),
        op=">",
        threshold=1.0,
    ),
    Claim(
        id="B-group",
        statement="The gain grows with the number of completions.",
        source="Lemma 2.2",
        paper_value="towards the size of the group",
        quantity="speedup at the largest group over that at the smallest",
        measure=lambda runs: growth(runs, axis=2),
        op=">",
        threshold=1.0,
    ),
    Claim(
        id="C",
        statement="What is kept for the backward pass shrinks as the tokens do.",
        source="Figure 3",
        paper_value="always less memory than repeating",
        quantity="ratio of bytes kept over ratio of tokens, 512 prompt tokens, 8 completions of 32",
        measure=lambda runs: at_long_prompt(runs, "kept_ratio") / at_long_prompt(runs, "token_ratio"),
        op="<=",
        threshold=1.15,
    ),
]
