"""Trains one model after another, as cross-validation does."""

import torch
import toy

toy.seed()
models, losses = [], []
for fold in range(2):
    model = toy.Toy(width=16 * (fold + 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(toy.STEPS):
        tokens = toy.batch()
        loss = toy.next_token_loss(model(tokens), tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss)
    models.append(model)
toy.finish(losses, *models)
