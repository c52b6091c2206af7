"""Learning rates of their own for attention and decoder: the dial of how sparse attention becomes (2305.16380)."""

import re
from typing import Any

from torch import nn

# Query and key maps by the names that models give them; where one matrix holds values too, it is taken whole.
_QUERY_KEY = re.compile(
    r"(^|\.)(q|k|q_proj|k_proj|q_lin|k_lin|query|key|wq|wk|w_q|w_k|to_q|to_k|q_norm|k_norm|qkv|qkv_proj|wqkv|c_attn|to_qkv"
    r"|query_key_value|in_proj|z|z_query|z_key)(\.(weight|bias|lora_[ab].*|parametrizations.*))?$"
    r"|(^|\.)in_proj_(weight|bias)$|(^|\.)(q|k)_proj_weight$",
    re.IGNORECASE,
)
_DECODER = re.compile(r"(^|\.)(y|y_next|y_context)$", re.IGNORECASE)


def attention_decoder_param_groups(model: nn.Module, lr: float, decoder_multiplier: float) -> list[dict[str, Any]]:
    """Groups for any `torch.optim` optimizer: queries and keys at `lr`, the decoder at `decoder_multiplier` times it.

    A faster decoder freezes attention earlier and leaves it denser; a slower one lets attention scan for longer. Queries
    and keys are known by their usual names (a fused query-key-value matrix counts whole), the decoder is the model's
    output embedding (Hugging Face) or else its last linear layer; a decoder tied to the input embedding takes it along.
    What is neither is a third group, "others", at `lr`. Frozen parameters are left out. In plain SGD momentum 0.9 makes
    every rate ten times what the theory's gradient flow calls by that name. Source: 2305.16380 (phase
    transition, and the experiments on both rates).

    Raises ValueError for rates that are not above 0, or a model in which one of the two is not found.

    >>> optimizer = torch.optim.AdamW(attention_decoder_param_groups(model, 3e-4, decoder_multiplier=0.2))
    >>> trainer = transformers.Trainer(model, args, optimizers=(optimizer, None))
    """
    if lr <= 0 or decoder_multiplier <= 0:
        raise ValueError(f"lr={lr} and decoder_multiplier={decoder_multiplier} must be above 0")
    decoder = _decoder_ids(model)
    groups: dict[str, list[nn.Parameter]] = {"attention": [], "decoder": [], "others": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_decoder = id(parameter) in decoder or bool(_DECODER.search(name))
        kind = "decoder" if is_decoder else "attention" if _QUERY_KEY.search(name) else "others"
        groups[kind].append(parameter)
    for kind, looked_for in (("attention", "query and key maps"), ("decoder", "an output layer")):
        if not groups[kind]:
            raise ValueError(f"{type(model).__name__} has no trainable {looked_for} that could be recognised by name")
    rates = {"attention": lr, "decoder": lr * decoder_multiplier, "others": lr}
    return [{"params": params, "lr": rates[kind], "name": kind} for kind, params in groups.items() if params]


def _decoder_ids(model: nn.Module) -> set[int]:
    output: nn.Module | None
    asked = getattr(model, "get_output_embeddings", None)
    if callable(asked):
        output = asked()
    else:
        linears = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and not _QUERY_KEY.search(name)]
        output = linears[-1] if linears else None
    return set() if output is None else {id(parameter) for parameter in output.parameters()}
