"""TRL's DPOTrainer with the geometry of its gradients among its numbers (arXiv 2410.13828)."""

from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from trl import DPOTrainer

from dynascope.kernels.pairs import trained_parameters
from dynascope.losses.preference import Coefficients
from dynascope.probes.entanglement import (
    Case,
    PreferenceBatch,
    entanglement,
    pair_products,
    predicted_changes,
    response_log_probs,
    summarized,
)
from dynascope.watching.undisturbed import undisturbed


class LooksAtPairs:
    """In front of a trainer of pairs: every few steps a look at the first pairs of the batch, before it trains on them.

    At the next step the same pairs are seen again, which tells what the step between did to them.
    """

    def __init__(
        self,
        *args: Any,
        entanglement_every: int = 20,
        entanglement_pairs: int = 2,
        entanglement_keeps_weights: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(*args, **settings)
        if min(entanglement_every, entanglement_pairs) < 1:
            raise ValueError("entanglement_every and entanglement_pairs must be at least 1")
        self.entanglement_every, self.entanglement_pairs = entanglement_every, entanglement_pairs
        self.entanglement_keeps_weights = entanglement_keeps_weights
        self._looked_at = -1
        self._seen: _Seen | None = None

    def compute_loss(self: Any, model: nn.Module, inputs: dict[str, Any], *args: Any, **settings: Any) -> Any:
        """The trainer's loss; on steps whose turn it is, after a look at the pairs."""
        step, bare = self.state.global_step, self.accelerator.unwrap_model(model)
        if self.model.training and self._seen is not None and step > self._looked_at:
            self._tell(self._seen.changes(bare))
            self._seen = None
        if self.model.training and step % self.entanglement_every == 0 and step != self._looked_at:
            self._looked_at = step  # once a step, however many batches are accumulated
            self._tell(self._look(bare, inputs))
        return super().compute_loss(model, inputs, *args, **settings)  # type: ignore[misc]

    def _look(self: Any, model: nn.Module, inputs: dict[str, Any]) -> dict[str, float]:
        few, batch = self._pairs(inputs)
        with undisturbed(model):
            products = pair_products(model, batch)
            weights = self._coefficients(few, products.log_probs)
        assert products.log_probs is not None
        kept = trained_parameters(model) if self.entanglement_keeps_weights else {}
        self._seen = _Seen(batch, products.log_probs, {name: one.detach().clone() for name, one in kept.items()})
        lr = self.optimizer.param_groups[0]["lr"] if self.optimizer is not None else self.args.learning_rate
        measured = summarized(entanglement(products, weights, lr))
        shares = zip(Case, measured.pop("entanglement/case_share"), strict=True)
        measured |= {f"entanglement/{case.name.lower()}_share": share for case, share in shares}
        return {name: float(value) for name, value in measured.items()}


@dataclass(frozen=True)
class _Seen:
    """Pairs before a step."""

    batch: PreferenceBatch
    log_probs: Tensor
    weights: dict[str, Tensor]
    """Of the model then, where the update is to be known."""

    def changes(self, model: nn.Module) -> dict[str, float]:
        """Mean changes since then, in nats; to first order in the update too, by the gradients of today."""
        with undisturbed(model):
            with torch.no_grad():
                found = {"realised": (response_log_probs(model, self.batch) - self.log_probs).chunk(2)}
            if self.weights:
                now = trained_parameters(model)
                update = {name: now[name].detach() - one for name, one in self.weights.items()}
                found["predicted"] = predicted_changes(model, self.batch, update)
        return {
            f"entanglement/{name}_{side}_change": float(one.mean())
            for name, both in found.items()
            for side, one in zip(("chosen", "rejected"), both, strict=True)
        }


class EntanglementDPOTrainer(LooksAtPairs, DPOTrainer):
    """A `DPOTrainer` that logs `entanglement/cosine`, `norm_ratio`, `score`, predicted changes and a share for each `Case`.

    Every `entanglement_every` steps it looks at the first `entanglement_pairs` pairs of the batch, before it trains on them;
    training itself stays as it is. The coefficients are those of the trainer's own loss, whatever `loss_type` and weights it
    has, found by differentiating it; losses that compare pairs of a batch ("aot") are seen on these pairs alone. Cost of a
    look: two forward passes and a backward pass of these pairs, and a forward pass of the reference.

    `chosen_change` and `rejected_change` are those of plain gradient descent on each pair alone. What the step did, by the
    optimizer and with all other pairs, is told at the next one as `realised_chosen_change` and `realised_rejected_change`.
    With `entanglement_keeps_weights` there are `predicted_chosen_change` and `predicted_rejected_change` beside them, to first
    order in the whole update: once more the trained weights in memory, and a forward and a backward pass of the pairs.

    Raises ValueError for `use_weighting`, whose weights need more of the model than log-probabilities.

    >>> trainer = EntanglementDPOTrainer(model, args=args, train_dataset=data, entanglement_every=20)
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        if self.use_weighting:
            raise ValueError("use_weighting=True has no coefficients of pairs alone; use DPOTrainer with it")

    def _tell(self, measured: dict[str, float]) -> None:
        for name, value in measured.items():
            self._metrics["train"][name].append(value)

    def _pairs(self, inputs: dict[str, Any]) -> tuple[dict[str, Tensor], PreferenceBatch]:
        num_pairs = len(inputs["input_ids"]) // 2
        kept = min(num_pairs, self.entanglement_pairs)
        rows = [*range(kept), *range(num_pairs, num_pairs + kept)]
        few = {
            name: one[:kept] if name.startswith("ref_") else one[rows]
            for name, one in inputs.items()
            if isinstance(one, Tensor) and one.ndim
        }
        return few, PreferenceBatch(few["input_ids"], few["completion_mask"], few["attention_mask"])

    def _coefficients(self, inputs: dict[str, Tensor], log_probs: Tensor) -> Coefficients:
        """(d_w, d_l) of the trainer's own loss, which sees log-probabilities in place of the model."""
        mask = inputs["completion_mask"][:, 1:].to(log_probs.dtype)
        lengths = mask.sum(1)
        tokens = (log_probs / lengths)[:, None] * mask
        tokens.requires_grad_()
        zeros = torch.zeros_like(mask)
        seen = SimpleNamespace(
            log_probs=tokens,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
            log_sum_sq_probs=zeros,
            aux_loss=0.0,
        )
        numbers = self.__dict__  # the trainer counts and logs what its loss sees
        kept = {name: numbers[name] for name in ("_metrics", "_total_train_tokens")}
        numbers["_metrics"] = {"train": defaultdict(list), "eval": defaultdict(list)}
        try:
            with torch.enable_grad():
                loss = self._compute_loss(lambda **named: seen, inputs, return_outputs=False)
            (gradient,) = torch.autograd.grad(loss, tokens)
        finally:
            numbers.update(kept)
        return coefficients_of(gradient, mask)


def coefficients_of(
    gradient: Float[Tensor, "sequences positions"], mask: Shaped[Tensor, "sequences positions"]
) -> Coefficients:
    """(d_w, d_l) from the gradient of a mean loss over pairs in the log-probabilities of tokens, chosen responses first.

    A response's coefficient is that of each of its tokens, and 0 without any.

    >>> (gradient,) = torch.autograd.grad(loss, token_log_probs, retain_graph=True)
    >>> coefficients_of(gradient, completion_mask[:, 1:])
    """
    pull, push = ((gradient * mask).sum(1) / mask.sum(1).clamp(min=1) * (len(mask) // 2)).chunk(2)
    return -pull, push
