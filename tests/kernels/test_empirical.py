"""The empirical kernel equals the Jacobian's product with itself, whichever way it is computed."""

import math
from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynascope.kernels import examples_at_once, ntk, ntk_trace, ntk_vp
from dynascope.nn import NTKConv2d, NTKLinear


class Attention(nn.Module):
    """Embeddings, attention whose projections are one matrix, a norm, and an output tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.position = nn.Parameter(torch.randn(5, 8))
        self.qkv, self.out, self.norm = nn.Linear(8, 24), nn.Linear(8, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        query, key, value = (one.unflatten(-1, (2, 4)).transpose(1, 2) for one in self.qkv(x).chunk(3, -1))
        weights = torch.softmax(query @ key.mT / 2, -1)
        x = self.norm(x + self.out((weights @ value).transpose(1, 2).flatten(2)))
        return self.head(x[:, -1])


class Twice(nn.Module):
    """One linear layer used two times, and a weight that never takes part."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)
        self.read = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Flatten(), nn.Linear(6, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).squeeze(-1)


def images(count: int) -> Tensor:
    return torch.randn(count, 2, 6, 6)


def vectors(count: int) -> Tensor:
    return torch.randn(count, 4)


def tokens(count: int) -> Tensor:
    return torch.randint(7, (count, 5))


MODELS: Mapping[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 3)), vectors),
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.ReLU(),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 6, 3, stride=2, groups=2),
            nn.GroupNorm(2, 6),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(24, 3),
        ),
        images,
    ),
    "wide conv": (
        lambda: nn.Sequential(nn.Conv2d(2, 32, 5), nn.ReLU(), nn.Conv2d(32, 32, 2), nn.Flatten(), nn.Linear(32, 2)),
        images,
    ),
    "attention": (Attention, tokens),
    "twice": (Twice, vectors),
    "scalar": (Scalar, vectors),
    "ntk parametrization": (
        lambda: nn.Sequential(
            NTKConv2d(2, 3, 3, b_std=0.1), nn.ReLU(), nn.Flatten(), NTKLinear(48, 5, w_std=1.5, b_std=0.1)
        ),
        images,
    ),
}


@pytest.fixture(params=MODELS, name="case")
def a_case(request: pytest.FixtureRequest) -> tuple[nn.Module, Callable[[int], Tensor]]:
    torch.manual_seed(0)
    make, inputs = MODELS[request.param]
    model = make().double().eval()
    return model, lambda count: inputs(count).double() if inputs is not tokens else inputs(count)


