"""A critic that reads the policy's own hidden states: one linear map, fitted by regression to returns."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


class LinearCritic(nn.Module):
    """The value before each token as a linear function of the hidden state that predicts it; the policy is not touched.

    >>> critic = LinearCritic(width=64)
    >>> critic.fit(hidden, returns, mask)
    """

    def __init__(self, width: int, *, lr: float = 1e-2, num_steps: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.num_steps = num_steps
        self._optimizer = torch.optim.Adam(self.linear.parameters(), lr=lr)

    def forward(self, hidden: Float[Tensor, "N T width"]) -> Float[Tensor, "N T"]:
        values: Tensor = self.linear(hidden.detach())[..., 0]
        return values

    @torch.enable_grad()
    def fit(self, hidden: Float[Tensor, "N T width"], returns: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]) -> None:
        """A few steps down the mean squared error over tokens."""
        for _ in range(self.num_steps):
            self._optimizer.zero_grad()
            errors = (self(hidden) - returns).masked_fill(~mask, 0.0)
            (errors.square().sum() / mask.sum().clamp(min=1)).backward()
            self._optimizer.step()
