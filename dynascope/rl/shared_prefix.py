"""Log-probabilities of groups of completions with each prompt worked out once, and training on them (arXiv 2506.05433)."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dynascope.nn.shared_prefix.attention import Backend
from dynascope.nn.shared_prefix.layout import SharedPrefix
from dynascope.nn.shared_prefix.models import shared_prefix_forward, shared_prefix_hidden, unwrapped, warn_of_dropout
from dynascope.nn.shared_prefix.tree import PrefixTree
from dynascope.rl.hidden import refuse_changed_logits
from dynascope.rl.logits import completion_logits
from dynascope.rl.prompt_groups import PromptGroups
from dynascope.rl.token_entropy import entropy_of

_FEWEST, _WORTHWHILE = 64, 1 / 4
"""Tokens, and the share of all, that have to go before the packing is worth its time (measured on CPUs)."""


def pays(layout: SharedPrefix) -> bool:
    """Whether working prompts out once is worth the packing.

    >>> pays(groups.layout)
    """
    tokens = int((layout.prompt_lengths * layout.group_sizes).sum() + layout.completion_lengths.sum())
    return tokens - int(layout.padding_mask.sum()) >= max(_FEWEST, _WORTHWHILE * tokens)


def grouped_log_probs(
    model: nn.Module,
    groups: PromptGroups,
    *,
    temperature: float = 1.0,
    share: bool | None = None,
    backend: Backend = "auto",
    chunk: int | None = None,
    entropy: bool = False,
    differentiable_entropy: bool = False,
) -> tuple[Float[Tensor, "N R"], Float[Tensor, "N R"] | None]:
    """log π of every token of the completions, 0 where there is none, and if asked the entropies they were drawn with.

    Equal to those of the batch that repeats each prompt for each completion, and so are their gradients. `share` says
    whether prompts are packed or repeated; None packs where it pays. `backend` is that of `grouped_attention`. Only what
    predicts a completion's token reaches the output head; with `chunk`, so many at once, which are worked out again in the
    backward pass. Entropies have no gradient unless `differentiable_entropy`.

    Raises ValueError as `shared_prefix_forward` does, and for `chunk` with a model that changes its logits behind the head.

    >>> log_probs, _ = grouped_log_probs(model, groups, temperature=0.9)
    """
    layout = groups.layout
    of_cells = partial(
        _of_cells, temperature=temperature, entropy=entropy, differentiable_entropy=differentiable_entropy
    )
    # Where no completion has a token nothing is asked of the head, yet a loss of 0 must reach the weights.
    if share is False or not bool(groups.mask.any()) or (share is None and not pays(layout)):
        of = layout.group_of
        logits = completion_logits(model, groups.prompts[of], groups.prompt_mask[of], groups.completions)
        cell_of, targets = torch.arange(groups.mask.numel(), device=logits.device), groups.completions.flatten()
        log_probs, entropies = of_cells(logits.flatten(0, 1), cell_of, targets)
        return _placed(log_probs, entropies, groups.mask)

    cells = layout.logit_positions
    rows = layout.pack(groups.prompts, groups.completions)
    cell_of, targets = torch.searchsorted(cells, layout.target_index.flatten()), groups.completions.flatten()
    if chunk is None:
        logits = shared_prefix_forward(model, rows, layout, backend=backend, cells=cells).logits[0]
        log_probs, entropies = of_cells(logits, cell_of, targets)
        return _placed(log_probs, entropies, groups.mask)

    refuse_changed_logits(model)
    head: nn.Module = unwrapped(model).get_output_embeddings()
    hidden = shared_prefix_hidden(model, rows, layout, cells, backend=backend)

    def of_chunk(part: Tensor, numbers: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        return of_cells(head(part), numbers, tokens)

    wide = torch.promote_types(hidden.dtype, torch.float32)
    told = torch.zeros(len(targets), dtype=wide, device=hidden.device)
    entropies = torch.zeros_like(told) if entropy else None
    order = cell_of.argsort()
    bounds = torch.searchsorted(
        cell_of[order], torch.arange(0, len(cells) + chunk, chunk, device=cells.device)
    ).tolist()
    for number, part in enumerate(hidden.split(chunk)):
        chosen = order[bounds[number] : bounds[number + 1]]
        log_probs, spread = checkpoint(
            of_chunk, part, cell_of[chosen] - number * chunk, targets[chosen], use_reentrant=False
        )
        told = told.index_put((chosen,), log_probs)
        if entropies is not None:
            entropies = entropies.index_put((chosen,), spread)
    return _placed(told, entropies, groups.mask)


def tree_log_probs(
    model: nn.Module, tree: PrefixTree, *, temperature: float = 1.0, backend: Backend = "auto"
) -> Float[Tensor, "N targets"]:
    """log π of every token but the first of sequences that begin alike, whatever they share worked out once; 0 at padding.

    For rollouts of several turns that branch; `tree.has_target` says where there is one. Equal to those of the sequences one
    by one, and so are the gradients. Raises ValueError as `shared_prefix_forward` does.

    >>> tree_log_probs(model, PrefixTree.of(input_ids, attention_mask))
    """
    cells: Tensor = tree.target_index[tree.has_target].unique()
    logits = shared_prefix_forward(model, tree.rows, tree, backend=backend, cells=cells).logits[0]
    targets = tree.rows[0, tree.cell_of[:, 1:]].flatten()
    # What has no target is left out at the end, wherever it points.
    cell_of = torch.searchsorted(cells, tree.target_index.flatten()).clamp(max=len(cells) - 1)
    log_probs, _ = _of_cells(logits, cell_of, targets, temperature)
    return _placed(log_probs, None, tree.has_target)[0]


def _of_cells(
    logits: Tensor,
    cell_of: Tensor,
    targets: Tensor,
    temperature: float,
    entropy: bool = False,
    differentiable_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log π of targets, each predicted by the logits of a cell; several targets may share one."""
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    logits = logits / temperature if temperature != 1.0 else logits
    normalizer = logits.logsumexp(-1)
    log_probs = logits[cell_of, targets] - normalizer[cell_of]
    if not entropy:
        return log_probs, None
    with torch.set_grad_enabled(differentiable_entropy and torch.is_grad_enabled()):
        return log_probs, entropy_of(logits - normalizer[:, None])[cell_of]