def jacobian(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Each parameter's (examples, outputs, numbers), one backward pass an entry."""
    rows: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    outputs = model(x).reshape(len(x), -1)
    for one in outputs.flatten():
        slopes = torch.autograd.grad(one, list(model.parameters()), retain_graph=True, allow_unused=True)
        for (name, parameter), slope in zip(model.named_parameters(), slopes, strict=True):
            rows[name].append((torch.zeros_like(parameter) if slope is None else slope).flatten())
    return {name: torch.stack(of_one).view(*outputs.shape, -1) for name, of_one in rows.items()}


def product(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.einsum("iap,jbp->ijab", one[name], two[name]) for name in one}


@pytest.mark.parametrize("method", ["auto", "jacobian", "vp"])
def test_every_method_gives_the_product_of_jacobians(
    case: tuple[nn.Module, Callable[[int], Tensor]], method: str
) -> None:
    model, inputs = case
    x1, x2 = inputs(5), inputs(3)
    of_one, of_two = jacobian(model, x1), jacobian(model, x2)
    expected = torch.stack(list(product(of_one, of_two).values())).sum(0)
    kernel = ntk(model, x1, x2, method=method)
    torch.testing.assert_close(kernel, expected, rtol=1e-10, atol=1e-12)
    diagonal = expected.diagonal(dim1=2, dim2=3)
    torch.testing.assert_close(ntk(model, x1, x2, method=method, output="diag"), diagonal)
    torch.testing.assert_close(ntk(model, x1, x2, method=method, output="trace"), diagonal.mean(-1))
    for chunk in (1, 2):
        torch.testing.assert_close(ntk(model, x1, x2, method=method, chunk=chunk), expected)


def test_a_set_with_itself_is_symmetric_and_semidefinite(case: tuple[nn.Module, Callable[[int], Tensor]]) -> None:
    model, inputs = case
    x = inputs(6)
    kernel = ntk(model, x, chunk=4)
    assert torch.equal(kernel, kernel.permute(1, 0, 3, 2))
    torch.testing.assert_close(kernel, ntk(model, x, x))
    flat = kernel.permute(0, 2, 1, 3).flatten(0, 1).flatten(1)
    assert torch.linalg.eigvalsh(flat)[0] > -1e-9 * flat.diagonal().sum()
    torch.testing.assert_close(ntk_trace(model, x), kernel.diagonal(dim1=2, dim2=3).sum(-1).diagonal())


def test_parameters_add_up_and_can_be_chosen(case: tuple[nn.Module, Callable[[int], Tensor]]) -> None:
    model, inputs = case
    x = inputs(4)
    each = ntk(model, x, per_layer=True)
    own = jacobian(model, x)
    assert each.keys() == own.keys()
    for name, expected in product(own, own).items():
        torch.testing.assert_close(each[name], expected)
    torch.testing.assert_close(torch.stack(list(each.values())).sum(0), ntk(model, x))
    first = next(iter(each))
    torch.testing.assert_close(ntk(model, x, params={first: dict(model.named_parameters())[first]}), each[first])


def test_products_with_vectors(case: tuple[nn.Module, Callable[[int], Tensor]]) -> None:
    model, inputs = case
    x1, x2 = inputs(4), inputs(3)
    v = torch.randn_like(model(x2))
    expected = torch.einsum("ijab,jb->ia", ntk(model, x1, x2), v.reshape(3, -1)).view(4, *v.shape[1:])
    torch.testing.assert_close(ntk_vp(model, x1, v, x2), expected)


def test_scaling_the_function_scales_the_kernel_by_its_square(case: tuple[nn.Module, Callable[[int], Tensor]]) -> None:
    model, inputs = case
    x = inputs(3)
    torch.testing.assert_close(ntk(model, x, readout=lambda out: 3 * out), 9 * ntk(model, x))


def test_a_linear_model_in_ntk_parametrization_has_the_inner_products_at_any_width_and_time() -> None:
    model, x = NTKLinear(5, 2, bias=False).double(), torch.randn(4, 5, dtype=torch.float64)
    for _ in range(2):
        expected = torch.einsum("ij,ab->ijab", x @ x.T / 5, torch.eye(2, dtype=torch.float64))
        torch.testing.assert_close(ntk(model, x), expected)
        nn.init.normal_(model.weight)


def test_single_precision_is_near_double(case: tuple[nn.Module, Callable[[int], Tensor]]) -> None:
    model, inputs = case
    x = inputs(4)
    exact = ntk(model, x)
    model.float()
    rough = ntk(model, x if x.dtype == torch.long else x.float())
    assert (rough - exact).norm() < 1e-5 * exact.norm()
    assert ntk(model, x if x.dtype == torch.long else x.float(), dtype=torch.float64).dtype == torch.float64


def test_a_half_precision_kernel_is_summed_in_single_precision() -> None:
    assert ntk(nn.Linear(4, 2).bfloat16(), torch.randn(3, 4).bfloat16()).dtype == torch.float32


def test_sequences_of_two_lengths_and_a_language_models_readout() -> None:
    torch.manual_seed(0)
    model = Attention().double()
    x1, x2 = tokens(3), torch.randint(7, (2, 4))

    def margin(logits: Tensor) -> Tensor:
        return logits[:, 0] - logits[:, 1]

    kernel = ntk(model, x1, x2, readout=margin)
    assert kernel.shape == (3, 2, 1, 1)
    torch.testing.assert_close(kernel, ntk(model, x1, x2, readout=margin, method="vp"))


def test_hugging_face_models_are_read_by_a_readout() -> None:
    import transformers

    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, n_positions=8, vocab_size=11)
    model = transformers.GPT2LMHeadModel(config).double().eval()
    batch = {"input_ids": torch.randint(11, (3, 6))}

    def label_logit(out: object) -> Tensor:
        return out.logits[:, -1, 0]  # type: ignore[attr-defined, no-any-return]

    auto = ntk(model, batch, readout=label_logit)
    torch.testing.assert_close(auto, ntk(model, batch, readout=label_logit, method="jacobian"))


def test_a_loss_of_each_sequence_is_an_output_too() -> None:
    model, x, y = nn.Sequential(nn.Linear(4, 3)).double(), torch.randn(5, 4).double(), torch.randint(3, (5,))
    kernel = ntk(model, x, readout=lambda logits: F.cross_entropy(logits, y[: len(logits)], reduction="none"), chunk=5)
    errors = torch.softmax(model(x), -1) - F.one_hot(y, 3)
    torch.testing.assert_close(kernel[..., 0, 0], (x @ x.T + 1) * (errors @ errors.T))


def test_what_is_no_kernel_is_told() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match="batch normalization in training mode"):
        ntk(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), x)
    with pytest.raises(ValueError, match="dropout in training mode"):
        ntk(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), x)
    with pytest.raises(ValueError, match="give a readout"):
        ntk(nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Linear(2, 2)), x)
    with pytest.raises(ValueError, match="no trained parameters"):
        ntk(nn.Linear(4, 2).requires_grad_(False), x)


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2)).eval()
    model[0].bias.requires_grad_(False)
    model(torch.randn(3, 4)).sum().backward()
    before = [(one.grad, one.requires_grad) for one in model.parameters()]
    ntk(model, torch.randn(3, 4))
    after = [(one.grad, one.requires_grad) for one in model.parameters()]
    assert all(a[0] is b[0] and a[1] == b[1] for a, b in zip(before, after, strict=True))
    assert math.isfinite(float(ntk(model, torch.randn(1, 4), output="trace")))


def test_one_example_against_many_takes_no_pass_for_each() -> None:
    """Two passes over the many, one over the one, and one more that tells how many fit."""
    model, passes = nn.Linear(4, 1), list[int]()
    model.register_forward_hook(lambda module, inputs, output: passes.append(len(inputs[0])))
    one, many = vectors(1), vectors(65)
    kernel = ntk(model, one, many, output="trace")
    torch.testing.assert_close(kernel, one @ many.T + 1)
    assert sorted(passes) == [1, 1, 32, 33]
    passes.clear()
    torch.testing.assert_close(ntk(model, many, output="trace", chunk=examples_at_once(model, many)), many @ many.T + 1)
    assert passes == [1, 33, 32]
    with pytest.raises(ValueError, match="dropout"):
        examples_at_once(nn.Sequential(nn.Linear(4, 1), nn.Dropout(0.5)), many)
