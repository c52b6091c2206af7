"""TRL's DPOTrainer with the geometry of its gradients: real steps, the loss's own coefficients, and nothing disturbed."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import tokenizers
import torch
import transformers
import trl

import dynascope
from dynascope.losses import PreferencePairs, margin_loss
from dynascope.probes.entanglement import Case, Entanglement, PreferenceBatch, response_log_probs
from dynascope.watching.callbacks import DynascopeCallback
from dynascope.watching.preference import EntanglementDPOTrainer

LETTERS = "abcdefghijklmnopqrstuvwxyz ."


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Characters as tokens."""
    vocabulary = {"<pad>": 0, "<eos>": 1, **{letter: place + 2 for place, letter in enumerate(LETTERS)}}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def model(kind: str = "llama") -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=64, **ids)
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, **ids,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def pairs() -> datasets.Dataset:
    prompts = ["the film was", "the play was", "the book was", "the meal was"] * 3
    return datasets.Dataset.from_dict(
        {"prompt": prompts, "chosen": [" good and long."] * 12, "rejected": [" bad and long indeed."] * 12}
    )


def trainer(folder: Path, kind: type[trl.DPOTrainer], of: str = "llama", **settings: Any) -> trl.DPOTrainer:
    own = {
        name: settings.pop(name) for name in list(settings) if name.startswith("entanglement") or name == "callbacks"
    }
    args = trl.DPOConfig(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", logging_steps=1,
        max_steps=3, per_device_train_batch_size=4, learning_rate=1e-3, bf16=False, gradient_checkpointing=False, **settings,
    )  # fmt: skip
    return kind(model(of), model(of), args=args, train_dataset=pairs(), processing_class=tokenizer(), **own)


@pytest.mark.parametrize("of", ["llama", "gpt2"])
def test_geometry_is_among_the_trainers_numbers_and_training_stays_as_it_was(tmp_path: Path, of: str) -> None:
    watched = trainer(tmp_path / "a", EntanglementDPOTrainer, of, entanglement_every=1)
    plain = trainer(tmp_path / "b", trl.DPOTrainer, of)
    expect_geometry_and_the_same_training(watched, plain, num_steps=3)


