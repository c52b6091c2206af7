"""Breaks off in its third step."""

import torch
import toy

toy.seed()
model = toy.Toy()
optimizer = torch.optim.AdamW(model.parameters())
for step in range(toy.STEPS):
    if step == 3:
        raise RuntimeError("the disk of the data server is gone")
    tokens = toy.batch()
    optimizer.zero_grad()
    toy.next_token_loss(model(tokens), tokens).backward()
    optimizer.step()
