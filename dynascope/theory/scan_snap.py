"""How one attention layer learns what to look at: gradients and infinite-length dynamics in closed form (2305.16380).

Everything takes leading axes (`*cells`), so that many trainings with data of one shape go side by side.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dynascope.data.sequence_classes import Population
from dynascope.nn.yz_transformer import mixture_of_counts


@dataclass(frozen=True)
class SampleGradients:
    """Descent directions of each sample's cross-entropy in `YZTransformer` (l2 norm, no residual), in factors.

    For Y it is the outer product of `error` and `features`; for Z it is `attention` in the row of the query, and nothing
    in all others.
    """

    error: Float[Tensor, "*cells batch vocab"]
    """e_n − softmax(Y f)."""
    features: Float[Tensor, "*cells batch vocab"]
    """f, the mixture over its length."""
    attention: Float[Tensor, "*cells batch vocab"]
    """diag(u) (I − f fᵀ) Yᵀ error / ‖u‖, which sums to 0."""
    query: Int[Tensor, "*cells batch"]

    def mean(self) -> tuple[Float[Tensor, "*cells vocab vocab"], Float[Tensor, "*cells vocab vocab"]]:
        """The directions of the mean loss for Y and Z, as whole matrices."""
        count, vocab = self.error.shape[-2:]
        for_y = self.error.mT @ self.features / count
        for_z = self.attention.new_zeros(*self.attention.shape[:-2], vocab, vocab)
        rows = self.query[..., None].expand(self.attention.shape)
        return for_y, for_z.scatter_add(-2, rows, self.attention / count)


def sample_gradients(
    Y: Float[Tensor, "*cells vocab vocab"],
    Z: Float[Tensor, "*cells vocab vocab"],
    counts: Float[Tensor, "*#cells batch vocab"],
    query: Int[Tensor, "*#cells batch"],
    target: Int[Tensor, "*#cells batch"],
) -> SampleGradients:
    """Every sample's descent direction from how often each token is in its context, with no backward pass.

    `Y` and `Z` are those of `YZTransformer`. With probabilities P(l|n) for counts they are those of infinite sequences.
    Source: 2305.16380, section 3 (the lemma on the dynamics of one layer).

    >>> for_y, for_z = sample_gradients(model.Y, model.Z, *data.sample_counts(128, generator)).mean()
    """
    cells = Y.shape[:-2]
    query = query.expand(*cells, query.shape[-1])
    target = target.expand(query.shape)
    rows = Z.gather(-2, query[..., None].expand(*query.shape, Z.shape[-1]))
    mixture = mixture_of_counts(counts, rows)
    length = mixture.norm(dim=-1, keepdim=True)
    features = mixture / length
    error = -(features @ Y.mT).softmax(-1)
    error = error.scatter_add(-1, target[..., None], torch.ones_like(error[..., :1]))
    pulled = error @ Y
    across = pulled - features * (features * pulled).sum(-1, keepdim=True)
    return SampleGradients(error, features, mixture * across / length, query)


def class_mixtures(
    Z: Float[Tensor, "*cells vocab vocab"], population: Population
) -> Float[Tensor, "*cells classes vocab"]:
    """c_n: what an infinitely long sequence of each class attends to.

    >>> class_mixtures(torch.zeros(data.vocab, data.vocab), data.population())  # P(l|n) itself
    """
    return mixture_of_counts(population.probs.to(Z.dtype), Z[..., population.queries, :])


def population_step(
    Y: Float[Tensor, "vocab vocab"], Z: Float[Tensor, "vocab vocab"], population: Population, lr_y: float, lr_z: float
) -> tuple[Float[Tensor, "vocab vocab"], Float[Tensor, "vocab vocab"]]:
    """One step of gradient descent on the loss of infinitely long sequences, classes with equal weights.

    >>> Y, Z = population_step(Y, Z, data.population(), lr_y=1.0, lr_z=1.0)
    """
    gradients = sample_gradients(Y, Z, population.probs.to(Y.dtype), population.queries, population.targets)
    for_y, for_z = gradients.mean()
    return Y + lr_y * for_y, Z + lr_z * for_z


def simulate_population(
    population: Population, num_steps: int, *, lr_y: float, lr_z: float, momentum: float = 0.0
) -> Iterator[Float[Tensor, "classes vocab"]]:
    """c_n from zero matrices on, before each step and after the last: training without sampling, in double precision.

    `momentum` is that of SGD; at 0.9 the rates are ten times as large in the end.

    Raises ValueError for rates that are not above 0, or a momentum outside [0, 1).

    >>> mixtures = torch.stack(list(simulate_population(data.population(), 100, lr_y=1.0, lr_z=1.0)))
    """
    if lr_y <= 0 or lr_z <= 0 or not 0 <= momentum < 1:
        raise ValueError(f"lr_y={lr_y} and lr_z={lr_z} must be above 0, and momentum={momentum} in [0, 1)")
    vocab = population.probs.shape[1]
    Y, Z, pace_y, pace_z = torch.zeros(4, vocab, vocab, dtype=torch.float64)
    for _ in range(num_steps):
        yield class_mixtures(Z, population)
        moved_y, moved_z = population_step(Y, Z, population, lr_y, lr_z)
        pace_y, pace_z = momentum * pace_y + (moved_y - Y), momentum * pace_z + (moved_z - Z)
        Y, Z = Y + pace_y, Z + pace_z
    yield class_mixtures(Z, population)


def relative_gain(mixture: Float[Tensor, "*cells vocab"], token: int, other: int) -> Float[Tensor, "*cells"]:
    """f_l² / f_l'² − 1 of two tokens of one context: it keeps its sign while training scans, and grows.

    Source: 2305.16380, section 5 (relative gain of distinct tokens).

    >>> relative_gain(torch.tensor([0.6, 0.3, 0.1]), 0, 1)
    tensor(3.)
    """
    gain: Tensor = (mixture[..., token] / mixture[..., other]).square() - 1
    return gain


def mixture_entropy(mixture: Float[Tensor, "*cells vocab"]) -> Float[Tensor, "*cells"]:
    """Entropy of attention over tokens, in nats; tokens without any count nothing.

    >>> mixture_entropy(torch.tensor([0.5, 0.5, 0.0]))
    tensor(0.6931)
    """
    entropy: Tensor = torch.special.entr(mixture).sum(-1)
    return entropy


def snap_time(num_classes: int, vocab: int, lr_y: float) -> float:
    """Steps of gradient flow after which attention is expected to freeze, 2 K ln M / lr_Y, up to constants.

    Source: 2305.16380 (phase transition); with momentum β divide by 1 / (1 − β).

    >>> round(snap_time(2, 34, 1.0), 1)
    14.1
    """
    return 2 * num_classes * math.log(vocab) / lr_y
