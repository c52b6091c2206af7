"""What HAPO's parts cost beside DAPO, and against plain ways of doing the same: `python benchmarks/hapo.py`.

A step is the forward and backward pass and the optimizer's step of a small Llama on one minibatch. The plain ways are a
whole log-softmax for entropies, and a loop over groups for the average by tokens. Values are compared first.
"""

import argparse
import resource
import sys

import torch
from interleaved import medians, tell
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from dynascope.rl import dapo, hapo, token_entropy
from dynascope.rl.entropy.parts import token_group_advantage
from dynascope.rl.rollout import sample, score

NUM, WIDTH = 64, 64


def by_groups(rewards: Tensor, mask: Tensor, group_ids: Tensor, eps: float = 1e-6) -> Tensor:
    """The average by tokens, a group at a time, each token's value written out."""
    advantage = torch.zeros_like(rewards)
    for group in group_ids.unique().tolist():
        rows = [row for row in range(len(rewards)) if int(group_ids[row]) == group]
        values = torch.cat([rewards[row].expand(int(mask[row].sum())) for row in rows])
        for row in rows:
            advantage[row] = (rewards[row] - values.mean()) / (values.std(correction=0) + eps)
    return advantage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=10)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1000, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
            pad_token_id=0, bos_token_id=None, eos_token_id=1,
        )
    )  # fmt: skip
    rollout = sample(model, torch.randint(2, 1000, (NUM // 8, 16)), num_samples=8, max_new_tokens=WIDTH, stop_token=1)
    batch = rollout.batch((torch.rand(NUM) < 0.5).float())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    with torch.no_grad():
        known = score(model, rollout, {"entropy"})
    known["log_probs"] = (known["log_probs"] + 0.1 * torch.randn(NUM, rollout.tokens.shape[1])).requires_grad_()
    seen = {one: batch.having(advantage=one.advantages(batch), **known) for one in (dapo, hapo)}

    def step() -> None:
        optimizer.zero_grad()
        dapo.loss(batch.having(advantage=seen[dapo].advantage, **score(model, rollout, {"entropy"})))[0].backward()
        optimizer.step()

    print(f"the objective alone beside a step, {NUM} completions of {rollout.tokens.shape[1]} tokens, 4 layers of 128")
    measured = medians(
        {
            "a step with DAPO": step,
            "DAPO's loss and gradient": lambda: dapo.loss(seen[dapo])[0].backward(),
            "HAPO's loss and gradient": lambda: hapo.loss(seen[hapo])[0].backward(),
        },
        options.turns,
    )
    tell(measured, "a step with DAPO")
    more = measured["HAPO's loss and gradient"] - measured["DAPO's loss and gradient"]
    print(f"HAPO's parts take {more / measured['a step with DAPO']:.2%} of a step")

    logits = torch.randn(8, 128, 32_000)
    mask = torch.arange(128) < torch.randint(32, 129, (8, 1))
    plain = -(logits.log_softmax(-1).exp() * logits.log_softmax(-1)).sum(-1) * mask
    print(
        f"\nentropies of 8 x 128 tokens, vocabulary 32 000; differ by {(token_entropy(logits, mask) - plain).abs().max():.1e}"
    )
    tell(
        medians(
            {
                "in chunks": lambda: token_entropy(logits, mask),
                "log-softmax of everything": lambda: torch.distributions.Categorical(logits=logits).entropy(),
            },
            options.turns,
        ),
        "in chunks",
    )

    rewards, group_ids = (torch.rand(4096) < 0.5).float(), torch.arange(256).repeat_interleave(16)
    tokens = torch.arange(512) < torch.randint(1, 513, (4096, 1))
    found = token_group_advantage(rewards, tokens, group_ids, fallback=None)
    print(
        f"\naverage by tokens, 256 groups of 16; differ by {(found - by_groups(rewards, tokens, group_ids)).abs().max():.1e}"
    )
    tell(
        medians(
            {
                "by index": lambda: token_group_advantage(rewards, tokens, group_ids, fallback=None),
                "a group at a time": lambda: by_groups(rewards, tokens, group_ids),
            },
            max(1, options.turns // 5),
        ),
        "by index",
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"\npeak memory {peak / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
