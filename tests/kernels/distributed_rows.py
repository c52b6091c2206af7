"""Run under torchrun: rows of the kernel by process, of a plain and of a sharded model; saves what it found."""

import copy
import os
import sys

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from dynascope.kernels import ntk, ntk_rows

torch.distributed.init_process_group("gloo")
torch.manual_seed(0)
plain = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
plain = plain.double()
x = torch.randn(7, 6, dtype=torch.float64)
expected, rows, gathered = ntk(plain, x), ntk_rows(plain, x), ntk_rows(plain, x, gather=True)

sharded = copy.deepcopy(plain)
fully_shard(sharded[3])
fully_shard(sharded)
of_sharded = ntk_rows(sharded, x, gather=True)
for model in (plain, sharded):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
after = [parameter.full_tensor() for parameter in sharded.parameters()]
rank = torch.distributed.get_rank()
torch.save(
    {
        "expected": expected,
        "rows": rows,
        "gathered": gathered,
        "of_sharded": of_sharded,
        "after": after,
        "plain_after": [parameter.detach() for parameter in plain.parameters()],
    },
    f"{sys.argv[1]}/rank-{rank}.pt",
)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
os._exit(0)  # gloo's threads now and then abort a process that ends in the usual way
