"""How base models are taught."""

from typing import Any

import pytest
import torch

from dynascope.rl.tasks.arithmetic import Arithmetic, encode
from dynascope.rl.tasks.base_model import supervise, supervised_loss


@pytest.mark.parametrize("num", [1, 2, 7])
def test_halves_by_length_have_the_gradient_of_the_whole(num: int, tiny_llama: Any) -> None:
    problems = Arithmetic((1, 3)).draw(num, torch.Generator().manual_seed(1))
    model = tiny_llama.double()
    prompts, completions = (
        encode([one.prompt for one in problems], side="left"),
        encode([one.completion for one in problems]),
    )
    parameters = list(model.parameters())
    expected = torch.autograd.grad(supervised_loss(model, *prompts, *completions), parameters)
    supervise(model, problems)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7)