def _placed(log_probs: Tensor, entropies: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    log_probs = log_probs.view_as(mask).masked_fill(~mask, 0.0)
    return log_probs, None if entropies is None else entropies.view_as(mask).masked_fill(~mask, 0.0)


def prefix_backward(
    model: nn.Module,
    groups: PromptGroups,
    loss: Callable[[Float[Tensor, "n R"], Int[Tensor, " n"]], Float[Tensor, ""]],
    *,
    size: int,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """Accumulate the gradient of a loss of log-probabilities with `size` completions in memory at a time, and return the loss.

    `loss(log_probs, rows)` gets some completions' log-probabilities and their numbers; the whole loss is the sum over all
    calls. A prompt runs once; its keys and values are held as leaves while its completions run behind them in parts, and
    one backward pass through the prompt ends its group. So memory grows with `size`, not with the group. Exact, but for
    dropout, of which it warns.

    Raises ValueError under gradient checkpointing, which knows no cache, and for sliding windows.

    >>> prefix_backward(model, groups, lambda log_probs, rows: -(advantage[rows] * log_probs.sum(1)).mean(), size=2)
    """
    from transformers import DynamicCache

    if size < 1:
        raise ValueError(f"size={size}: at least one completion must run at a time")
    text = unwrapped(model).config.get_text_config()
    if set(getattr(text, "layer_types", None) or ()) - {"full_attention"} or getattr(text, "sliding_window", None):
        raise ValueError("keys and values of a prompt are kept whole, which sliding windows do not want")
    if any(getattr(one, "gradient_checkpointing", False) for one in model.modules()):
        raise ValueError("gradient checkpointing keeps no keys and values: switch it off for prefix_backward")
    warn_of_dropout(unwrapped(model))
    total = torch.zeros((), device=groups.prompts.device)
    for row, numbers in enumerate(_rows_of_groups(groups.group_sizes)):
        prompt = groups.prompts[row][groups.prompt_mask[row]][None]
        output = model(input_ids=prompt, use_cache=True)
        kept = [one for layer in output.past_key_values.layers for one in (layer.keys, layer.values)]
        kept.append(output.logits[:, -1:])
        leaves = [one.detach().requires_grad_() for one in kept]
        for rows in numbers.split(size):
            width = max(1, int(groups.mask[rows].sum(1).max()))
            tokens, mask = groups.completions[rows, :width], groups.mask[rows, :width]
            cache = DynamicCache()
            for layer, (keys, values) in enumerate(zip(leaves[:-1:2], leaves[1:-1:2], strict=True)):
                cache.update(*(one.expand(len(rows), -1, -1, -1) for one in (keys, values)), layer)
            behind = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits[:, :-1]
            logits = torch.cat([leaves[-1].expand(len(rows), -1, -1), behind], 1).flatten(0, 1)
            cell_of = torch.arange(len(logits), device=logits.device)
            log_probs, _ = _placed(*_of_cells(logits, cell_of, tokens.flatten(), temperature), mask)
            part = loss(nn.functional.pad(log_probs, (0, groups.mask.shape[1] - width)), rows)
            part.backward()
            total = total + part.detach()
        reached = [(one, leaf.grad) for one, leaf in zip(kept, leaves, strict=True) if leaf.grad is not None]
        torch.autograd.backward([one for one, _ in reached], [gradient for _, gradient in reached])
    return total


def _rows_of_groups(sizes: Tensor) -> Iterator[Tensor]:
    yield from torch.arange(int(sizes.sum()), device=sizes.device).split(sizes.tolist())


def kept_bytes(model: nn.Module, groups: PromptGroups, *, share: bool) -> int:
    """Bytes of the tensors that autograd keeps from forward to backward, each storage once, weights left out: measured.

    >>> kept_bytes(model, groups, share=True) / kept_bytes(model, groups, share=False)
    """
    weights = {one.untyped_storage().data_ptr() for one in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def see(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        grouped_log_probs(model, groups, share=share)
    return sum(kept.values())


def assert_equivalent(
    model: nn.Module, groups: PromptGroups, *, backend: Backend = "auto", rtol: float = 1e-4
) -> dict[str, float]:
    """Check on your own model that shared prompts change nothing: log-probabilities, and gradients of all parameters.

    The gradients are of a sum with alternating weights; a missing one counts as 0. Returns
    the largest differences, relative to the largest entry
    there is. Gradients that parameters hold stay as they are. Raises AssertionError when one is above `rtol`.

    >>> assert_equivalent(model, groups)
    {'log_probs': 3e-07, 'gradients': 8e-07}
    """
    weights = torch.linspace(1.0, -0.7, groups.mask.numel(), device=groups.mask.device).view_as(groups.mask)
    parameters = [one for one in model.parameters() if one.requires_grad]

    def told(share: bool) -> tuple[Tensor, list[Tensor]]:
        log_probs, _ = grouped_log_probs(model, groups, share=share, backend=backend)
        gradients = torch.autograd.grad((log_probs * weights).sum(), parameters, materialize_grads=True)
        return log_probs.detach(), list(gradients)

    (mine, own), (repeated, others) = told(True), told(False)
    pairs = list(zip(own, others, strict=True))
    largest = max(float(other.abs().max()) for _, other in pairs)
    differences = {
        "log_probs": float((mine - repeated).abs().max() / repeated.abs().max()),
        "gradients": max(float((one - other).abs().max()) for one, other in pairs) / largest,
    }
    if not max(differences.values()) <= rtol:
        raise AssertionError(f"shared prompts differ from repeated ones by {differences}, more than rtol={rtol}")
    return differences
