"""Gradient entanglement: the cases by hand, ghost products against explicit ones, the token map, and the probe."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import dynascope
from dynascope.losses import coefficients_by_autograd, margin_loss, normalized_weights
from dynascope.probes.entanglement import (
    Case,
    Entanglement,
    PreferenceBatch,
    adam_preconditioner,
    entanglement,
    pair_products,
    predicted_changes,
    products_of,
    response_log_probs,
    token_map,
)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


ONE = (tensor(1), tensor(1))


@pytest.mark.parametrize(
    ("chosen", "rejected", "case", "up", "down"),
    [
        ((1, 1), (2, 1), Case.BOTH_FALL, -1, -2),
        ((2, 1), (1, 1), Case.BOTH_RISE, 2, 1),
        ((1, 2), (-1, 1), Case.IDEAL, 4, -1),
        ((3, 4), (3, 4), Case.STILL, 0, 0),
    ],
)
def test_cases_by_hand(
    chosen: tuple[float, float], rejected: tuple[float, float], case: Case, up: float, down: float
) -> None:
    geometry = entanglement(products_of(tensor(*chosen)[None], tensor(*rejected)[None]), ONE)
    assert (int(geometry.case), float(geometry.chosen_change), float(geometry.rejected_change)) == (case, up, down)


def test_slacks_score_and_ratio_by_hand() -> None:
    # ‖g_w‖² = 2, ‖g_l‖² = 5, inner product 3, weights 2 and 1
    geometry = entanglement(products_of(tensor(1, 1)[None], tensor(2, 1)[None]), (tensor(2), tensor(1)))
    found = [geometry.chosen_slack, geometry.rejected_slack, geometry.score, geometry.norm_ratio, geometry.cosine]
    torch.testing.assert_close(torch.cat(found), tensor(1, -0.5, 1.5, 2.5**0.5, 3 / 10**0.5))


def test_signs_of_the_slacks_are_the_directions() -> None:
    chosen, rejected, both = torch.randn(300, 3).double(), torch.randn(300, 3).double(), torch.rand(2, 300).double()
    geometry = entanglement(products_of(chosen, rejected + chosen), (both[0], both[1]))
    assert torch.equal(geometry.chosen_slack > 0, geometry.chosen_change > 0)
    assert torch.equal(geometry.rejected_slack > 0, geometry.rejected_change < 0)


def test_weighted_margin_never_falls_so_nothing_is_reversed_while_weights_are_positive() -> None:
    chosen, rejected, (pull, push) = (
        torch.randn(300, 3).double(),
        torch.randn(300, 3).double(),
        torch.rand(2, 300).double(),
    )
    geometry = entanglement(products_of(chosen, rejected), (pull, push))
    gained = pull * geometry.chosen_change - push * geometry.rejected_change
    torch.testing.assert_close(gained, (pull[:, None] * chosen - push[:, None] * rejected).square().sum(1))
    assert not bool((geometry.case == Case.REVERSED).any())


def test_negative_coefficients_turn_the_case_around() -> None:
    # IPO past its target, (1, 2) and (−1, 1): what was ideal goes the other way.
    geometry = entanglement(products_of(tensor(1, 2)[None], tensor(-1, 1)[None]), (-ONE[0], -ONE[1]))
    assert (int(geometry.case), float(geometry.chosen_change), float(geometry.rejected_change)) == (
        Case.REVERSED,
        -4,
        1,
    )


def test_a_loss_that_is_not_active_moves_nothing() -> None:
    geometry = entanglement(products_of(tensor(1, 1)[None], tensor(2, 1)[None]), (tensor(0), tensor(0)))
    assert int(geometry.case) == Case.STILL


def test_single_tokens_are_always_ideal() -> None:
    # One token under softmax(W h): ‖g_w‖² − ⟨g_w, g_l⟩ = |h|² (1 − (π_w − π_l)) > 0
    weight, hidden = torch.randn(7, 4, dtype=torch.float64, requires_grad=True), torch.randn(4, dtype=torch.float64)
    log_probs = torch.log_softmax(weight @ hidden, 0)
    gradients = [
        torch.autograd.grad(log_probs[token], weight, retain_graph=True)[0].flatten()[None] for token in (2, 5)
    ]
    products, probs = products_of(*gradients), log_probs.detach().exp()
    norm = hidden.square().sum()
    torch.testing.assert_close(products.inner[0], norm * (probs.square().sum() - probs[2] - probs[5]))
    torch.testing.assert_close(products.chosen - products.inner, (norm * (1 - probs[2] + probs[5]))[None])
    assert int(entanglement(products, ONE).case) == Case.IDEAL


def test_equal_shared_gradients_entangle_nothing_however_long() -> None:
    contrast = tensor(1, 0, 0)[None], tensor(-0.5, 0, 0)[None]
    for length in (1.0, 10.0, 1000.0):
        shared = tensor(0, length, length)[None]
        geometry = entanglement(products_of(contrast[0] + shared, contrast[1] + shared), ONE)
        assert int(geometry.case) == Case.IDEAL
    assert float(geometry.cosine) > 0.999


class Plain(nn.Module):
    """A causal model of one's own: tied head, position table, and a scale that no layer owns."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(11, 8), nn.Parameter(torch.randn(12, 8) / 3)
        self.mix, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens) + self.position[: tokens.shape[1]]
        past = hidden.cumsum(1) / torch.arange(1, tokens.shape[1] + 1)[:, None]
        return self.norm(hidden + torch.tanh(self.mix(past))) @ self.embed.weight.T


