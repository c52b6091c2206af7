"""The training loop that studies share where training is an optimizer and a loss, looked at seldom or densely."""

from collections.abc import Callable, Collection, Sequence

from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer


def log_steps(num_steps: int, per_decade: int = 10) -> list[int]:
    """Steps to look at: 0, then `per_decade` a decade, and the last, each once.

    Raises ValueError for no steps.

    >>> log_steps(100, per_decade=2)
    [0, 1, 3, 10, 32, 100]
    """
    if num_steps < 1 or per_decade < 1:
        raise ValueError(f"num_steps={num_steps} and per_decade={per_decade}: both must be at least 1")
    steps = {0, num_steps}
    power = 0
    while (step := round(10 ** (power / per_decade))) < num_steps:
        steps.add(step)
        power += 1
    return sorted(steps)


def descend(
    optimizer: Optimizer | Sequence[Optimizer],
    loss: Callable[[], Tensor],
    num_steps: int,
    *,
    looks: Collection[int] = (),
    look: Callable[[int], None] = lambda step: None,
    max_norm: float | None = None,
) -> None:
    """Take `num_steps` steps down `loss`, and call `look(step)` before the step of each number in `looks`.

    `look(num_steps)` sees the end. `loss` is evaluated once a step, and its gradients go to every optimizer given, scaled to a
    norm of `max_norm` all together where it is larger.

    >>> descend(torch.optim.SGD(model.parameters(), lr=0.1), lambda: F.mse_loss(model(x), y), 100)
    """
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    looks = frozenset(looks)
    for step in range(num_steps):
        if step in looks:
            look(step)
        for one in optimizers:
            one.zero_grad()
        loss().backward()
        if max_norm is not None:
            groups = [group for one in optimizers for group in one.param_groups]
            clip_grad_norm_([weight for group in groups for weight in group["params"]], max_norm)
        for one in optimizers:
            one.step()
    if num_steps in looks:
        look(num_steps)
