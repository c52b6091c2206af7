"""Responses put to other prompts than their own, from which KTO estimates how far a policy is from its reference."""

import torch
from jaxtyping import Int, Shaped
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def mismatched_responses(
    tokens: Int[Tensor, "sequences positions"],
    mask: Shaped[Tensor, "sequences positions"],
    attention_mask: Shaped[Tensor, "sequences positions"] | None = None,
) -> tuple[Int[Tensor, "sequences longest"], Int[Tensor, "sequences longest"], Int[Tensor, "sequences longest"]]:
    """Each prompt with the next sequence's response, the last with the first one's: tokens, response mask and attention mask.

    Prompts stand before their responses, which `mask` marks; padding is cut out, and put to the right. Of pairs hand over one
    side, or else a prompt may meet its own other response. Source: 2402.01306, section 4.1, the estimate of z₀.

    Raises ValueError for a single sequence, which has no other's response.

    >>> others = PreferenceBatch(*mismatched_responses(tokens, mask))
    >>> ratios = response_log_probs(model, others) - response_log_probs(reference, others)
    >>> margin_loss("kto", baseline=None)(replace(pairs, mismatched=ratios))
    """
    if len(tokens) < 2:
        raise ValueError("one sequence has no other's response to meet; hand over two or more")
    is_response = mask.bool()
    is_prompt = ~is_response if attention_mask is None else attention_mask.bool() & ~is_response
    rows, masks = [], []
    for own, other in enumerate(torch.arange(len(tokens)).roll(-1).tolist()):
        prompt, response = tokens[own][is_prompt[own]], tokens[other][is_response[other]]
        rows.append(torch.cat([prompt, response]))
        masks.append(torch.cat([torch.zeros_like(prompt), torch.ones_like(response)]))
    attended = pad_sequence([torch.ones_like(one) for one in rows], batch_first=True)
    return pad_sequence(rows, batch_first=True), pad_sequence(masks, batch_first=True), attended
