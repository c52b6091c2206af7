"""Mamba layers as attention, and what selects examples in context."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dynascope
from dynascope.data.in_context.outliers import OutlierICL, OutlierPrompts
from dynascope.nn.gated_linear_attention import GatedLinearAttentionICL, Scores
from dynascope.nn.selective_scan import MambaZOH
from dynascope.probes.mamba import ICLMechanismProbe, decompose_mamba_layer, icl_mechanism, mamba_scores
from dynascope.probes.views import ModelView

transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 12, "num_hidden_layers": 2, "vocab_size": 20}


def mixer(kind: str = "Mamba", **settings: Any) -> nn.Module:
    """The mixer of a small model, with other weights than the regular ones of the start."""
    config = getattr(transformers, f"{kind}Config")(**SIZES, state_size=4, **settings)
    layer = getattr(transformers, f"{kind}Model")(config).layers[0].mixer
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer.eval()


def jamba() -> nn.Module:
    config = transformers.JambaConfig(
        **SIZES,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        mamba_d_state=4,
        mamba_dt_rank=3,
        num_experts=1,
        use_mamba_kernels=False,
    )
    layer: nn.Module = transformers.JambaModel(config).layers[0].mamba
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer.eval()


HEADS = {"n_heads": 4, "d_head": 6, "n_groups": 2, "d_state": 5, "expand": 2}
"""Of Mamba-2: four heads of six channels in two groups."""


def mixer2(kind: str = "Mamba2", **settings: Any) -> nn.Module:
    """The mixer of Mamba-2 in a small model of this kind, with other weights than the regular ones of the start."""
    config = getattr(transformers, f"{kind}Config")(**SIZES | settings)
    model = getattr(transformers, f"{kind}Model")(config)
    layer: nn.Module = next(one for one in model.modules() if hasattr(one, "dt_bias"))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        layer.dt_bias.copy_(torch.linspace(-2, 2, 4))  # type: ignore[operator, union-attr]
    return layer.eval()


def hybrid(kind: str, **settings: Any) -> nn.Module:
    """The same in a model that has attention too."""
    attention = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16}
    return mixer2(kind, **{f"mamba_{name}": value for name, value in HEADS.items()} | attention | settings)


def zamba2() -> nn.Module:
    names = {"n_mamba_heads": 4, "mamba_headdim": 6, "mamba_ngroups": 2, "mamba_d_state": 5, "mamba_expand": 2}
    return mixer2("Zamba2", **names, num_attention_heads=2, intermediate_size=16, layers_block_type=["mamba", "mamba"])


def nemotron() -> nn.Module:
    names = {"mamba_num_heads": 4, "mamba_head_dim": 6, "n_groups": 2, "ssm_state_size": 5, "expand": 2}
    return mixer2(
        "NemotronH", **names, num_attention_heads=2, intermediate_size=16, layers_block_type=["mamba", "mamba"]
    )


def mamba2() -> nn.Module:
    return mixer2(num_heads=4, head_dim=6, n_groups=2, state_size=5, expand=2, chunk_size=4, time_step_limit=(0.3, 1.2))


MAMBA2 = {
    "mamba2": mamba2,
    "bamba": lambda: hybrid("Bamba"),
    "granite": lambda: hybrid("GraniteMoeHybrid", layer_types=["mamba", "mamba"]),
    "falcon-h1": lambda: hybrid(
        "FalconH1", mamba_d_ssm=24, ssm_in_multiplier=1.5, ssm_multipliers=[0.7, 1.3, 1.1, 0.8, 1.2]
    ),
    "zamba2": zamba2,
    "nemotron": nemotron,
}


def rebuilt2(layer: Any, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
    """The layer's output from the hidden attention of its heads."""
    parts = decompose_mamba_layer(layer, inputs, mask=mask)
    scanned = torch.einsum("rhqk,rkhp->rqhp", parts.hidden, parts.values) + layer.D[:, None] * parts.values
    kept = inputs if mask is None else inputs * mask[..., None]
    projected = layer.in_proj(kept * getattr(layer, "ssm_in_multiplier", 1)) * getattr(layer, "mup_vector", 1)
    gate = projected[..., : layer.intermediate_size]
    if isinstance(layer.norm, nn.Identity):
        output: Tensor = layer.out_proj(scanned.flatten(2) * F.silu(gate))
    else:
        output = layer.out_proj(layer.norm(scanned.flatten(2), gate))
    return output


