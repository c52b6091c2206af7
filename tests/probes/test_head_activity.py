"""Active and dormant heads, by what they attend to and by what their absence costs."""

import pytest
import torch
from torch import Tensor, nn

from dynascope.nn.toy_transformer import CausalAttention, ToyTransformer
from dynascope.probes.head_activity import HeadActivity, classify_heads

# Tokens: 0 is <s>, 1 and 2 are prose, 3 is code.
PROSE, CODE = (torch.tensor([[0] + [token] * 11]) for token in (1, 3))


class OneHot(nn.Module):
    """Head 0 parks on <s> unless it sees code, where it attends to itself and says "code"; head 1 does nothing but park."""

    def __init__(self) -> None:
        super().__init__()
        toy = ToyTransformer(4, 12, width=8, depth=1, num_heads=2, has_norms=False, without_mlp=(0,))
        for parameter in toy.parameters():
            nn.init.zeros_(parameter)
        with torch.no_grad():
            toy.token.weight[:, :4] = torch.eye(4)
            attention = toy.blocks[0].attention
            assert isinstance(attention, CausalAttention)
            attention.query.weight[0, 1:3] = attention.query.weight[4, 1:4] = 100.0
            attention.query.weight[1, 3] = 100.0
            attention.key.weight[0, 0] = attention.key.weight[4, 0] = 1.0
            attention.key.weight[1, 3] = 1.0
            attention.value.weight[0, 3] = 1.0
            attention.out.weight[7, 0] = 1.0
            toy.head.weight[3, 7] = 10.0
        self.blocks, self.toy = toy.blocks, toy

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.toy(tokens)
        return logits


def test_heads_are_told_by_domain_and_confirmed_by_their_absence() -> None:
    model = OneHot()
    first, second = classify_heads(model, {"prose": [PROSE, PROSE], "code": [CODE]})
    assert [first.state(domain) for domain in ("prose", "code")] == ["dormant", "active"]
    assert first.is_active_dormant
    assert first.is_confirmed("prose")
    assert first.is_confirmed("code")
    # Without the head all four tokens are as likely: log 4, instead of nearly 0, at all predictions of code but <s>'s.
    assert first.loss_change["code"] == pytest.approx(10 / 11 * 1.3863, abs=1e-2)
    assert second.state("prose") == second.state("code") == "dormant"
    assert second.loss_change["code"] == second.loss_change["prose"] == 0
    assert not second.is_active_dormant


def test_only_the_positions_that_count_are_read() -> None:
    mixed = torch.cat([PROSE[:, :6], CODE[:, 6:]], 1)
    is_code = mixed == 3
    first, _ = classify_heads(
        OneHot(), {"code": [(mixed, is_code)], "prose": [(mixed, ~is_code)]}, is_causal_check=False
    )
    assert first.sink_score["code"] == pytest.approx(0, abs=1e-4)
    assert first.sink_score["prose"] == pytest.approx(1, abs=1e-4)
    assert first.loss_change == {}


def test_a_hugging_face_model_is_read_and_left_as_it_was() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=19,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
    tokens = torch.randint(19, (3, 12))
    found = classify_heads(model, {"any": [tokens]})
    assert model.training
    weights = torch.stack(model.eval()(tokens, output_attentions=True).attentions)[:, :, :, 5:, 0].mean((1, 3))
    assert [(one.layer, one.head) for one in found] == [(layer, head) for layer in (0, 1) for head in range(4)]
    torch.testing.assert_close(torch.tensor([one.sink_score["any"] for one in found]), weights.flatten())


def test_what_cannot_be_told_is_said() -> None:
    with pytest.raises(ValueError, match="no batches of code"):
        classify_heads(OneHot(), {"prose": [PROSE], "code": []})
    with pytest.raises(ValueError, match="no causal check"):
        HeadActivity(0, 0, {"code": 1.0}).is_confirmed("code")
    assert HeadActivity(0, 0, {"code": 0.7}).state("code") == "between"
