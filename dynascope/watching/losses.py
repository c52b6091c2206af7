"""Seeing the loss of a training step where it starts its way back, and the gradient norm before it is clipped."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils import clip_grad

ScalarListener = Callable[[Tensor], None]


@contextmanager
def listening(on_loss: ScalarListener, on_clip: ScalarListener) -> Iterator[None]:
    """Tell `on_loss` of each scalar just before a backward pass starts there, `on_clip` of each norm before clipping.

    `loss.backward()` and `torch.autograd.backward` both pass here, and with them HF Trainer, Lightning and accelerate.
    A loss that `torch.amp.GradScaler` multiplied is told as it was before. Norms are those that
    `torch.nn.utils.clip_grad_norm_` returns. Both are told as tensors, without waiting for the device.
    """
    backward, scale, clip = torch.autograd.backward, GradScaler.scale, clip_grad.clip_grad_norm_
    last_scaled: list[tuple[Tensor, Tensor]] = []

    def watched_scale(self: GradScaler, outputs: Any) -> Any:
        scaled = scale(self, outputs)
        if isinstance(outputs, Tensor):
            last_scaled[:] = [(scaled, outputs)]
        return scaled

    def watched_backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(tensors, Tensor) and tensors.numel() == 1:
            unscaled = [loss for scaled, loss in last_scaled if scaled is tensors]
            on_loss(unscaled[0] if unscaled else tensors)
        last_scaled.clear()
        backward(tensors, *args, **kwargs)

    def watched_clip(*args: Any, **kwargs: Any) -> Tensor:
        norm = clip(*args, **kwargs)
        on_clip(norm)
        return norm

    torch.autograd.backward = watched_backward
    GradScaler.scale = watched_scale  # type: ignore[method-assign]
    clip_grad.clip_grad_norm_ = torch.nn.utils.clip_grad_norm_ = watched_clip
    try:
        yield
    finally:
        torch.autograd.backward = backward
        GradScaler.scale = scale  # type: ignore[method-assign]
        clip_grad.clip_grad_norm_ = torch.nn.utils.clip_grad_norm_ = clip