def gpt2() -> transformers.PreTrainedModel:
    config = transformers.GPT2Config(
        vocab_size=11, n_embd=8, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def preference_batch(num_pairs: int = 3, length: int = 9, prompt: int = 3) -> PreferenceBatch:
    tokens = torch.randint(1, 11, (2 * num_pairs, length))
    mask = torch.ones_like(tokens)
    mask[:, :prompt] = 0
    attention_mask = torch.ones_like(tokens)
    mask[1, -2:] = attention_mask[1, -2:] = 0  # a shorter response, padded
    return PreferenceBatch(tokens, mask, attention_mask)


MODELS = {"plain": Plain, "gpt2": gpt2, "llama": llama}


def explicit_gradients(model: nn.Module, batch: PreferenceBatch) -> torch.Tensor:
    log_probs = response_log_probs(model, batch)
    each = [
        torch.autograd.grad(one, list(model.parameters()), retain_graph=True, allow_unused=True) for one in log_probs
    ]
    return torch.stack([torch.cat([g.flatten() for g in one if g is not None]) for one in each])


@pytest.mark.parametrize("name", MODELS)
def test_ghost_products_are_those_of_the_gradients(name: str) -> None:
    model, batch = MODELS[name]().double().eval(), preference_batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if name == "plain" else "error")
        products = pair_products(model, batch)
    expected = products_of(*explicit_gradients(model, batch).chunk(2))
    for found, right in (
        (products.inner, expected.inner),
        (products.chosen, expected.chosen),
        (products.rejected, expected.rejected),
    ):
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(products.log_probs, response_log_probs(model, batch).detach())


def test_what_ghost_products_do_not_know_is_told() -> None:
    with pytest.warns(UserWarning, match=r"position"):
        pair_products(Plain(), preference_batch())


def test_two_backward_passes_a_pair_give_the_same() -> None:
    model, batch = gpt2().double().eval(), preference_batch()
    ghost, naive = (pair_products(model, batch, method=method) for method in ("ghost", "two_backward"))
    assert ghost.names == naive.names
    torch.testing.assert_close(ghost.table, naive.table, rtol=1e-9, atol=1e-12)


def test_long_sequences_sum_to_gradients_first() -> None:
    model, batch = gpt2().double().eval(), preference_batch(length=16)  # 16² positions are more than 8 × 11 weights
    expected = products_of(*explicit_gradients(model, batch).chunk(2))
    torch.testing.assert_close(pair_products(model, batch).inner, expected.inner, rtol=1e-10, atol=1e-12)


def test_gradients_and_flags_are_left_alone() -> None:
    model, batch = llama().eval(), preference_batch()
    pair_products(model, batch)
    assert all(one.grad is None and one.requires_grad for one in model.parameters())


def test_only_trained_parameters_that_match_count() -> None:
    model, batch = llama().double().eval(), preference_batch()
    head = pair_products(model, batch, parameters="lm_head")
    torch.testing.assert_close(head.inner[0], token_map(model, batch, parameters="lm_head").sum(), rtol=1e-6, atol=0)
    assert head.names == ("lm_head.weight",)
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    torch.testing.assert_close(pair_products(model, batch).table, head.table)
    with pytest.raises(ValueError, match="no trained parameter"):
        pair_products(model, batch, parameters="q_proj")


