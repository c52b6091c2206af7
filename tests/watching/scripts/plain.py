"""The plain loop, with evaluation in between."""

import torch
import toy

toy.seed()
model = toy.Toy()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
losses = []
for step in range(toy.STEPS):
    tokens = toy.batch()
    loss = toy.next_token_loss(model(tokens), tokens)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss)
    if step == 3:
        model.eval()
        with torch.no_grad():
            model(toy.batch())
        model.train()
toy.finish(losses, model, optimizers=(optimizer,))
