"""Run once a rank (folder, rank): a buffer filled by two processes, a step of fine-tuning shared by them, of a model that both
hold and of one that is sharded; saves what came of it."""

import copy
import os
import sys

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from dynascope.rl.interleaving.demonstrations import Demonstrations
from dynascope.rl.interleaving.hardest import Entry, HardestQuestionBuffer, gathered, hardest_questions
from dynascope.rl.interleaving.interleave import FineTuning, Interleaver, fine_tune
from dynascope.rl.tasks.arithmetic import CHARACTERS, Arithmetic, Sum

task, problems = Arithmetic((2,)), [Sum(47, 85), Sum(10, 11), Sum(99, 1)]
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=len(CHARACTERS), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2,
)  # fmt: skip
model = LlamaForCausalLM(config)
alone, parts = copy.deepcopy(model), copy.deepcopy(model)


def whole(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def step(one: LlamaForCausalLM, micro_batch: int | None = None) -> tuple[torch.Tensor, list[float]]:
    optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
    how = FineTuning(micro_batch=micro_batch)
    told = fine_tune(one, task, problems, [problem.completion for problem in problems], optimizer, how)
    after = torch.cat([whole(parameter.detach()).flatten() for parameter in one.parameters()])
    return after, [float(told[name]) for name in ("loss", "gradient_norm")]


by_itself, loss_alone = step(alone)
folder, rank = sys.argv[1], int(sys.argv[2])
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
buffer = HardestQuestionBuffer(3)
own = hardest_questions([f"{rank}-a", f"{rank}-b", f"{rank}-c"], torch.tensor([0.0, 0.0, 1.0]))
buffer.put([Entry(question) for question in gathered(own)])
popped = [entry.question for entry in buffer.pop()]
after, loss = step(model)
mesh = init_device_mesh("cpu", (2,))
for layer in parts.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(parts, mesh=mesh)
sharded, loss_sharded = step(parts, micro_batch=1)  # three demonstrations: the second process has one pass less to do
try:
    Interleaver(parts, task, Demonstrations({}), recheck=1)
    refused = ""
except ValueError as error:
    refused = str(error)


# What each process would find solved differs; the first one's word counts.
class Contrary(Arithmetic):
    def are_right(self, problems, completions):  # type: ignore[no-untyped-def]
        return [(problem.first == 47) == (rank == 0) for problem in problems]


careful = Interleaver(alone, Contrary((2,)), Demonstrations(lambda one: one.completion), batch_size=3, recheck=2)
careful.see(problems, [False] * 3)
careful._take_in(0)
kept = [entry.question for entry in careful._still_hard(careful.buffer.pop(0))]

# A checkpoint of the sharded state, each process its own part, goes on as if nothing had been.
solved = Demonstrations({problem.prompt: problem.completion for problem in problems})
first, second = (Interleaver(parts, task, solved, batch_size=3, schedule="all", lr=1e-2) for _ in range(2))
first.see(problems, [False] * 3)
used = first.step(0)["demonstrations/used"]
torch.save(first.state_dict(), f"{folder}/state-{rank}.pt")
second.load_state_dict(torch.load(f"{folder}/state-{rank}.pt", weights_only=True))
moments = [
    [whole(state["exp_avg"]).sum() for state in one.optimizer.state.values()] for one in (first, second)
]  # fmt: skip
found = {
    "kept": kept, "used": used, "resumed": second.budget.used, "moments": [torch.stack(one) for one in moments],
    "popped": popped, "after": after, "alone": by_itself, "loss": loss, "loss_alone": loss_alone,
    "sharded": sharded, "loss_sharded": loss_sharded, "refused": refused,
}  # fmt: skip
torch.save(found, f"{folder}/rank-{rank}.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
os._exit(0)  # gloo's threads now and then abort a process that ends in the usual way
