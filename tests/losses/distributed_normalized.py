"""Run once a rank (folder, rank): a normalized step of two processes, each with its own pairs; saves the gradients."""

import os
import sys

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dynascope.losses import PairwiseNormalizedPreference, PreferencePairs, margin_loss

folder, rank = sys.argv[1], int(sys.argv[2])
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
torch.manual_seed(0)
model, features = nn.Linear(4, 3), torch.randn(6, 4)
wrapped = DistributedDataParallel(model)
for _ in range(2):  # the second forward pass finds the first one's reduction finished
    model.zero_grad()
    scores = wrapped(features[3 * rank : 3 * rank + 3]).log_softmax(-1)
    pairs = PreferencePairs(scores[:, 0], scores[:, 1], -torch.ones(3), -torch.ones(3))
    PairwiseNormalizedPreference(margin_loss("dpo")).backward(pairs, wrapped.parameters())
torch.save([one.grad for one in model.parameters()], f"{folder}/rank-{rank}.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
os._exit(0)  # gloo's threads now and then abort a process that ends in the usual way