def expect_geometry_and_the_same_training(watched: Any, plain: Any, num_steps: int) -> None:
    watched.train()
    plain.train()
    for one, other in zip(watched.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(one, other)
    logged = [entry for entry in watched.state.log_history if "entanglement/cosine" in entry]
    assert len(logged) == num_steps
    assert all(-1 <= entry["entanglement/cosine"] <= 1 for entry in logged)
    assert logged[0]["logps/chosen"] == plain.state.log_history[0]["logps/chosen"]
    for entry in logged:
        assert sum(entry[f"entanglement/{case.name.lower()}_share"] for case in Case) == pytest.approx(1)
    changes = [entry["entanglement/realised_chosen_change"] for entry in logged[1:]]
    assert len(changes) == num_steps - 1
    assert all(change != 0 for change in changes)


def test_what_the_update_should_have_done_is_told_with_what_it_did(tmp_path: Path) -> None:
    made = trainer(
        tmp_path, EntanglementDPOTrainer, entanglement_every=2, entanglement_pairs=4, entanglement_keeps_weights=True,
        optim="sgd", max_grad_norm=0.0,
    )  # fmt: skip
    sums: list[torch.Tensor] = []
    compute, batch = made.compute_loss, next(iter(made.get_train_dataloader()))

    def watched(model: Any, inputs: Any, *args: Any, **more: Any) -> Any:
        seen = PreferenceBatch(batch["input_ids"], batch["completion_mask"], batch["attention_mask"])
        sums.append(response_log_probs(model, seen).detach())
        return compute(model, batch, *args, **more)

    made.compute_loss = watched
    made.train()
    told = [entry for entry in made.state.log_history if "entanglement/realised_chosen_change" in entry]
    assert len(told) == 1  # of the steps 0, 1 and 2 the first is looked at, and seen again at the second
    chosen, rejected = (sums[1] - sums[0]).chunk(2)
    for side, change in (("chosen", chosen), ("rejected", rejected)):
        realised = told[0][f"entanglement/realised_{side}_change"]
        assert realised == pytest.approx(float(change.mean()), rel=0.02, abs=1e-6)
        assert told[0][f"entanglement/predicted_{side}_change"] == pytest.approx(realised, rel=0.05)


def test_ipo_past_its_target_is_told_as_reversed(tmp_path: Path) -> None:
    made = trainer(tmp_path, EntanglementDPOTrainer, loss_type="ipo", beta=1000.0, entanglement_pairs=4)
    inputs = next(iter(made.get_train_dataloader()))
    batch = PreferenceBatch(inputs["input_ids"], inputs["completion_mask"], inputs["attention_mask"])
    optimizer = torch.optim.SGD(made.model.parameters(), lr=0.01)
    for _ in range(3):
        chosen, rejected = response_log_probs(made.model, batch).chunk(2)
        optimizer.zero_grad()
        (rejected - chosen).sum().backward()
        optimizer.step()
    assert made._look(made.model, inputs)["entanglement/reversed_share"] == 1


@pytest.mark.parametrize(
    ("settings", "name", "own"),
    [
        ({"loss_type": "sigmoid"}, "dpo", {"beta": 0.1}),
        ({"loss_type": "hinge"}, "hinge", {"beta": 0.1}),
        ({"loss_type": "ipo"}, "ipo", {"tau": 0.1, "is_averaged": True}),
        ({"loss_type": "sppo_hard"}, "sppo", {"beta": 0.1}),
    ],
)
def test_coefficients_are_those_of_the_trainers_own_loss(
    tmp_path: Path, settings: dict[str, Any], name: str, own: dict[str, Any]
) -> None:
    made = trainer(tmp_path, EntanglementDPOTrainer, **settings)
    inputs = next(iter(made.get_train_dataloader()))
    log_probs = torch.linspace(-30, -20, len(inputs["input_ids"]))
    ref = _reference(made, inputs)
    lengths = inputs["completion_mask"][:, 1:].sum(1).float()
    expected = margin_loss(name, **own).coefficients(
        PreferencePairs(*log_probs.chunk(2), *ref.chunk(2), *lengths.chunk(2))
    )
    torch.testing.assert_close(made._coefficients(inputs, log_probs), expected, rtol=1e-4, atol=1e-6)


def _reference(made: trl.DPOTrainer, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    batch = PreferenceBatch(inputs["input_ids"], inputs["completion_mask"], inputs["attention_mask"])
    return response_log_probs(made.ref_model, batch).detach()


def test_held_out_pairs_are_watched_through_the_callback(tmp_path: Path) -> None:
    probe_inputs = next(iter(trainer(tmp_path / "x", trl.DPOTrainer).get_train_dataloader()))
    batch = PreferenceBatch(probe_inputs["input_ids"], probe_inputs["completion_mask"], probe_inputs["attention_mask"])
    callback = DynascopeCallback(every=1, run=tmp_path / "run", probes=[Entanglement(batch)])
    trainer(tmp_path / "y", trl.DPOTrainer, callbacks=[callback]).train()
    record = dynascope.open(tmp_path / "run")
    assert not [event for event in record.events if event.kind in ("probe-off", "watch-off")]
    # The optimizer of a trainer is met at its first step, so that the model is first seen at the second.
    assert record["entanglement/cosine"].step.values.tolist() == [1, 2]
    assert record["logps/chosen"].sizes["step"] == 3


def test_weighted_losses_and_impossible_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use_weighting"):
        trainer(tmp_path, EntanglementDPOTrainer, use_weighting=True)
    with pytest.raises(ValueError, match="at least 1"):
        trainer(tmp_path, EntanglementDPOTrainer, entanglement_every=0)
