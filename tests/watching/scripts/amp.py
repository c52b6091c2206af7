"""bf16 autocast, with a loss scaler as half-precision scripts have."""

import torch
import toy

toy.seed()
model = toy.Toy()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
losses = []
for _ in range(toy.STEPS):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = toy.batch()
        loss = toy.next_token_loss(model(tokens), tokens)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    losses.append(loss)
toy.finish(losses, model, optimizers=(optimizer,))
