"""Three micro-batches a step, SGD with momentum and a schedule."""

import torch
import toy

toy.seed()
model = toy.Toy()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
losses = []
for _ in range(toy.STEPS):
    optimizer.zero_grad()
    for _ in range(3):
        tokens = toy.batch(4)
        loss = toy.next_token_loss(model(tokens), tokens) / 3
        loss.backward()
        losses.append(loss)
    optimizer.step()
    schedule.step()
toy.finish(losses, model, optimizers=(optimizer,))
