"""σReparam: every linear map reparametrized so that its spectral norm is one learned number.

W becomes (γ / σ(W)) W with σ the largest singular value by power iteration and γ learned, which keeps attention logits
from growing all at once, and so the entropy of attention from collapsing. Source: arXiv 2303.06296, Section 3.2.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, library, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class SigmaReparam(nn.Module):
    """The parametrization of one weight; `sigma_reparam` registers it, and that is the usual way to get one.

    The weight is read as a matrix (out, in): of a convolution, in is everything but the first axis; with
    `is_transposed` the weight is (in, out). `num_splits` cuts the rows of a fused projection into equal parts, each with
    its own σ and γ. While training, each forward does one step of power iteration; in evaluation none. Gradients go
    through W and γ, the singular vectors are constants.

    Raises ValueError for a weight that is zero, whose direction nothing tells.

    >>> layer = nn.Linear(4, 4, bias=False)
    >>> _ = parametrize.register_parametrization(layer, "weight", SigmaReparam(layer.weight))
    >>> torch.linalg.matrix_norm(layer.weight, ord=2).item()
    1.0
    """

    left: Tensor
    right: Tensor

    def __init__(
        self,
        weight: Float[Tensor, "..."],
        *,
        gamma: Literal["one", "preserve"] = "one",
        learn_gamma: bool = True,
        num_splits: int = 1,
        is_transposed: bool = False,
        stats_only: bool = False,
        eps: float = 1e-12,
    ) -> None:
        super().__init__()
        if gamma not in ("one", "preserve"):
            raise ValueError(f"gamma is 'one' or 'preserve', not {gamma!r}")
        self.num_splits, self.is_transposed, self.stats_only, self.eps = num_splits, is_transposed, stats_only, eps
        self.iterates = True
        """Whether training forwards do a step of power iteration; `iterate_each_step` does it in their place."""
        matrices = self._matrices(weight.detach())
        left, sigma, right = torch.linalg.svd(matrices.double(), full_matrices=False)
        if (sigma[:, 0] <= eps).any():
            raise ValueError("a weight of zeros has no spectral norm to set; initialise it before, or exclude it")
        # In single precision whatever the weight is in: σ stays exact, and slow turns of the vectors are not rounded away.
        self.register_buffer("left", left[:, :, 0].float())
        self.register_buffer("right", right[:, 0, :].float())
        if not stats_only:
            start = torch.ones_like(sigma[:, 0]) if gamma == "one" else sigma[:, 0]
            self.gamma = nn.Parameter(start.to(weight.dtype), requires_grad=learn_gamma)

    def forward(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """(γ / σ) W, in the shape and dtype of `weight`."""
        # The ratio of large sums would lose its digits in bfloat16.
        with torch.autocast(weight.device.type, enabled=False):
            matrices = self._matrices(weight)
            iterates = self.training and self.iterates
            if self.stats_only:
                if iterates:
                    self._iterated(matrices.detach())
                return weight
            sigma = self._iterated(matrices) if iterates else self._sigma(matrices)
            scale = self.gamma.float() / sigma.clamp_min(self.eps)
            scaled = (matrices * scale.to(weight.dtype)[:, None, None]).flatten(0, 1)
        return scaled.T if self.is_transposed else scaled.view_as(weight)

    def spectral_norm(self, weight: Float[Tensor, "..."]) -> Float[Tensor, " splits"]:
        """σ of the unscaled weight, by the singular vectors as they stand."""
        return self._sigma(self._matrices(weight))

    def _iterated(self, matrices: Float[Tensor, "splits out in"]) -> Float[Tensor, " splits"]:
        """σ after one step of power iteration, whose second product is also what σ is read from."""
        left = _left_unless_recomputing(matrices.detach(), self.left, self.right, self.eps)
        reached = _to_right(matrices, left)
        right = F.normalize(reached.detach(), dim=-1, eps=self.eps)
        self.left.copy_(left)
        self.right.copy_(right)
        return (reached * right).sum(-1)

    def _sigma(self, matrices: Float[Tensor, "splits out in"]) -> Float[Tensor, " splits"]:
        # Copies, since a later forward moves the buffers, and a backward may still need these.
        return (_to_right(matrices, self.left.clone()) * self.right.clone()).sum(-1)

    def _matrices(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "splits out in"]:
        matrix = weight.T if self.is_transposed else weight.flatten(1)
        if matrix.shape[0] % self.num_splits:
            raise ValueError(f"{matrix.shape[0]} rows cannot be split into {self.num_splits} equal parts")
        matrices: Tensor = matrix.unflatten(0, (self.num_splits, -1))
        return matrices


def sigma_reparam(
    model: nn.Module,
    *,
    include: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d),
    exclude: str | None = None,
    gamma: Literal["one", "preserve"] = "one",
    learn_gamma: bool = True,
    split_fused: Mapping[str, int] | None = None,
    stats_only: bool = False,
    eps: float = 1e-12,
) -> nn.Module:
    """Reparametrize every linear map of `model`, in place, and return it.

    Beside the types in `include`, the projections inside `nn.MultiheadAttention` and Hugging Face's `Conv1D` are taken.
    A weight that an embedding shares stays as it is, and so does what `exclude`, a regular expression searched in the
    parameter's name, matches.

    Args:
        gamma: "one" as in the paper, for a model that starts from scratch; "preserve" starts from γ = σ(W), so that
            the model's function stays what it was: for pretrained ones.
        learn_gamma: False fixes γ (the paper's ablation without γ).
        split_fused: How many equal parts the rows of a fused projection have, by a regular expression on its name, as
            `{"c_attn|in_proj|qkv": 3}`; each part gets its own σ and γ. Without it a fused projection shares one, as in
            the paper's vision code, which holds the entropy less firmly.
        stats_only: Only follow σ (see `spectral_norms`) and change nothing.

    Raises ValueError when nothing matches, or a weight is zero.

    Neither W nor γ wants weight decay (W is scale-free, so that decay only changes its effective lr):
    `AdamW(model.parameters(), weight_decay=0.0)`. Under DistributedDataParallel, `broadcast_buffers=False` saves a
    broadcast a step, since every rank computes the same singular vectors. Source: arXiv 2303.06296, Section 3.2.

    >>> model = sigma_reparam(remove_norms(model))
    """
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    made: dict[int, SigmaReparam] = {}
    for full_name, module, name in list(_linear_maps(model, include)):
        weight = getattr(module, name)
        if id(weight) in embeddings or (exclude is not None and re.search(exclude, full_name)):
            continue
        if id(weight) not in made:
            splits = (parts for pattern, parts in (split_fused or {}).items() if re.search(pattern, full_name))
            try:
                made[id(weight)] = SigmaReparam(
                    weight,
                    gamma=gamma,
                    learn_gamma=learn_gamma,
                    num_splits=next(splits, 1),
                    is_transposed=type(module).__name__ == "Conv1D",
                    stats_only=stats_only,
                    eps=eps,
                )
            except ValueError as error:
                raise ValueError(f"{full_name}: {error}") from None
        parametrize.register_parametrization(module, name, made[id(weight)])
    if not made:
        raise ValueError("no linear map of the model matches `include` without matching `exclude`")
    return model


def merge_sigma_reparam(model: nn.Module) -> nn.Module:
    """Take the reparametrization out again, in place: the weights become what they were scaled to.

    >>> merge_sigma_reparam(model).state_dict()  # plain names, for inference
    """
    for _, module, name, parametrization in list(_reparametrized(model)):
        parametrization.eval()
        parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return model


def iterate_each_step(model: nn.Module, optimizer: Optimizer) -> RemovableHandle:
    """Do the power iteration once after each step of `optimizer`, with equal shapes together.

    Forwards no longer iterate then, which is what gradient accumulation wants, and what activation checkpointing needs
    where one layer runs twice before a backward pass (its first run could not be repeated exactly). The handle's
    `remove` ends it, but does not give the iteration back to the forwards. Weights that FSDP2 sharded are gathered one at
    a time.

    >>> handle = iterate_each_step(model, optimizer)
    """
    every = list(_reparametrized(model))
    for *_, parametrization in every:
        parametrization.iterates = False

    def matrices(module: nn.Module, name: str, parametrization: SigmaReparam) -> Tensor:
        return parametrization._matrices(_original(module, name))

    @torch.no_grad()
    def iterate(*arguments: object) -> None:
        groups: dict[object, list[tuple[nn.Module, str, SigmaReparam]]] = {}
        for _, module, name, one in every:
            shape = one.left.shape[1:], one.right.shape[1:], one.left.device
            groups.setdefault(shape, []).append((module, name, one))
        for group in groups.values():
            sizes, eps = [one.num_splits for *_, one in group], group[0][-1].eps
            # Matrix by matrix, as one product of all would first copy every weight; vectors are few, and go together.
            lefts = torch.cat([_to_left(matrices(*place), place[-1].right) for place in group])
            left = F.normalize(lefts, dim=-1, eps=eps).split(sizes)
            rights = torch.cat([_to_right(matrices(*place), part) for place, part in zip(group, left, strict=True)])
            right = F.normalize(rights, dim=-1, eps=eps).split(sizes)
            torch._foreach_copy_([one.left for *_, one in group], list(left))
            torch._foreach_copy_([one.right for *_, one in group], list(right))

    return optimizer.register_step_post_hook(iterate)


def spectral_norms(model: nn.Module) -> dict[str, Float[Tensor, " splits"]]:
    """σ of every reparametrized weight before scaling, by parameter name; also with `stats_only`.

    >>> {name: sigma.item() for name, sigma in spectral_norms(model).items()}
    """
    return {
        full_name: parametrization.spectral_norm(_original(module, name))
        for full_name, module, name, parametrization in _reparametrized(model)
    }


def _linear_maps(model: nn.Module, include: tuple[type[nn.Module], ...]) -> Iterator[tuple[str, nn.Module, str]]:
    """(full name, module, parameter name) of every weight that is a linear map and has no parametrization yet."""
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            names = ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"]
        elif isinstance(module, include) or type(module).__name__ == "Conv1D":
            names = ["weight"]
        else:
            continue
        for name in names:
            if isinstance(module._parameters.get(name), nn.Parameter):
                yield f"{path}.{name}".lstrip("."), module, name


def _reparametrized(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, SigmaReparam]]:
    for path, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        for name, parametrizations in cast(nn.ModuleDict, module.parametrizations).items():
            for one in cast(parametrize.ParametrizationList, parametrizations):
                if isinstance(one, SigmaReparam):
                    yield f"{path}.{name}".lstrip("."), module, name, one


def _original(module: nn.Module, name: str) -> Tensor:
    """The weight that is trained, before it is scaled; gathered where it is sharded, as σ is of the whole."""
    weight = cast(Tensor, cast(nn.ModuleDict, module.parametrizations)[name].original).detach()
    return cast(Tensor, weight.full_tensor()) if hasattr(weight, "full_tensor") else weight


def _to_left(
    matrices: Float[Tensor, "splits out in"], right: Float[Tensor, "splits in"]
) -> Float[Tensor, "splits out"]:
    product: Tensor = torch.bmm(matrices.float(), right.float()[:, :, None])[:, :, 0]
    return product


def _to_right(
    matrices: Float[Tensor, "splits out in"], left: Float[Tensor, "splits out"]
) -> Float[Tensor, "splits in"]:
    product: Tensor = torch.bmm(left.float()[:, None], matrices.float())[:, 0]
    return product


@library.custom_op("dynascope::left_singular_vector", mutates_args=())
def _left_unless_recomputing(matrices: Tensor, left: Tensor, right: Tensor, eps: float) -> Tensor:
    """The left vector that `right` is sent to; or as it stands, in activation checkpointing's second forward.

    That one runs inside a backward pass. An operator of its own, as a compiler would otherwise answer at compile time
    what must be asked at each call.
    """
    if torch._C._current_graph_task_id() != -1:
        return left.clone()
    reached = F.normalize(_to_left(matrices, right), dim=-1, eps=eps)
    return reached.to(left.dtype)  # model.bfloat16() casts buffers, too


@_left_unless_recomputing.register_fake
def _(matrices: Tensor, left: Tensor, right: Tensor, eps: float) -> Tensor:
    return torch.empty_like(left)
