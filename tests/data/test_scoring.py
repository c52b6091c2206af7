"""Scoring a whole dataset."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dynascope.data import el2n, grand, score_examples, select, with_ids
from dynascope.data.scores import cross_entropy


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


@pytest.fixture
def data() -> TensorDataset:
    return TensorDataset(torch.randn(10, 4), torch.randint(3, (10,)))


def test_scores_are_those_of_the_pure_functions(model: nn.Module, data: TensorDataset) -> None:
    inputs, labels = data.tensors
    scored = score_examples(model, DataLoader(data, batch_size=4), scores=("el2n", "grand", "margin"), at=7)
    assert scored["el2n"].dims == ("run", "step", "example")
    assert scored.step.values.tolist() == [7]
    model.eval()
    np.testing.assert_allclose(scored["el2n"].values[0, 0], el2n(model(inputs), labels).detach(), rtol=1e-5)
    np.testing.assert_allclose(scored["grand"].values[0, 0], grand(model, cross_entropy, (inputs, labels)), rtol=1e-5)


def test_shuffling_with_ids_changes_nothing(model: nn.Module, data: TensorDataset) -> None:
    in_order = score_examples(model, DataLoader(data, batch_size=4))
    shuffled = score_examples(model, DataLoader(with_ids(data), batch_size=3, shuffle=True))
    np.testing.assert_allclose(shuffled["grand"].values, in_order["grand"].values, rtol=1e-5)
    assert shuffled.example.values.tolist() == list(range(10))


def test_several_models_are_runs(data: TensorDataset) -> None:
    models = [nn.Linear(4, 3) for _ in range(3)]
    scored = score_examples(models, DataLoader(data, batch_size=10), scores=["el2n"])
    assert scored["el2n"].shape == (3, 1, 10)
    assert len(select(scored["el2n"].mean("run").values[0], keep=0.3)) == 3


def test_nothing_is_changed_by_looking(model: nn.Module, data: TensorDataset) -> None:
    model[2].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    score_examples(model, DataLoader(with_ids(data), batch_size=4, shuffle=True))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model] == [True, True, False, True]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_mappings_carry_their_ids_and_labels(data: TensorDataset) -> None:
    class AsMapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, features: torch.Tensor) -> Any:
            return self.layer(features)

    examples = [{"features": x, "label": y} for x, y in data]
    loader: DataLoader[Any] = DataLoader(with_ids(examples), batch_size=4, shuffle=True)
    model = AsMapping()
    expected = el2n(model(data.tensors[0]), data.tensors[1]).detach()
    np.testing.assert_allclose(score_examples(model, loader)["el2n"].values[0, 0], expected, rtol=1e-5)


def test_loaders_that_would_misalign_are_refused(model: nn.Module, data: TensorDataset) -> None:
    with pytest.raises(ValueError, match="with_ids"):
        score_examples(model, DataLoader(data, batch_size=4, shuffle=True))
    with pytest.raises(ValueError, match="drop_last=False"):
        score_examples(model, DataLoader(data, batch_size=4, drop_last=True))
    sampler = torch.utils.data.RandomSampler(data, replacement=True, num_samples=30)
    with pytest.raises(ValueError, match="twice"):
        score_examples(model, DataLoader(with_ids(data), batch_size=4, sampler=sampler))
    with pytest.raises(ValueError, match="unknown score"):
        score_examples(model, DataLoader(data), scores=["luck"])


def test_sequences_score_the_mean_over_their_tokens() -> None:
    model, tokens = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)), torch.randint(7, (5, 6))
    labels = tokens.roll(-1, 1)
    labels[:, -1], labels[0, :4] = -100, -100
    scored = score_examples(model, DataLoader(TensorDataset(tokens, labels), batch_size=2))
    for example in range(5):
        told = labels[example] != -100
        logits = model(tokens[example][told])
        expected = el2n(logits, labels[example][told]).mean().item()
        assert scored["el2n"].values[0, 0, example] == pytest.approx(expected, rel=1e-5)
        gradients = torch.autograd.grad(
            nn.functional.cross_entropy(logits, labels[example][told]), list(model.parameters())
        )
        norm = torch.stack([one.square().sum() for one in gradients]).sum().sqrt().item()
        assert scored["grand"].values[0, 0, example] == pytest.approx(norm, rel=1e-4)


def test_language_models_of_hugging_face_are_scored() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    )
    tokens = torch.randint(20, (4, 6))
    places = torch.arange(6)
    texts = [{"input_ids": text, "position_ids": places, "labels": text.roll(-1)} for text in tokens]
    scored = score_examples(model, DataLoader(with_ids(texts), batch_size=3, shuffle=True), scores=("el2n", "margin"))
    logits = model.eval()(tokens).logits.detach()
    expected = torch.stack([el2n(one, text.roll(-1)).mean() for one, text in zip(logits, tokens, strict=True)])
    np.testing.assert_allclose(scored["el2n"].values[0, 0], expected, rtol=1e-5)
