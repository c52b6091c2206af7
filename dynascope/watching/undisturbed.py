"""Running a model once more without leaving a trace: randomness, buffers, modes and caches are put back."""

import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def undisturbed(model: nn.Module, *, training: bool | None = False) -> Iterator[None]:
    """Whatever runs inside leaves the training as it was: what it reads of the model, the next step will not notice.

    Put back: random states (PyTorch's on the CPU and the model's devices, NumPy's, Python's), every buffer (its
    identity and content), each module's `training` flag, and autocast's cache of converted weights (one made without
    gradients would be reused by the real forward pass and cut it off). Inside, every module is in evaluation mode
    (`training=None` leaves the modes alone), compiled modules run uncompiled, and fused transformer kernels that would
    hide attention are off.

    What it cannot put back: state that a forward pass keeps in plain Python attributes, and what a user's own forward
    hooks do; those see one more call.
    """
    modules = list(model.modules())
    modes = [module.training for module in modules]
    buffers = [
        (module, name, buffer, buffer.detach().clone(), buffer._version)
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    with ExitStack() as stack:
        stack.enter_context(_random_states(model))
        stack.enter_context(_uncompiled())
        stack.enter_context(_no_autocast_cache())
        stack.enter_context(_no_fused_transformer_kernels())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        try:
            if training is not None:
                for module in modules:
                    module.training = training
            yield
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode
            for module, name, buffer, content, version in buffers:
                module._buffers[name] = buffer
                # In training mode BatchNorm writes its statistics without telling the version counter; and a counter
                # that moved would make the backward pass of the real forward refuse the buffer. Hence `.data`.
                if training is not False or buffer._version != version:
                    buffer.data.copy_(content)


@contextmanager
def _random_states(model: nn.Module) -> Iterator[None]:
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def _uncompiled() -> Iterator[None]:
    # Importing the compiler takes over a second: a run that has not imported it has nothing compiled.
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    was_enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(was_enabled)


@contextmanager
def _no_fused_transformer_kernels() -> Iterator[None]:
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)
