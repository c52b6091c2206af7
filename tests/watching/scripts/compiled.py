"""torch.compile in four ways; also says how often the compiler worked and broke off."""

import sys

import torch
import toy
from torch._dynamo.utils import counters

toy.seed()
way = sys.argv[2]
model = toy.Toy()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
called = model
if way == "module":
    called = torch.compile(model, backend="aot_eager")
elif way == "in place":
    model.compile(backend="aot_eager")
elif way == "blocks":
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, backend="aot_eager")


def forward(tokens: torch.Tensor) -> torch.Tensor:
    return toy.next_token_loss(called(tokens), tokens)


if way == "function":
    forward = torch.compile(forward, backend="aot_eager")
losses = []
for _ in range(toy.STEPS):
    tokens = toy.batch()
    optimizer.zero_grad()
    loss = forward(tokens)
    loss.backward()
    optimizer.step()
    losses.append(loss)
compiler = {kind: dict(counters[kind]) for kind in ("frames", "graph_break", "recompiles", "stats")}
toy.finish(losses, model, compiler=repr(compiler))