def rebuilt(layer: Any, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
    """The layer's output from its hidden attention."""
    parts = decompose_mamba_layer(layer, inputs, mask=mask)
    scanned = torch.einsum("rcqk,rkc->rqc", parts.hidden, parts.values) + layer.D * parts.values
    kept = inputs if mask is None else inputs * mask[..., None]
    gate = layer.in_proj(kept).chunk(2, dim=-1)[1]
    output: Tensor = layer.out_proj(scanned * F.silu(gate))
    return output


@pytest.mark.parametrize("make", [mixer, lambda: mixer("FalconMamba"), jamba], ids=["mamba", "falcon", "jamba"])
@torch.no_grad()
def test_the_hidden_attention_is_what_the_layer_computes(make: Any) -> None:
    layer, inputs = make(), torch.randn(2, 9, 12)
    torch.testing.assert_close(rebuilt(layer, inputs), layer(inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MAMBA2)
@torch.no_grad()
def test_the_hidden_attention_of_heads_is_what_mamba_2_computes(kind: str) -> None:
    layer, inputs = MAMBA2[kind](), torch.randn(2, 9, 12)
    expected = layer(inputs)
    assert float(expected.abs().max()) > 0.1
    torch.testing.assert_close(rebuilt2(layer, inputs), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_heads_of_mamba_2_are_attention_times_gate() -> None:
    layer, inputs = mamba2(), torch.randn(2, 7, 12)
    parts = decompose_mamba_layer(layer, inputs)
    assert parts.hidden.shape == (2, 4, 7, 7)
    assert parts.values.shape == (2, 7, 4, 6)
    torch.testing.assert_close(parts.hidden, parts.attention * parts.gate)
    torch.testing.assert_close(parts.attention[:, 0], parts.attention[:, 1])  # of one group
    assert float((parts.attention[:, 1] - parts.attention[:, 2]).abs().max()) > 1e-3
    assert (parts.hidden.triu(1) == 0).all()
    # The limits of the step, and by hand what is left of position 2 at position 4 of the last head.
    assert float(parts.steps.min()) == pytest.approx(0.3)
    assert float(parts.steps.max()) == pytest.approx(1.2)
    left = math.exp(-math.exp(float(layer.A_log[3])) * float(parts.steps[0, 3:5, 3].sum()))  # type: ignore[index, arg-type]
    assert float(parts.decay[0, 3, 4, 2]) == pytest.approx(left, rel=1e-4)
    some = decompose_mamba_layer(layer, inputs, channels=[-1, 0], queries=[-1])
    torch.testing.assert_close(some.hidden, parts.hidden[:, [-1, 0], -1:])
    torch.testing.assert_close(some.attention, parts.attention[:, [-1, 0], -1:])
    torch.testing.assert_close(some.values, parts.values[:, :, [-1, 0]])


@torch.no_grad()
def test_the_names_of_mamba_ssm_and_gates_of_an_mlp_make_no_difference() -> None:
    layer, inputs = mamba2(), torch.randn(2, 7, 12)
    expected = decompose_mamba_layer(layer, inputs)
    other: Any = nn.Module()
    for name in ("conv1d", "act", "dt_bias", "A_log"):
        setattr(other, name, getattr(layer, name))
    other.headdim, other.ngroups, other.dt_limit = 6, 2, (0.3, 1.2)
    # Two parts of an MLP come before the gate, x, B, C and the steps.
    other.in_proj = lambda x: torch.cat([torch.randn(2, 7, 16), layer.in_proj(x)], -1)  # type: ignore[operator]
    torch.testing.assert_close(decompose_mamba_layer(other, inputs).hidden, expected.hidden)


@torch.no_grad()
def test_older_falcons_normalize_without_modules() -> None:
    layer, inputs = mixer("FalconMamba"), torch.randn(1, 5, 12)
    expected = decompose_mamba_layer(layer, inputs).hidden
    for name in ("dt_layernorm", "b_layernorm", "c_layernorm"):
        delattr(layer, name)
    torch.testing.assert_close(decompose_mamba_layer(layer, inputs).hidden, expected)


@torch.no_grad()
def test_padding_is_left_out_as_the_layer_does() -> None:
    inputs, mask = torch.randn(2, 9, 12), torch.ones(2, 9, dtype=torch.bool)
    mask[:, :3] = False
    for layer, build in ((mixer(), rebuilt), (mamba2(), rebuilt2)):
        found = layer(inputs, attention_mask=mask.long())[:, 3:]
        torch.testing.assert_close(build(layer, inputs, mask)[:, 3:], found, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_with_one_decay_a_channel_it_is_attention_times_gate() -> None:
    layer, inputs = mixer(), torch.randn(2, 7, 12)
    several = decompose_mamba_layer(layer, inputs)
    assert float((several.hidden - several.attention * several.gate).abs().max()) > 1e-4
    layer.A_log.copy_(layer.A_log[:, :1].expand_as(layer.A_log))  # type: ignore[operator, index]
    parts = decompose_mamba_layer(layer, inputs)
    torch.testing.assert_close(parts.hidden, parts.attention * parts.gate, rtol=1e-4, atol=1e-6)
    for one in (several, parts):
        assert float(one.decay.min()) >= 0
        assert float(one.decay.max()) <= 1 + 1e-5
        assert (one.hidden.triu(1) == 0).all()
    # By hand: what is left of position 2 at position 4 of the first channel.
    rate = -math.exp(float(layer.A_log[0, 0]))  # type: ignore[index, arg-type]
    left = math.exp(rate * float(parts.steps[0, 3:5, 0].sum()))
    assert float(parts.decay[0, 0, 4, 2]) == pytest.approx(left, rel=1e-4)


@torch.no_grad()
def test_channels_and_queries_are_chosen() -> None:
    layer, inputs = mixer(), torch.randn(2, 7, 12)
    whole, part = (
        decompose_mamba_layer(layer, inputs),
        decompose_mamba_layer(layer, inputs, channels=[5, 1], queries=[-1]),
    )
    torch.testing.assert_close(part.hidden, whole.hidden[:, [5, 1], -1:])
    torch.testing.assert_close(part.gate, whole.gate[:, [5, 1], -1:])
    torch.testing.assert_close(part.values, whole.values[..., [5, 1]])


def test_other_modules_are_refused() -> None:
    with pytest.raises(ValueError, match="Linear is no Mamba layer"):
        decompose_mamba_layer(nn.Linear(3, 3), torch.randn(1, 2, 3))
    stray = nn.Module()
    stray.A_log = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="Module is no Mamba layer"):
        decompose_mamba_layer(stray, torch.randn(1, 2, 3))
    with pytest.raises(ValueError, match="no Mamba layers"):
        mamba_scores(nn.Linear(3, 3), torch.randn(1, 2, 3))


def by_hand() -> OutlierPrompts:
    """One prompt of four examples, patterns 0 1 0 1, the second an outlier; the query has pattern 0."""
    return OutlierPrompts(
        torch.zeros(1, 5, 3),
        torch.ones(1),
        torch.tensor([[False, True, False, False]]),
        torch.tensor([[0, 1, 0, 1, 0]]),
        torch.tensor([[0, 1]]),
    )


def test_the_mechanism_by_hand() -> None:
    # Clean examples 4, 3 and 1 have ranks 1, 2 and 3, and gates 1/2, 1/8 and 1/16 there: heights -1, -3, -4.
    scores = Scores(torch.tensor([[3.0, -1.0, 1.0, 0.0, 9.0]]), torch.tensor([[1 / 16, 0.25, 1 / 8, 0.5, 0.7]]))
    told = icl_mechanism(scores, by_hand())
    assert told["mamba/attention_same"].tolist() == pytest.approx([0.8])
    assert told["mamba/gate"].tolist()[0] == pytest.approx([(1 / 16 + 1 / 8 + 1 / 2) / 3, 0.25])
    assert told["mamba/decay_slope"].tolist() == pytest.approx([-1.5])
    clean, outlier = told["mamba/gate_by_distance"][0].tolist()
    assert clean == pytest.approx([0.5, 0.125, math.nan, 1 / 16], nan_ok=True)
    assert outlier == pytest.approx([math.nan, math.nan, 0.25, math.nan], nan_ok=True)


def test_without_gate_weights_the_gate_halves_with_each_example() -> None:
    model = GatedLinearAttentionICL(30)
    nn.init.zeros_(model.w)  # type: ignore[arg-type]
    batch = OutlierICL().test_batch(0.0, count=20)
    told = icl_mechanism(model.scores(batch.prompts), batch)
    assert told["mamba/decay_slope"].tolist() == pytest.approx([-1.0])
    assert told["mamba/gate"][0, 1].isnan()
    linear = GatedLinearAttentionICL(30, gated=False)
    assert float(icl_mechanism(linear.scores(batch.prompts), batch)["mamba/decay_slope"][0].detach()) == 0.0


def test_the_probe_reads_our_models_and_those_of_hugging_face(tmp_path: Path) -> None:
    task = OutlierICL(dim=11, num_relevant=3, num_irrelevant=3, num_triggers=3, length=6)
    batch = task.test_batch(0.5, count=16)
    hf = transformers.MambaForCausalLM(transformers.MambaConfig(**SIZES, state_size=4))
    heads = transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(**SIZES, num_heads=4, head_dim=6, n_groups=2, state_size=5, chunk_size=4)
    )
    deep = MambaZOH(12, 12, layers=2)
    for name, model, probe in (
        ("deep", deep, ICLMechanismProbe(batch)),
        ("hf", hf, ICLMechanismProbe(batch, inputs=lambda prompts: {"inputs_embeds": prompts})),
        ("hf2", heads, ICLMechanismProbe(batch, inputs=lambda prompts: {"inputs_embeds": prompts})),
    ):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        with dynascope.watch(model, optimizer, run=tmp_path / name, every=1, probes=[probe]):
            for _ in range(2):
                prompts = task.train_batch(4).prompts
                output = model(prompts) if name == "deep" else model(inputs_embeds=prompts).logits
                optimizer.zero_grad()
                output.square().mean().backward()
                optimizer.step()
        record = dynascope.open(tmp_path / name)
        assert record["mamba/gate_by_distance"].shape == (2, 2, 2, 6)
        assert record["mamba/gate"].kind.values.tolist() == ["clean", "outlier"]
        assert bool((record["mamba/gate"] > 0).all())


@torch.no_grad()
def test_the_probes_pure_form_is_the_decomposition_of_the_last_position() -> None:
    model = transformers.MambaModel(transformers.MambaConfig(**SIZES, state_size=4)).eval()
    inputs = torch.randn(2, 7, 12)
    second, entering = model.layers[1].mixer, []
    with second.register_forward_pre_hook(lambda module, args: entering.append(args[0])):
        scores = mamba_scores(model, {"inputs_embeds": inputs})
    parts = decompose_mamba_layer(second, entering[0])
    torch.testing.assert_close(scores.attention[1], parts.attention[:, 0, -1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scores.gate[1], parts.gate.mean(1)[:, -1], rtol=1e-4, atol=1e-6)
    view = ModelView(0, model, (), {}, 0.1)
    batch = OutlierICL(dim=11, num_relevant=3, num_irrelevant=3, length=6).test_batch(0.5, count=2)
    probe = ICLMechanismProbe(batch, inputs=lambda prompts: {"inputs_embeds": prompts})
    assert probe.measure(view)["mamba/decay_slope"].shape == (2,)
