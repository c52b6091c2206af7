"""Gradient clipping and zero_grad with set_to_none=False."""

import torch
import toy
from torch.nn.utils import clip_grad_norm_

toy.seed()
model = toy.Toy()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
losses = []
for _ in range(toy.STEPS):
    tokens = toy.batch()
    optimizer.zero_grad(set_to_none=False)
    loss = toy.next_token_loss(model(tokens), tokens)
    loss.backward()
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    losses.append(loss)
toy.finish(losses, model)
