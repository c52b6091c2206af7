"""What a teacher costs: `python benchmarks/kdrl.py`.

Steps of training from rewards alone, with a teacher, with one that is shown wrong answers only, and against its whole
distributions; and the teacher's pass alone: a few completions at a time, all at once, with a log-softmax over the vocabulary
that is kept, and the exact divergence, for which the policy's pass is needed as well.
"""

import argparse
import copy
from collections.abc import Callable

import torch
from interleaved import medians, tell
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from dynascope.rl import KLTerm, PolicyObjective, TeacherScorer, exact_teacher_kl, grpo, kdrl
from dynascope.rl.logits import completion_logits
from dynascope.rl.loop import LoopConfig, train
from dynascope.rl.presets import kdrl_masking_response
from dynascope.rl.rollout import Rollout, sample
from dynascope.rl.tasks.arithmetic import Arithmetic
from dynascope.rl.tasks.base_model import BaseModel, base_model


def step(objective: PolicyObjective, start: nn.Module, teacher: nn.Module) -> Callable[[], None]:
    """Four steps of training of a copy that goes on from call to call; the first of a call also checks the teacher."""
    model = copy.deepcopy(start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    generator = torch.Generator().manual_seed(0)
    amount = LoopConfig(num_steps=4, num_prompts=32)
    return lambda: train(model, objective, Arithmetic(), optimizer, amount, generator=generator, teacher=teacher)


@torch.no_grad()
def kept_whole(teacher: nn.Module, rollout: Rollout) -> Tensor:
    """As it is often written."""
    logits = completion_logits(teacher, rollout.prompts, rollout.prompt_mask, rollout.tokens)
    return logits.float().log_softmax(-1).gather(-1, rollout.tokens[..., None])[..., 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=11)
    turns = parser.parse_args().turns
    torch.manual_seed(0)
    start = base_model(BaseModel(num_steps=200), seed=0)
    teacher = base_model(BaseModel(num_steps=400), seed=1)
    print("four steps of training, 32 prompts of 8 answers, student and teacher of 2 layers of width 64")
    ours = {"grpo": grpo, "kdrl": kdrl, "kdrl, wrong answers only": kdrl_masking_response}
    ours["kdrl, whole distributions"] = kdrl.having(kl=(KLTerm("teacher", "full", 2e-3),))
    tell(medians({name: step(one, start, teacher) for name, one in ours.items()}, turns), "grpo")

    config = LlamaConfig(
        vocab_size=32_000, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
    )
    large = LlamaForCausalLM(config)
    prompts = torch.randint(3, 32_000, (4, 8))
    rollout = sample(large, prompts, num_samples=4, max_new_tokens=48, stop_token=2)
    print("\nthe teacher's pass, 16 completions of 48 tokens, a vocabulary of 32 000")
    contenders: dict[str, Callable[[], object]] = {
        "4 completions at a time": lambda: TeacherScorer(large, 4)(rollout),
        "all at once": lambda: TeacherScorer(large)(rollout),
        "a log-softmax that is kept": lambda: kept_whole(large, rollout),
        "4 at a time, the likeliest 20 alone": lambda: TeacherScorer(large, 4, top_k=20)(rollout),
        "4 at a time, exact divergence": lambda: exact_teacher_kl(large, TeacherScorer(large, 4), rollout),
    }
    difference = (TeacherScorer(large, 4)(rollout) - kept_whole(large, rollout) * rollout.mask).abs().max()
    print(f"largest difference {difference:.1e} nats")
    tell(medians(contenders, turns), "a log-softmax that is kept")


if __name__ == "__main__":
    main()
