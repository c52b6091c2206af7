"""LBFGS, which evaluates a closure many times a step."""

import torch
import toy
from torch import nn

toy.seed()
x = torch.randn(40, 3)
y = (x @ torch.tensor([1.0, -2.0, 0.5])).sin()
model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=5)
losses = []


def closure() -> torch.Tensor:
    optimizer.zero_grad()
    loss = (model(x).squeeze(-1) - y).square().mean()
    loss.backward()
    return loss


for _ in range(toy.STEPS):
    losses.append(optimizer.step(closure))
toy.finish(losses, model)
