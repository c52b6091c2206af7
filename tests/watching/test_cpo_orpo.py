"""TRL's trainers of CPO, SimPO and ORPO: real steps, the losses' own coefficients, and nothing disturbed."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import trl.experimental.cpo as cpo
import trl.experimental.orpo as orpo
from test_preference import expect_geometry_and_the_same_training, model, pairs, tokenizer

from dynascope.losses import PreferencePairs, margin_loss
from dynascope.watching.cpo_orpo import EntanglementCPOTrainer, EntanglementORPOTrainer


def make(folder: Path, kind: Any, settings: Any, of: datasets.Dataset | None = None, **own: Any) -> Any:
    args = (orpo.ORPOConfig if issubclass(kind, orpo.ORPOTrainer) else cpo.CPOConfig)(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", logging_steps=1,
        max_steps=2, per_device_train_batch_size=3, learning_rate=1e-3, bf16=False, gradient_checkpointing=False,
        remove_unused_columns=False, **settings,
    )  # fmt: skip
    return kind(model(), args=args, train_dataset=pairs() if of is None else of, processing_class=tokenizer(), **own)


def first_batch(made: Any) -> dict[str, torch.Tensor]:
    told = next(iter(made.get_train_dataloader()))
    return {name: one for name, one in told.items() if isinstance(one, torch.Tensor)}


@pytest.mark.parametrize(
    ("watched", "plain"), [(EntanglementCPOTrainer, cpo.CPOTrainer), (EntanglementORPOTrainer, orpo.ORPOTrainer)]
)
def test_geometry_is_among_the_trainers_numbers_and_training_stays_as_it_was(
    tmp_path: Path, watched: Any, plain: Any
) -> None:
    one, other = make(tmp_path / "a", watched, {}, entanglement_every=1), make(tmp_path / "b", plain, {})
    expect_geometry_and_the_same_training(one, other, num_steps=2)


@pytest.mark.parametrize(
    ("settings", "name", "own"),
    [
        ({"loss_type": "sigmoid", "cpo_alpha": 0.0, "beta": 0.3}, "cpo", {"beta": 0.3, "weight": 0.0}),
        (
            {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0},
            "simpo",
            {"beta": 2.0, "gamma": 1.0},
        ),
    ],
)
def test_coefficients_are_those_of_the_trainers_own_loss(
    tmp_path: Path, settings: dict[str, Any], name: str, own: dict[str, Any]
) -> None:
    made = make(tmp_path, EntanglementCPOTrainer, settings)
    inputs = first_batch(made)
    lengths = [(inputs[f"{side}_labels"][:, 1:] != -100).sum(1).float() for side in ("chosen", "rejected")]
    log_probs = torch.linspace(-30, -20, 6)
    seen = PreferencePairs(*log_probs.chunk(2), None, None, *lengths)
    torch.testing.assert_close(made._coefficients(inputs, log_probs), margin_loss(name, **own).coefficients(seen))
    assert "concatenated_forward" not in vars(made)


def test_likelihoods_pull_on_chosen_responses_as_the_trainers_have_them(tmp_path: Path) -> None:
    """CPO's is a mean over the chosen responses' tokens; ORPO's over those of their prompts too."""
    log_probs = torch.linspace(-30, -20, 6)
    with_likelihood, without = (
        make(tmp_path, EntanglementCPOTrainer, {"loss_type": "sigmoid", "cpo_alpha": alpha}) for alpha in (0.7, 0.0)
    )
    inputs = first_batch(without)
    num = (inputs["chosen_labels"][:, 1:] != -100).sum()
    (pull, push), (bare, same) = (one._coefficients(inputs, log_probs) for one in (with_likelihood, without))
    torch.testing.assert_close(pull - bare, torch.full((3,), 0.7 * 3 / float(num)))
    torch.testing.assert_close(push, same)

    made = make(tmp_path, EntanglementORPOTrainer, {"beta": 0.1})
    inputs = first_batch(made)
    lengths = [(inputs[f"{side}_labels"][:, 1:] != -100).sum(1).float() for side in ("chosen", "rejected")]
    seen = PreferencePairs(*log_probs.chunk(2), None, None, *lengths)
    own, rejected = margin_loss("orpo", weight=0.1).coefficients(seen)
    pull, push = made._coefficients(inputs, log_probs)
    whole = float(inputs["chosen_attention_mask"][:, 1:].sum())
    torch.testing.assert_close(pull, own - 1 / lengths[0] + 3 / whole)
    torch.testing.assert_close(push, rejected)
