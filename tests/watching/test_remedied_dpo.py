"""TRL's DPOTrainer under a remedy: real steps, the gradients that the remedies say, and nothing else changed."""

from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from test_preference import trainer

from dynascope.losses import (
    PairwiseNormalizedPreference,
    contrastive_token_mask,
    disentangled_weights,
    margin_loss,
    normalized_weights,
)
from dynascope.probes.entanglement import PreferenceBatch, pair_products, response_log_probs
from dynascope.watching.remedied_dpo import RemediedDPOTrainer


def remedied(folder: Path, **settings: Any) -> RemediedDPOTrainer:
    class Of(RemediedDPOTrainer):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **own, **more)

    own = {name: settings.pop(name) for name in ("remedy", "mask") if name in settings}
    return trainer(folder, Of, **settings)


def gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat(
        [torch.zeros_like(one).flatten() if one.grad is None else one.grad.flatten() for one in model.parameters()]
    )


def gradient_of_a_step(made: trl.DPOTrainer, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    made.model.train()
    made.model.zero_grad()
    made.compute_loss(made.model, inputs).backward()
    return gradient(made.model)


def first_batch(made: trl.DPOTrainer, *, prefix: int | None = None) -> tuple[dict[str, torch.Tensor], PreferenceBatch]:
    """With `prefix`, chosen responses are the first tokens of rejected ones, so that these outweigh them."""
    inputs = next(iter(made.get_train_dataloader()))
    if prefix is not None:
        half = len(inputs["input_ids"]) // 2
        for one in inputs.values():
            one[:half] = one[half:]
        inputs["completion_mask"][:half] *= inputs["completion_mask"][:half].cumsum(1) <= prefix
    return inputs, PreferenceBatch(inputs["input_ids"], inputs["completion_mask"], inputs["attention_mask"])


def away(made: trl.DPOTrainer) -> None:
    """From the reference, so that pairs differ."""
    torch.manual_seed(1)
    with torch.no_grad():
        for one in made.model.parameters():
            one += 0.05 * torch.randn_like(one)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
@pytest.mark.parametrize("remedy", ["normalized", "disentangled"])
def test_a_step_has_the_gradient_of_the_remedied_weights(tmp_path: Path, remedy: str, loss_type: str) -> None:
    made = remedied(tmp_path, remedy=remedy, loss_type=loss_type)
    away(made)
    inputs, batch = first_batch(made, prefix=8)
    found = gradient_of_a_step(made, inputs)

    model = made.model.eval()
    model.zero_grad()
    log_probs = response_log_probs(model, batch)
    loss = margin_loss("dpo") if loss_type == "sigmoid" else margin_loss("ipo", tau=0.1, is_averaged=True)
    pairs = batch.pairs(log_probs, response_log_probs(made.ref_model, batch).detach())
    products, own = pair_products(model, batch), loss.coefficients(pairs)
    squares = products.chosen.float(), products.rejected.float()
    if remedy == "normalized":
        pull, push = normalized_weights(*squares, own)
    else:
        pull, push = disentangled_weights(products.inner.float(), *squares, own)
    assert not torch.allclose(pull, own[0], rtol=1e-2)
    chosen, rejected = log_probs.chunk(2)
    (push.detach() * rejected - pull.detach() * chosen).mean().backward()
    torch.testing.assert_close(found, gradient(model), rtol=1e-3, atol=1e-5)


def test_a_batch_is_normalized_as_the_loss_for_plain_loops_does(tmp_path: Path) -> None:
    made = remedied(tmp_path, remedy="normalized-batch")
    away(made)
    inputs, batch = first_batch(made)
    found = gradient_of_a_step(made, inputs)
    model = made.model.eval()
    model.zero_grad()
    pairs = batch.pairs(response_log_probs(model, batch), response_log_probs(made.ref_model, batch).detach())
    PairwiseNormalizedPreference(margin_loss("dpo")).backward(pairs, model.parameters())
    torch.testing.assert_close(found, gradient(model), rtol=1e-3, atol=1e-6)


def test_without_a_remedy_training_is_the_trainers_own_and_with_one_its_first_numbers_are(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "a", trl.DPOTrainer)
    plain.train()
    for remedy in (None, "normalized", "disentangled", "normalized-batch"):
        made = remedied(tmp_path / "b", remedy=remedy)
        made.train()
        same = [torch.equal(*both) for both in zip(made.model.parameters(), plain.model.parameters(), strict=True)]
        if remedy != "disentangled":  # these pairs are not entangled
            assert all(same) is (remedy is None)
        first, expected = made.state.log_history[0], plain.state.log_history[0]
        assert first["logps/chosen"] == expected["logps/chosen"]
        assert first["loss"] == pytest.approx(expected["loss"], abs=1e-6)


def test_normalized_steps_part_the_responses(tmp_path: Path) -> None:
    made = remedied(tmp_path, remedy="normalized", optim="sgd", max_grad_norm=0.0)
    made.train()
    logged = [entry for entry in made.state.log_history if "logps/chosen" in entry]
    assert logged[-1]["rewards/chosen"] > 0 > logged[-1]["rewards/rejected"]


def test_the_loss_sees_the_tokens_of_the_mask_alone(tmp_path: Path) -> None:
    made = remedied(tmp_path, remedy="disentangled", mask=contrastive_token_mask)
    inputs, batch = first_batch(made)
    (chosen, rejected), masks = batch.tokens.chunk(2), batch.mask.chunk(2)
    seen = torch.cat(contrastive_token_mask(chosen, rejected, *masks)).long()
    assert 0 < int(seen.sum()) < int(batch.mask.sum())
    expected = response_log_probs(made.model, PreferenceBatch(batch.tokens, seen, batch.attention_mask)).detach()
    gradient_of_a_step(made, inputs)
    (told,) = made._metrics["train"]["logps/chosen"]
    assert told == pytest.approx(float(expected.chunk(2)[0].mean()), rel=1e-4)


def test_pairs_of_which_a_mask_leaves_one_response_keep_their_weights(tmp_path: Path) -> None:
    made = remedied(tmp_path, remedy="normalized", mask=contrastive_token_mask)
    inputs, _ = first_batch(made)
    half = len(inputs["input_ids"]) // 2
    inputs = {name: one.clone() for name, one in inputs.items()}
    for name in inputs:  # the first pair's responses are the same
        inputs[name][half] = inputs[name][0]
    assert bool(gradient_of_a_step(made, inputs).isfinite().all())
    for name in inputs:
        inputs[name][half:] = inputs[name][:half]
    assert float(gradient_of_a_step(made, inputs).abs().max()) == 0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"use_weighting": True}, "whole responses"),
        ({"ld_alpha": 0.5}, "whole responses"),
        ({"mask": contrastive_token_mask, "precompute_ref_log_probs": True}, "reference's tokens"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        remedied(tmp_path, **settings)