def test_sketched_products_are_near_the_exact_ones_and_need_no_gradient() -> None:
    model, batch = llama().double().eval(), preference_batch()
    exact = pair_products(model, batch)
    errors = []
    for size in (256, 16384):
        found = pair_products(model, batch, method="sketch", sketch_size=size)
        assert found.names == exact.names
        errors.append(((found.inner - exact.inner) / (exact.chosen * exact.rejected).sqrt()).abs().max())
        torch.testing.assert_close(found.log_probs, exact.log_probs)
    assert float(errors[1]) < 0.03
    assert float(errors[1]) < float(errors[0])
    other = pair_products(model, batch, method="sketch", seed=1)
    assert not torch.equal(other.table, pair_products(model, batch, method="sketch").table)
    with pytest.raises(ValueError, match="preconditioner"):
        pair_products(model, batch, method="sketch", preconditioner={})


def test_the_last_layer_and_adapters_have_names_of_their_own() -> None:
    model, batch = llama().double().eval(), preference_batch()
    assert pair_products(model, batch, parameters="last_layer").names == ("lm_head.weight",)
    tied = gpt2().eval()
    assert pair_products(tied, batch, parameters="last_layer").names == ("transformer.wte.weight",)
    own = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 4), nn.Linear(4, 11), nn.Identity())
    assert pair_products(own, batch, parameters="last_layer").names == ("2.weight", "2.bias")

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 4), nn.Linear(4, 11)
            self.lora_A, self.lora_B = (
                nn.ModuleDict({"default": nn.Linear(*size, bias=False)}) for size in ((4, 2), (2, 4))
            )

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            hidden = self.embed(tokens)
            return self.head(hidden + self.lora_B["default"](self.lora_A["default"](hidden)))

    names = pair_products(Adapted(), batch, parameters="lora").names
    assert names == ("lora_A.default.weight", "lora_B.default.weight")
    with pytest.raises(ValueError, match="'lora'"):
        pair_products(model, batch, parameters="lora")


def test_dropout_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="dropout in training mode"):
        pair_products(gpt2().train(), preference_batch())


def test_preconditioned_products_are_those_under_its_metric() -> None:
    model, batch = gpt2().double().eval(), preference_batch()
    optimizer = torch.optim.Adam(model.parameters())
    response_log_probs(model, batch).sum().backward()
    optimizer.step()
    metric = adam_preconditioner(model, optimizer)
    found = pair_products(model, batch, preconditioner=metric)
    root = torch.cat([metric[name].flatten() for name, _ in model.named_parameters()]).sqrt()
    expected = products_of(*(explicit_gradients(model, batch) * root).chunk(2))
    torch.testing.assert_close(found.inner, expected.inner, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.rejected, expected.rejected, rtol=1e-9, atol=1e-12)


def test_adam_has_no_metric_before_its_first_step() -> None:
    model = llama()
    with pytest.raises(ValueError, match="take a step"):
        adam_preconditioner(model, torch.optim.Adam(model.parameters()))


@pytest.mark.parametrize("name", MODELS)
def test_token_map_sums_to_the_inner_product(name: str) -> None:
    model, batch = MODELS[name]().double().eval(), preference_batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        products = pair_products(model, batch)
    found = token_map(model, batch, index=1)
    assert found.shape == (4, 6)  # six tokens of response, two of the chosen one's are padding
    # Llama's norms compute in single precision whatever the model's.
    tolerance = 1e-6 if name == "llama" else 1e-9
    torch.testing.assert_close(found.sum(), products.inner[1], rtol=tolerance, atol=1e-12)


