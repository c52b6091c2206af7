"""What the three parts of StableReinforce cost a step, and the referee's calls saved: `python benchmarks/stable_reinforce.py`.

The objective is evaluated forward and backward on ready log-probabilities, with the parts and without; the whole step beside it
is a rollout and an update of a 2-layer Llama. The referee is asked as the usual loop asks, about every completion, and as ours.
"""

import argparse

import torch
from interleaved import medians, tell

from dynascope.rl import AdvantageFilter, PolicyBatch, PolicyObjective, reinforce_pp
from dynascope.rl.advantages import WhitenedReturns
from dynascope.rl.loop import LoopConfig, train
from dynascope.rl.tasks.arithmetic import Arithmetic, answer_reward
from dynascope.rl.tasks.base_model import BaseModel
from dynascope.rl.tasks.pairwise import ConsistencyReward, JudgeReward

plain = reinforce_pp.having(advantage=WhitenedReturns(0.0))
stable = plain.having(pre_clip=(1e-3, 1e3), post=(AdvantageFilter(),))


def evaluate(objective: PolicyObjective, batch: PolicyBatch) -> None:
    loss, _ = objective.loss(batch.having(advantage=objective.advantages(batch)))
    loss.backward()


def batch_of(num: int, width: int) -> PolicyBatch:
    mask = torch.arange(width) < torch.randint(1, width + 1, (num,))[:, None]
    return PolicyBatch(
        mask=mask,
        rewards=(torch.rand(num) < 0.7).float(),
        group_ids=torch.arange(num),
        behaviour_log_probs=-torch.rand(num, width),
        log_probs=(-torch.rand(num, width)).requires_grad_(),
    )


def calls(num: int) -> None:
    """How often a referee is asked about completions of which half are right and a fifth says what another said."""
    random = torch.Generator().manual_seed(0)
    thoughts = torch.randint(int(0.8 * num), (num,), generator=random).tolist()
    answers = torch.randint(1, 3, (num,), generator=random).tolist()
    texts = [f"<think>step\nso {one}</think><answer>{two}</answer>" for one, two in zip(thoughts, answers, strict=True)]
    consistency = ConsistencyReward(lambda thought, answer: 1)
    JudgeReward(consistency)(completions=texts, label=[1] * num)
    print(f"\nreferee: {consistency.num_calls} calls for {num} completions ({consistency.num_calls / num:.2f}x)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=30)
    options = parser.parse_args()
    torch.manual_seed(0)
    task = Arithmetic((2,))
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(BaseModel(task).config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    generator = torch.Generator().manual_seed(0)
    step = LoopConfig(num_steps=1, num_prompts=64, num_samples=1, num_minibatches=1)

    def whole() -> None:
        train(model, plain, task, optimizer, step, generator=generator, rewards=answer_reward)

    for num, width in ((64, 24), (256, 1024)):
        batch = batch_of(num, width)
        print(f"\n{num} completions of at most {width} tokens")
        contenders = {
            "REINFORCE++": lambda b=batch: evaluate(plain, b),
            "StableReinforce": lambda b=batch: evaluate(stable, b),
        }
        if width == 24:
            contenders["a whole step of the loop"] = whole
        tell(medians(contenders, options.turns), "REINFORCE++")
    calls(1000)


if __name__ == "__main__":
    main()
