"""How subsets of the data shape the loss surface: error barriers between twins.

Source: arXiv 2107.07075, Section 5.
"""

import copy
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from dynascope.data.scoring import moved_batches
from dynascope.kernels.layerwise import called, logits_of

State: TypeAlias = tuple[nn.Module, Optimizer]
TrainBetween: TypeAlias = Callable[[State, int, int, int], State]
"""(state, first step, last step, seed of the order of batches) -> state."""


@torch.no_grad()
def linear_path(
    model_a: nn.Module, model_b: nn.Module, loader: DataLoader[Any], *, num_points: int = 11
) -> Float[Tensor, "points examples"]:
    """Whether each example is misclassified (1) or not (0) at points on the straight line from a to b.

    Parameters and floating-point buffers are interpolated, and both models left alone; per example, so that a subset's
    error is a mean over its columns. Examples stand in the order of the loader.

    Raises ValueError for models whose parameters differ in name or shape.

    >>> linear_path(first, second, loader)[:, easiest].mean(1)
    """
    states = [model.state_dict() for model in (model_a, model_b)]
    shapes = [{name: value.shape for name, value in state.items()} for state in states]
    if shapes[0] != shapes[1]:
        raise ValueError("the two models differ in their parameters; a path needs two of the same architecture")
    model = copy.deepcopy(model_a).eval()
    device = next(model.parameters()).device
    path = []
    for share in torch.linspace(0, 1, num_points).tolist():
        mixed = {
            # lerp at 1 would round: both ends have to be the models themselves
            name: one
            if share == 0 or not one.is_floating_point()
            else two
            if share == 1
            else torch.lerp(one, two, share)
            for (name, one), two in zip(states[0].items(), states[1].values(), strict=True)
        }
        model.load_state_dict(mixed)
        wrong = []
        for inputs, labels, _ in moved_batches(loader, device):
            wrong.append(logits_of(called(model, inputs)).argmax(-1) != labels)
        path.append(torch.cat(wrong).float().cpu())
    return torch.stack(path)


def error_barrier(errors: Float[Tensor, "points examples"]) -> Float[Tensor, ""]:
    """How far the error on the path rises above the chord between its ends; never below 0.

    >>> error_barrier(torch.tensor([[0.0], [1.0], [0.0]]))
    tensor(1.)
    """
    mean = errors.mean(1)
    chord = torch.lerp(mean[0], mean[-1], torch.linspace(0, 1, len(mean)))
    return (mean - chord).max().clamp_min(0)


def instability(
    train: TrainBetween, start: State, spawn_at: int, num_steps: int, loader: DataLoader[Any], *, num_points: int = 11
) -> Float[Tensor, "points examples"]:
    """The path between two twins that share their first `spawn_at` steps and then see batches in different orders.

    `start` is (model, optimizer) before the first step and stays as it is. See `linear_path` for what comes back.

    >>> barrier = error_barrier(instability(train, (model, optimizer), 100, 1000, loader))
    """
    if not 0 <= spawn_at <= num_steps:
        raise ValueError(f"spawn_at={spawn_at} is not between 0 and num_steps={num_steps}")
    parent = train(copy.deepcopy(start), 0, spawn_at, 0)
    twins = [train(copy.deepcopy(parent), spawn_at, num_steps, seed) for seed in (1, 2)]
    return linear_path(twins[0][0], twins[1][0], loader, num_points=num_points)
