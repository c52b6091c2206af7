"""TRL's DPOTrainer with the remedies for gradient entanglement in place of its loss's own gradient (arXiv 2410.13828)."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from trl import DPOTrainer

from dynascope.losses import disentangled_weights, normalized_weights
from dynascope.losses.disentangled import normalized_sides
from dynascope.losses.preference import Coefficients
from dynascope.probes.entanglement import PreferenceBatch, pair_products
from dynascope.watching.preference import coefficients_of
from dynascope.watching.undisturbed import undisturbed

TokenMask: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(chosen tokens, rejected tokens, their masks) -> which tokens the loss sees, as `contrastive_token_mask` tells."""


class _Tap:
    """In front of a model: keeps the log-probabilities of tokens that the loss was made of."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.log_probs: Tensor | None = None

    def __call__(self, **inputs: Any) -> Any:
        outputs = self.model(**inputs)
        self.log_probs = outputs.log_probs
        return outputs


class RemediedDPOTrainer(DPOTrainer):
    """A `DPOTrainer` whose steps do not pull chosen and rejected responses along with each other; in place of it, as it is.

    The loss, its numbers and the reference are the trainer's own, whatever `loss_type`; what changes is how hard it pulls on
    either response.

    Args:
        remedy: "normalized" takes `normalized_weights` pair by pair, "disentangled" `disentangled_weights`; each costs one
            more forward and backward pass. "normalized-batch" brings the batch's two gradients to the same length, as
            `PairwiseNormalizedPreference` does, over all processes: two more backward passes of the same forward pass, which
            asks for gradient checkpointing without `use_reentrant`. None leaves the weights alone.
        mask: Which tokens of the responses the loss sees, as `contrastive_token_mask`; `logps/chosen` and the like are then
            sums over these.

    Raises ValueError for `use_weighting` or `ld_alpha`, under which tokens of a response pull differently;
    and for a mask with `precompute_ref_log_probs`, which has sums over whole responses only.

    >>> trainer = RemediedDPOTrainer(model, args=args, train_dataset=data, remedy="normalized")
    """

    def __init__(
        self,
        *args: Any,
        remedy: Literal["normalized", "disentangled", "normalized-batch"] | None = "normalized",
        mask: TokenMask | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(*args, **settings)
        if remedy is not None and (self.use_weighting or self.ld_alpha is not None):
            raise ValueError(
                "a remedy weighs whole responses; leave use_weighting and ld_alpha out, or set remedy=None"
            )
        if mask is not None and self.precompute_ref_logps:
            raise ValueError("a mask needs the reference's tokens; set precompute_ref_log_probs=False")
        self.remedy, self.mask = remedy, mask

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **settings: Any) -> Any:
        """The trainer's loss; in training, with the remedied gradient."""
        if self.mask is not None:
            inputs = inputs | {"completion_mask": self._masked(inputs)}
        if self.remedy is None or not self.model.training:
            return super().compute_loss(model, inputs, *args, **settings)
        tap = _Tap(model)
        loss = super().compute_loss(tap, inputs, *args, **settings)
        assert tap.log_probs is not None
        mask = inputs["completion_mask"][:, 1:]
        (gradient,) = torch.autograd.grad(loss, tap.log_probs, retain_graph=True)
        # Adapters of prompts put tokens of their own in front.
        tokens, gradient = (one[:, -mask.shape[1] :] for one in (tap.log_probs, gradient))
        own = coefficients_of(gradient, mask)
        chosen, rejected = (tokens * mask).sum(1).chunk(2)
        pull, push = self._remedied(model, inputs, (chosen, rejected), own)
        # What the loss pulls less or more by; its value stays.
        change = ((push - own[1]) * rejected - (pull - own[0]) * chosen).mean()
        return loss + change - change.detach()

    def _masked(self, inputs: dict[str, Any]) -> Tensor:
        assert self.mask is not None
        (chosen, rejected), masks = inputs["input_ids"].chunk(2), inputs["completion_mask"].chunk(2)
        return torch.cat(self.mask(chosen, rejected, *masks)).to(inputs["completion_mask"].dtype)

    def _remedied(
        self, model: nn.Module, inputs: dict[str, Any], log_probs: tuple[Tensor, Tensor], own: Coefficients
    ) -> Coefficients:
        if self.remedy == "normalized-batch":
            trained = [one for one in model.parameters() if one.requires_grad]
            _, (pull, push) = normalized_sides(log_probs, own, trained)
            return pull * own[0], push * own[1]
        mask = inputs["completion_mask"]
        # Of a response without tokens that the loss sees there is no gradient to compare with.
        kept = (mask[:, 1:].sum(1) > 0).view(2, -1).all(0)
        if not bool(kept.any()):
            return own
        rows = torch.cat([kept, kept])
        batch = PreferenceBatch(inputs["input_ids"][rows], mask[rows], inputs["attention_mask"][rows])
        bare = self.accelerator.unwrap_model(model)
        with undisturbed(bare):
            products = pair_products(bare, batch)
        chosen, rejected, inner = (one.to(own[0].dtype) for one in (products.chosen, products.rejected, products.inner))
        weights = own[0][kept], own[1][kept]
        if self.remedy == "normalized":
            found = normalized_weights(chosen, rejected, weights)
        else:
            found = disentangled_weights(inner, chosen, rejected, weights)
        pull, push = (one.index_put((kept,), new) for one, new in zip(own, found, strict=True))
        return pull, push
