"""DDP and FSDP2 over two gloo processes."""

import os
import sys

import torch
import torch.distributed as dist
import toy
from torch.distributed.fsdp import fully_shard

kind = sys.argv[2]
dist.init_process_group("gloo")
toy.seed()
model = toy.Toy()
called = model
if kind == "ddp":
    called = torch.nn.parallel.DistributedDataParallel(model)
else:
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
toy.seed(1 + dist.get_rank())
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
losses = []
for _ in range(toy.STEPS):
    tokens = toy.batch()
    optimizer.zero_grad()
    loss = toy.next_token_loss(called(tokens), tokens)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    losses.append(loss)
whole = {n: v.full_tensor() if hasattr(v, "full_tensor") else v for n, v in model.state_dict().items()}
sys.argv[1] += f".{os.environ['RANK']}"
toy.finish(losses, torch.nn.Identity(), whole=whole)
dist.destroy_process_group()
