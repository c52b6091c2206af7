"""What reaches a model's output head at completions, so that the head can be applied bit by bit."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dynascope.nn.shared_prefix.models import before_head, unwrapped
from dynascope.rl.logits import completion_inputs


def completion_hidden(
    model: nn.Module,
    prompts: Int[Tensor, "N P"],
    prompt_mask: Bool[Tensor, "N P"],
    completions: Int[Tensor, "N T"],
) -> Float[Tensor, "N T width"]:
    """As `completion_logits`, but what goes into the output head, which then sees one token alone.

    Raises ValueError for a model that changes its logits behind the head.

    >>> logits = model.get_output_embeddings()(completion_hidden(model, prompts, prompt_mask, completions)[:, :100])
    """
    refuse_changed_logits(model)
    caught: list[Tensor] = []

    def catch(hidden: Tensor) -> Tensor:
        caught.append(hidden[:, -completions.shape[1] :])
        return hidden[:1, :1]

    with before_head(unwrapped(model), catch):
        model(**completion_inputs(prompts, prompt_mask, completions), use_cache=False)
    return torch.cat(caught)


def refuse_changed_logits(model: nn.Module) -> None:
    """Raises ValueError for a model whose logits are not what its output head says.

    >>> refuse_changed_logits(model)
    """
    text = unwrapped(model).config.get_text_config()
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(text, name, None) not in (None, 1, 1.0):
            raise ValueError(f"chunk= applies the output head alone, but this model also has {name}; leave chunk out")
