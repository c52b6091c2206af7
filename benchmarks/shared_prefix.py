"""What sharing prompts saves: `python benchmarks/shared_prefix.py [--turns 5]`, the peer after `pip install prefix_grouper`.

Forward and backward of the log-probabilities of all completions of one prompt; a Llama of 4 layers, width 128, 256 tokens;
contenders in turns, medians.

1. The grid of prompts, completions and groups: repeated prompts, ours (automatic), and the paper's own package with PyTorch's
   attention. Bars: never above 1.05x repeated; below the package everywhere.
2. Prompt to completion 8:1, group 8: share of time that is left over share of FLOPs; bar 1.3.
3. Time of `prefix_backward`, which holds few completions at a time.
4. Groups of 150 to 1600 tokens, a row each or sharing rows of 1700; bar: below 1.
5. A tree of 4 conversations that branch twice, in parts or with a dense mask; bar: below 1.
"""

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from interleaved import medians
from torch import Tensor
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from dynascope.nn.shared_prefix import Backend, PrefixTree, estimate_savings
from dynascope.rl.prompt_groups import PromptGroups
from dynascope.rl.shared_prefix import grouped_log_probs, prefix_backward, tree_log_probs

PROMPTS, COMPLETIONS, GROUPS = (16, 128, 512), (8, 32, 128), (2, 8)


def make_groups(prompt: int, completion: int, group: int) -> PromptGroups:
    """One prompt of random tokens and its completions."""
    seen = torch.ones(group, max(prompt, completion)).bool()
    tokens = torch.randint(256, (group, completion))
    return PromptGroups(
        torch.randint(256, (1, prompt)), seen[:1, :prompt], tokens, seen[:, :completion], torch.tensor([group])
    )


def peer_step(model: Any, groups: PromptGroups) -> Callable[[], None]:
    """The package as its documentation has it, with attention by PyTorch; what it works out once is left out of the time."""
    from prefix_grouper import PrefixGrouper
    from torch.nn.attention.bias import causal_lower_right

    grouper = PrefixGrouper.from_ungrouped_masks(groups.prompt_mask, groups.mask, groups.group_sizes.tolist())
    rows = grouper.concat_input(groups.prompts, groups.prompt_mask, groups.completions, groups.mask)
    positions = groups.layout.position_ids

    def causal(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        bias = None if q.shape[2] == k.shape[2] else causal_lower_right(q.shape[2], k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None).transpose(1, 2)

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
        return grouper.forward(causal, q, k, v), None

    def step() -> None:
        AttentionInterface.register("peer", attention)
        model.set_attn_implementation("peer")
        everything = torch.ones(1, 1, 1, 1)
        logits = model(input_ids=rows, position_ids=positions, attention_mask=everything, use_cache=False).logits
        model.set_attn_implementation("sdpa")
        behind = grouper.split_output(logits, include_prefix_last=1)[2][:, :-1]
        (-F.cross_entropy(behind.mT, groups.completions, reduction="none")).sum().backward()

    return step


def main() -> None:
    """Print every figure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=5)
    turns = parser.parse_args().turns
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=4096, **sizes))
    has_peer = importlib.util.find_spec("prefix_grouper") is not None
    if not has_peer:
        print("prefix_grouper: not installed")

    def step(groups: PromptGroups, share: bool | None) -> Callable[[], object]:
        return lambda: grouped_log_probs(model, groups, share=share)[0].sum().backward()

    print(
        f"{'prompt':>7}{'compl.':>7}{'group':>6}{'repeated':>12}{'ours':>9}{'package':>9}{'FLOPs':>8}   (times the repeated)"
    )
    for prompt in PROMPTS:
        for completion in COMPLETIONS:
            for group in GROUPS:
                groups = make_groups(prompt, completion, group)
                contenders = {"repeated": step(groups, False), "ours": step(groups, None)}
                if has_peer:
                    contenders["package"] = peer_step(model, groups)
                told = medians(contenders, turns)
                base = told["repeated"]
                flops = estimate_savings(groups.layout, model.config).flops_ratio
                package = f"{told['package'] / base:9.3f}" if has_peer else " " * 9
                print(
                    f"{prompt:7}{completion:7}{group:6}{1e3 * base:9.1f} ms{told['ours'] / base:9.3f}{package}{flops:8.3f}"
                )
    print("\nprompt : completion 8 : 1, group 8; bar: time left over FLOPs left 1.3")
    for prompt in (256, 512, 1024):
        groups = make_groups(prompt, prompt // 8, 8)
        told = medians({"repeated": step(groups, False), "ours": step(groups, None)}, turns)
        left, flops = told["ours"] / told["repeated"], estimate_savings(groups.layout, model.config).flops_ratio
        assert flops is not None
        print(f"{prompt:7} tokens: time {left:.3f}, FLOPs {flops:.3f}, {left / flops:.2f}x")

    print("\ntime of prefix_backward, 512 : 64, group 8, by completions at a time, over all at once packed")
    groups = make_groups(512, 64, 8)

    def in_parts(size: int) -> Callable[[], object]:
        return lambda: prefix_backward(model, groups, lambda log_probs, rows: log_probs.sum(), size=size)

    told = medians({"packed": step(groups, True), **{str(size): in_parts(size) for size in (1, 2, 4, 8)}}, turns)
    print(", ".join(f"{name}: {seconds / told['packed']:.2f}x" for name, seconds in told.items()))

    lengths = torch.tensor([1024, 64, 32, 256, 128, 512])
    prompt_mask = torch.arange(1024) < lengths[:, None]
    mask = torch.arange(128) < (torch.arange(48) % 8 * 8 + 16)[:, None]
    ragged = PromptGroups(
        torch.randint(256, (6, 1024)), prompt_mask, torch.randint(256, (48, 128)), mask, torch.full((6,), 8)
    )
    told = medians({"alone": step(ragged, True), "sharing": step(replace(ragged, row_length=1700), True)}, turns)
    print(f"\nragged groups in shared rows: {told['sharing'] / told['alone']:.2f}x a row each")

    ids = torch.randint(256, (16, 768))
    for width, rows in ((256, 4), (512, 2)):
        ids[:, :width] = ids[::rows, :width].repeat_interleave(rows, 0)
    tree = PrefixTree.of(ids, torch.ones_like(ids))

    def by(backend: Backend) -> Callable[[], object]:
        return lambda: tree_log_probs(model, tree, backend=backend).sum().backward()

    told = medians({"dense_mask": by("dense_mask"), "cascade": by("cascade")}, turns)
    print(f"a tree of {tree.shape[1]} tokens: in parts {told['cascade'] / told['dense_mask']:.2f}x the dense mask")


if __name__ == "__main__":
    main()
