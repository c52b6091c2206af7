"""Run once a rank (folder, rank): a buffer filled by two processes, a step of fine-tuning shared by them; saves both."""

import copy
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dynascope.rl.interleaving.hardest import HardestQuestionBuffer
from dynascope.rl.interleaving.interleave import fine_tune
from dynascope.rl.tasks.arithmetic import CHARACTERS, Arithmetic, Sum

task, problems = Arithmetic((2,)), [Sum(47, 85), Sum(10, 11), Sum(99, 1)]
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=len(CHARACTERS), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2,
)  # fmt: skip
model = LlamaForCausalLM(config)
alone = copy.deepcopy(model)


def step(one: LlamaForCausalLM) -> tuple[torch.Tensor, float]:
    optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
    told = fine_tune(one, task, problems, [problem.completion for problem in problems], optimizer)
    return torch.cat([parameter.detach().flatten() for parameter in one.parameters()]), float(told["loss"])


by_itself, loss_alone = step(alone)
folder, rank = sys.argv[1], int(sys.argv[2])
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
buffer = HardestQuestionBuffer(3)
buffer.update([f"{rank}-a", f"{rank}-b", f"{rank}-c"], torch.tensor([[False], [False], [True]]))
popped = [entry.question for entry in buffer.pop()]
after, loss = step(model)
found = {"popped": popped, "after": after, "alone": by_itself, "loss": loss, "loss_alone": loss_alone}
torch.save(found, f"{folder}/rank-{rank}.pt")
torch.distributed.destroy_process_group()
