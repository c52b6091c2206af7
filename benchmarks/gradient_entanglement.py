"""What looking at the gradients of pairs costs a DPO step: `python benchmarks/gradient_entanglement.py`.

A step is forward and backward of 8 pairs, a forward pass of the reference, and AdamW, as TRL's DPOTrainer takes it; a look is at
2 pairs every 20 steps, `EntanglementDPOTrainer`'s default. The recipe takes one backward pass a response and keeps whole
gradients; products are compared first. Log-probabilities are timed, and what they keep for the backward pass weighed.
"""

import argparse
from collections.abc import Callable

import torch
from interleaved import medians, tell
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from dynascope.losses import token_log_probs
from dynascope.losses.preference import DPO
from dynascope.probes.entanglement import PreferenceBatch, entanglement, pair_products, response_log_probs

EVERY, PAIRS, LOOKED_AT = 20, 8, 2
LENGTH, VOCABULARY = 96, 8192


def batch_of(num_pairs: int) -> PreferenceBatch:
    tokens = torch.randint(1, VOCABULARY, (2 * num_pairs, LENGTH))
    mask = torch.ones_like(tokens)
    mask[:, : LENGTH // 3] = 0
    return PreferenceBatch(tokens, mask, torch.ones_like(tokens))


def looking() -> dict[str, Callable[[], object]]:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    model, reference = LlamaForCausalLM(config), LlamaForCausalLM(config).eval()
    optimizer, loss, batch, few = torch.optim.AdamW(model.parameters(), lr=1e-6), DPO(), batch_of(PAIRS), batch_of(2)

    def step() -> None:
        optimizer.zero_grad()
        with torch.no_grad():
            ref = response_log_probs(reference, batch)
        loss(batch.pairs(response_log_probs(model, batch), ref)).mean().backward()
        optimizer.step()

    def look() -> Tensor:
        products = pair_products(model, few)
        assert products.log_probs is not None
        weights = loss.coefficients(few.pairs(products.log_probs, products.log_probs))
        return entanglement(products, weights).case

    ghost, explicit = (pair_products(model, few, method=how).inner for how in ("ghost", "two_backward"))
    print(f"inner products differ by {float(((ghost - explicit) / explicit).abs().max()):.1e} of themselves")
    return {
        "training step": step,
        "look, ghost products": look,
        "look, two backwards a pair": lambda: pair_products(model, few, method="two_backward"),
    }


def kept(compute: Callable[[Tensor], Tensor], logits: Tensor) -> float:
    """Tensors as large as the logits that wait for the backward pass, beside the logits' own."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute(logits)
    storages.pop(logits.untyped_storage().data_ptr(), None)
    return sum(storages.values()) / logits.untyped_storage().nbytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    measured = medians(looking(), options.turns)
    tell(measured, "training step")
    share = measured["look, ghost products"] / EVERY / measured["training step"]
    print(f"a look every {EVERY} steps: {share:.1%} of a step")

    logits = torch.randn(2 * PAIRS, 512, VOCABULARY).requires_grad_()
    tokens, mask = torch.randint(VOCABULARY, (2 * PAIRS, 512)), torch.ones(2 * PAIRS, 512)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "token_log_probs": lambda given: token_log_probs(given, tokens, mask).sum(),
        "log_softmax and gather": lambda given: (
            given[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0].sum()
        ),
    }
    print()
    for name, way in ways.items():
        print(f"{name:46} keeps {kept(way, logits):.2f} times the logits beside them")
    tell(
        medians({name: (lambda way=way: way(logits).backward()) for name, way in ways.items()}, options.turns),
        "log_softmax and gather",
    )


if __name__ == "__main__":
    main()
