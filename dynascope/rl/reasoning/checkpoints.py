"""Checkpoints of a policy side by side: what each can do, and what it says to the same questions."""

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dynascope.rl.loop import LoopConfig, Task, draw_rollout
from dynascope.rl.monitors import pass_at_k_gap, watch_responses
from dynascope.rl.reasoning.pass_at_k import pass_at_k


@dataclass(frozen=True)
class Response:
    """One answer of a checkpoint."""

    prompt: str
    text: str
    is_right: bool
    is_truncated: bool
    num_tokens: int


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint does on a task, drawn and greedily, and some of its responses."""

    name: str
    measures: Mapping[str, float]
    """`rollout/…` of `watch_responses`, `pass_at_k/K`, `pass_at_k/gap`, and `greedy/correct`."""
    responses: Sequence[Response]


def compare_checkpoints(
    models: Mapping[str, nn.Module],
    task: Task,
    *,
    num_problems: int = 128,
    num_samples: int = 8,
    temperature: float = 1.0,
    num_kept: int = 20,
    seed: int = 0,
) -> list[Checkpoint]:
    """Each model on the same problems with the same random numbers.

    Greedy and drawn accuracy are both told: a base model's greedy answers against a trained one's drawn ones is no
    comparison. `num_kept` responses a model are kept, the first of each problem.

    Raises ValueError for no models, or fewer than two samples.

    >>> compare_checkpoints({"base": base, "step 100": model}, Arithmetic())[1].measures["pass_at_k/gap"]
    """
    if not models or num_samples < 2:
        raise ValueError(f"{len(models)} models with {num_samples} samples: give a model and two samples at least")
    told = []
    for name, model in models.items():
        amount = LoopConfig(num_prompts=num_problems, num_samples=num_samples, temperature=temperature)
        problems, rollout = draw_rollout(model, task, amount, torch.Generator().manual_seed(seed))
        texts = task.texts(rollout.tokens)
        correct = torch.tensor(task.are_right(problems, texts))
        greedy = LoopConfig(num_prompts=num_problems, num_samples=1, temperature=0.0)
        same, likeliest = draw_rollout(model, task, greedy, torch.Generator().manual_seed(seed))
        by_problem = correct.view(-1, num_samples)
        ks = [2**power for power in range(num_samples.bit_length()) if 2**power <= num_samples]
        curve = pass_at_k(num_samples, by_problem.sum(1), ks).mean(0).tolist()
        health = watch_responses(
            rollout.lengths.cpu(), rollout.is_truncated.cpu(), correct, rollout.group_ids.cpu(), texts=texts
        )
        measures = {
            **{key: float(value) for key, value in health.items()},
            **{f"pass_at_k/{k}": value for k, value in zip(ks, curve, strict=True)},
            "pass_at_k/gap": pass_at_k_gap(by_problem, ks[-1]),
            "greedy/correct": float(torch.tensor(task.are_right(same, task.texts(likeliest.tokens))).float().mean()),
        }
        kept = range(0, min(num_kept, num_problems) * num_samples, num_samples)
        responses = [
            Response(
                _prompt(problems[place]), texts[place], bool(correct[place]), bool(rollout.is_truncated[place]),
                int(rollout.lengths[place]),
            )
            for place in kept
        ]  # fmt: skip
        told.append(Checkpoint(name, measures, responses))
    return told


def _prompt(problem: Any) -> str:
    return str(problem["prompt"] if isinstance(problem, Mapping) else problem.prompt)


def checkpoints_page(checkpoints: Iterable[Checkpoint], path: str | Path, *, title: str = "Checkpoints") -> Path:
    """One self-contained page: the measures as a table, and below it the responses to each prompt, checkpoint by checkpoint.

    Returns the path. Raises ValueError for no checkpoints.

    >>> checkpoints_page(compare_checkpoints(models, task), "checkpoints.html")
    """
    shown = list(checkpoints)
    if not shown:
        raise ValueError("there is no checkpoint to show")
    names = list(dict.fromkeys(name for one in shown for name in one.measures))
    head = "".join(f"<th>{html.escape(one.name)}</th>" for one in shown)
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td>"
        + "".join(f"<td>{one.measures.get(name, float('nan')):.4g}</td>" for one in shown)
        + "</tr>"
        for name in names
    )
    prompts = dict.fromkeys(response.prompt for one in shown for response in one.responses)
    blocks = "".join(
        f"<details><summary>{html.escape(prompt)}</summary>"
        + "".join(
            _shown(one.name, response) for one in shown for response in one.responses if response.prompt == prompt
        )
        + "</details>"
        for prompt in prompts
    )
    page = Path(path)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>"
        f"<h1>{html.escape(title)}</h1><table><tr><th></th>{head}</tr>{rows}</table><h2>Responses</h2>{blocks}</html>",
        encoding="utf-8",
    )
    return page


def _shown(name: str, response: Response) -> str:
    verdict = "right" if response.is_right else "wrong"
    cut = ", cut off" if response.is_truncated else ""
    return (
        f"<p class={verdict}><b>{html.escape(name)}</b> {verdict}{cut}, {response.num_tokens} tokens</p>"
        f"<pre>{html.escape(response.text)}</pre>"
    )


_STYLE = (
    ":root{color-scheme:light dark}body{font:15px system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse}td,th{padding:.2rem .8rem;text-align:right;border-bottom:1px solid #8884}"
    "td:first-child{text-align:left}pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#8882;padding:.5rem}"
    ".right b{color:#009e73}.wrong b{color:#d55e00}summary{cursor:pointer;padding:.3rem 0}"
)
