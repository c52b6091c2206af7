"""Two models, two optimizers, taking turns."""

import torch
import torch.nn.functional as F
import toy
from torch import nn

toy.seed()
generator = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
critic = nn.Sequential(nn.Linear(2, 16), nn.LeakyReLU(0.2), nn.Dropout(0.1), nn.Linear(16, 1))
optimizer_g = torch.optim.Adam(generator.parameters(), lr=1e-2)
optimizer_c = torch.optim.Adam(critic.parameters(), lr=2e-2)
losses = []
for _ in range(toy.STEPS):
    real, fake = torch.randn(32, 2) + 3, generator(torch.randn(32, 4))
    loss = F.softplus(-critic(real)).mean() + F.softplus(critic(fake.detach())).mean()
    optimizer_c.zero_grad()
    loss.backward()
    optimizer_c.step()
    losses.append(loss)
    loss = F.softplus(-critic(fake)).mean()
    optimizer_g.zero_grad()
    loss.backward()
    optimizer_g.step()
    losses.append(loss)
toy.finish(losses, generator, critic, optimizers=(optimizer_g, optimizer_c))
