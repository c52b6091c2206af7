"""Run under torchrun by the tests: statistics of two processes with unequal shares."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from dynascope.rl.advantage_filter import across_processes, normalize_advantages, token_moments
from dynascope.rl.batch import PolicyBatch
from dynascope.rl.entropy.signal import EntropySignal
from dynascope.rl.objective import LossView
from dynascope.rl.risk.quantiles import QuantileTracker


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    own = slice(0, 3) if rank == 0 else slice(3, 10)
    tracker = QuantileTracker([0.2, 0.8], across_ranks=True)
    for scale in (1, 2):
        tracker.update(scale * torch.arange(10.0)[own])
    entropy = torch.arange(1.0, 11.0)[None, own]
    mask, one = torch.ones_like(entropy).bool(), torch.zeros(1)
    batch = PolicyBatch(mask=mask, rewards=one, group_ids=one.long(), entropy=entropy)
    signal = EntropySignal(scope="all ranks")(LossView(batch, torch.ones_like(entropy), torch.zeros_like(entropy)))
    values, one_row = torch.arange(10.0)[None, own], torch.ones(1, own.stop - own.start).bool()
    normal = normalize_advantages(values, one_row, across_processes(token_moments(values, one_row)))
    torch.save({"quantiles": tracker.values, "signal": signal, "normal": normal}, folder / f"rank-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads now and then abort a process that ends in the usual way


if __name__ == "__main__":
    main(Path(sys.argv[1]))