def test_entries_of_the_token_map_are_products_of_token_gradients() -> None:
    model, batch = llama().double().eval(), preference_batch()
    alone = []
    for row, token in ((0, 4), (3, 6)):
        mask = torch.zeros_like(batch.mask)
        mask[:, -1] = 1
        mask[row] = 0
        mask[row, token] = 1
        log_prob = response_log_probs(model, PreferenceBatch(batch.tokens, mask, batch.attention_mask))[row]
        alone.append(torch.cat([g.flatten() for g in torch.autograd.grad(log_prob, list(model.parameters()))]))
    torch.testing.assert_close(token_map(model, batch)[1, 3], alone[0] @ alone[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo", "cpo", "slic", "orpo", "kto", "sppo", "dpop", "rrhf"])
def test_a_small_step_does_what_is_predicted(name: str) -> None:
    model, batch, loss = gpt2().double().eval(), preference_batch(1), margin_loss(name)
    reference = response_log_probs(model, batch).detach() - torch.tensor([0.4, -0.3], dtype=torch.float64)
    pairs = batch.pairs(response_log_probs(model, batch), reference)
    products = pair_products(model, batch)
    weights = coefficients_by_autograd(loss, pairs)
    loss(pairs).sum().backward()
    errors = []
    for lr in (1e-5, 1e-6):
        geometry = entanglement(products, weights, lr)
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for one, own in zip(moved.parameters(), model.parameters(), strict=True):
                one -= lr * own.grad
        realised = (response_log_probs(moved, batch) - response_log_probs(model, batch)).detach()
        predicted = torch.cat([geometry.chosen_change, geometry.rejected_change])
        errors.append(float((realised / predicted - 1).abs().max()))
    assert errors[1] < 0.02
    assert errors[1] < 0.2 * errors[0]  # of the order of the step: ten times smaller


def test_any_update_is_predicted_through_inner_products_with_it() -> None:
    for make in (Plain, gpt2):
        model, batch = make().double().eval(), preference_batch()
        update = {name: 1e-8 * torch.randn_like(one) for name, one in model.named_parameters()}
        before = response_log_probs(model, batch).detach()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            predicted = torch.cat(predicted_changes(model, batch, update))
        with torch.no_grad():
            for name, one in model.named_parameters():
                one += update[name]
        torch.testing.assert_close(response_log_probs(model, batch) - before, predicted, rtol=1e-3, atol=1e-12)


def test_normalized_weights_make_every_pair_of_a_model_ideal() -> None:
    model, batch = llama().double().eval(), preference_batch(6)
    products = pair_products(model, batch)
    ones = torch.ones(6, dtype=torch.float64)
    geometry = entanglement(products, normalized_weights(products.chosen, products.rejected, (ones, ones)))
    assert geometry.case.tolist() == [Case.IDEAL] * 6


@pytest.mark.parametrize(
    ("tokens", "mask", "told"),
    [(torch.ones(3, 4), torch.ones(3, 4), "no pairs"), (torch.ones(2, 4), torch.eye(2, 4), "no tokens")],
)
def test_impossible_batches_are_told(tokens: torch.Tensor, mask: torch.Tensor, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        PreferenceBatch(tokens.long(), mask)


def test_low_precision_models_are_summed_in_single_precision() -> None:
    model, batch = llama().eval(), preference_batch()
    exact = pair_products(model, batch)
    found = pair_products(model.bfloat16(), batch)
    assert bool(torch.isfinite(found.table).all())
    torch.testing.assert_close(found.chosen, exact.chosen, rtol=0.1, atol=0)


def test_probe_watches_preference_training_of_a_huggingface_model(tmp_path: Path) -> None:
    model, batch, loss = llama(), preference_batch(), margin_loss("dpo", beta=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    reference = response_log_probs(model, batch).detach()
    probe = Entanglement(batch, loss, keeps_weights=True)
    with dynascope.watch(model, optimizer, run=tmp_path / "run", every=1, probes=[probe]):
        for _ in range(4):
            optimizer.zero_grad()
            loss(batch.pairs(response_log_probs(model, batch), reference)).mean().backward()
            optimizer.step()
    record = dynascope.open(tmp_path / "run")
    assert not [event for event in record.events if event.kind in ("probe-off", "watch-off")]
    torch.testing.assert_close(torch.tensor(record["entanglement/case_share"].values).sum(1), torch.ones(4).double())
    assert record["entanglement/parameter_cosine"].sizes["parameter"] == len(list(model.parameters()))
    realised, predicted = record["entanglement/realised_change"], record["entanglement/predicted_change"]
    torch.testing.assert_close(
        torch.tensor(realised.values).double(), torch.tensor(predicted.values), rtol=0.1, atol=1e-6
    )
    torch.testing.assert_close(torch.tensor(record["entanglement/log_prob"].values[0]), reference.view(2, -1).mean(1))
