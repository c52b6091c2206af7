"""A compiled model asked for chosen cells and for all, in either order: prints "right" for each answer that is."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dynascope.nn.shared_prefix import SharedPrefix, shared_prefix_forward

torch.manual_seed(0)
sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).double()
layout = SharedPrefix.of(torch.ones(2, 5), torch.ones(4, 3), 2)
rows = layout.pack(torch.randint(1, 20, (2, 5)), torch.randint(1, 20, (4, 3)))
chosen = layout.logit_positions
whole = shared_prefix_forward(model, rows, layout).logits
for order in ((chosen, None, chosen), (None, chosen, None)):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for cells in order:
        told = shared_prefix_forward(compiled, rows, layout, cells=cells).logits
        expected = whole if cells is None else whole.flatten(0, 1)[cells][None]
        is_right = told.shape == expected.shape and torch.allclose(told, expected, atol=1e-6)
        print("right" if is_right else f"wrong {tuple(told.shape)}")
