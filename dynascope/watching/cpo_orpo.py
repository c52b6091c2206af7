"""TRL's experimental trainers of CPO, SimPO and ORPO with the geometry of their gradients among their numbers (2410.13828)."""

from typing import Any

import torch
from torch import Tensor
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from dynascope.losses.preference import Coefficients
from dynascope.probes.entanglement import PreferenceBatch
from dynascope.watching.preference import LooksAtPairs


class _LooksAtConcatenated(LooksAtPairs):
    """Of TRL's trainers that concatenate chosen and rejected responses, and join the loss of pairs with a likelihood."""

    is_averaged: bool
    """Whether the loss of pairs is given means over tokens."""

    def _tell(self: Any, measured: dict[str, float]) -> None:
        self.store_metrics(measured, train_eval="train")

    def _pairs(self: Any, inputs: dict[str, Any]) -> tuple[dict[str, Tensor], PreferenceBatch]:
        few = {name: one[: self.entanglement_pairs] for name, one in inputs.items() if isinstance(one, Tensor)}
        both = self.concatenated_inputs(few, padding_value=self._padding, device=self.accelerator.device)
        mask = both["concatenated_labels"] != -100
        return few, PreferenceBatch(both["concatenated_input_ids"], mask, both["concatenated_attention_mask"])

    def _coefficients(self: Any, inputs: dict[str, Tensor], log_probs: Tensor) -> Coefficients:
        """(d_w, d_l) of the trainer's own loss, which sees log-probabilities in place of the model."""
        chosen, rejected = (one.detach().requires_grad_() for one in log_probs.chunk(2))
        lengths = [(inputs[f"{side}_labels"][:, 1:] != -100).sum(1) for side in ("chosen", "rejected")]
        seen = [
            one / length if self.is_averaged else one for one, length in zip((chosen, rejected), lengths, strict=True)
        ]
        nothing = torch.zeros(1, 1, 1, device=log_probs.device)
        self.concatenated_forward = lambda model, batch: (
            *seen, nothing, nothing, -chosen.sum() / self._num_likely_tokens(inputs), torch.zeros(())
        )  # fmt: skip
        try:
            with torch.enable_grad():
                loss, _ = self.get_batch_loss_metrics(None, inputs, train_eval="train")
            pull, push = torch.autograd.grad(loss, (chosen, rejected))
        finally:
            del self.concatenated_forward
        # The loss is a mean over pairs.
        return -pull * len(chosen), push * len(rejected)


class EntanglementCPOTrainer(_LooksAtConcatenated, CPOTrainer):
    """TRL's experimental `CPOTrainer`, for CPO and SimPO, that looks at its pairs as `EntanglementDPOTrainer` does.

    >>> trainer = EntanglementCPOTrainer(model, args=args, train_dataset=data, entanglement_every=20)
    """

    @property
    def is_averaged(self) -> bool:  # type: ignore[override]
        """As the trainer's own losses have it."""
        return self.loss_type in ("ipo", "simpo")

    @property
    def _padding(self) -> int:
        return int(self.pad_token_id)

    def _num_likely_tokens(self, inputs: dict[str, Tensor]) -> Tensor:
        return (inputs["chosen_labels"][:, 1:] != -100).sum()


class EntanglementORPOTrainer(_LooksAtConcatenated, ORPOTrainer):
    """TRL's experimental `ORPOTrainer` that looks at its pairs as `EntanglementDPOTrainer` does.

    Its likelihood is that of the chosen response and of its prompt; the prompt's part pulls on neither response, and is left out.

    >>> trainer = EntanglementORPOTrainer(model, args=args, train_dataset=data, entanglement_every=20)
    """

    is_averaged = True

    @property
    def _padding(self) -> int:
        return int(self.padding_value)

    def _num_likely_tokens(self, inputs: dict[str, Tensor]) -> Tensor:
        return inputs["chosen_attention_mask"][:, 1:].sum()
