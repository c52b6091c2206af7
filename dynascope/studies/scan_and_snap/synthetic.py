"""The paper's synthetic task: the attended bag of tokens over training, and the grid of both learning rates.

Contexts are bags of common and distinct tokens. Each step draws new sequences; SGD with momentum 0.9 moves the decoder
and attention at rates of their own. Repetitions and cells of the grid are leading axes of one training.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from dynascope.data import SequenceClassData
from dynascope.record import Series
from dynascope.studies.harness import StudyRecord, log_steps
from dynascope.theory.scan_snap import class_mixtures, mixture_entropy, sample_gradients, simulate_population

MOMENTUM = 0.9
RATES = (0.5, 1.0, 2.0, 3.0)
"""Learning rates of attention in the grid."""
RATIOS = (1.0, 2.0, 5.0, 10.0)
"""Learning rates of the decoder over attention's."""
DENSE_UNTIL = 100
"""Steps that are looked at two by two, and the length of a training in the grid."""


@dataclass(frozen=True)
class Config:
    """Sizes and lengths."""

    num_steps: int = 3000
    """Of the long training; the grid's take 100."""
    num_repetitions: int = 10
    """Trainings of each setting within one seed of the study."""
    num_panel_repetitions: int = 2
    """The same for grids with several queries, of which no claim is made."""
    length: int = 128
    batch_size: int = 128
    data: str = ""
    """A text file; empty takes the sources of the Python standard library."""
    num_bytes: int = 1_000_000
    vocab: int = 2000
    window: int = 35
    width: int = 64
    """Of the text models: embedding, or rank of the factors."""
    text_steps: int = 1000
    stack_steps: int = 400
    """Of two blocks on text, whose steps take six times as long as one layer's."""
    text_batch: int = 20
    """Windows a step; the model with one target a window gets ten times as many."""
    dropout: float = 0.0
    """Of the ordinary layer."""
    clip: float | None = None
    """Largest norm of a gradient on text."""
    num_windows: int = 560
    """Held-out windows that attention is read from at the start and the end."""

    def __post_init__(self) -> None:
        trainings = self.num_steps, self.text_steps, self.stack_steps
        if min(*trainings, self.num_repetitions, self.num_panel_repetitions, self.text_batch) < 1:
            raise ValueError("numbers of steps, repetitions and windows must be at least 1")
        if self.window < 3 or self.length < 2:
            raise ValueError("window must be at least 3 and length at least 2: a query wants a context")


@dataclass(frozen=True)
class Arm:
    """Which experiment, with how many queries."""

    task: Literal["scan", "population", "grid", "text"]
    num_last: int = 2
    model: Literal["transformer", "yz", "yz-stack"] = "yz"
    """Of text: the paper's model in low rank, two blocks of it, or one layer of an ordinary transformer."""


def train_cells(
    data: SequenceClassData,
    lr_y: Sequence[float],
    lr_z: Sequence[float],
    *,
    num_repetitions: int,
    num_steps: int,
    generator: torch.Generator,
    start: Literal["zeros", "uniform"] = "zeros",
    looks: Collection[int] = (),
    look: Callable[[int, Tensor], None] = lambda step, Z: None,
) -> Float[Tensor, "repetitions cells vocab vocab"]:
    """Z after training one `YZTransformer` for every repetition and pair of learning rates, all of them at once.

    Cells of one repetition start alike and see the same sequences. `look(step, Z)` is called before the steps in `looks`.
    """
    count, cells, vocab, looks = data.batch_size, len(lr_y), data.vocab, frozenset(looks)
    shape = num_repetitions, 1, vocab, vocab
    reach = vocab**-0.5 if start == "uniform" else 0.0
    # Y first, as in the module; both are drawn even where the reach is 0, so that batches are the same.
    Y, Z = ((reach * (2 * torch.rand(shape, generator=generator) - 1)).repeat(1, cells, 1, 1) for _ in range(2))
    rate_y, rate_z = (torch.tensor(rates)[:, None, None] for rates in (lr_y, lr_z))
    pace_y, pace_z = torch.zeros_like(Y), torch.zeros_like(Z)
    for step in range(num_steps):
        if step in looks:
            look(step, Z)
        drawn = data.sample_counts(num_repetitions * count, generator)
        counts, query, target = (one.view(num_repetitions, 1, count, *one.shape[1:]) for one in drawn)
        for_y, for_z = sample_gradients(Y, Z, counts, query, target).mean()
        pace_y.mul_(MOMENTUM).add_(for_y)
        pace_z.mul_(MOMENTUM).add_(for_z)
        Y.addcmul_(rate_y, pace_y)
        Z.addcmul_(rate_z, pace_z)
    if num_steps in looks:
        look(num_steps, Z)
    return Z


def scan(config: Config, arm: Arm, seed: int, record: StudyRecord) -> None:
    """One next token a query, both rates 1, far beyond the snap: what attention is made of."""
    data = SequenceClassData(arm.num_last, 1, length=config.length, batch_size=config.batch_size)
    population = data.population()
    record.declare(Series("mixture", ("class", "token"), description="Attention of the first repetition."))

    def look(step: int, Z: Tensor) -> None:
        mixtures = class_mixtures(Z, population)[:, 0]
        own = mixtures.gather(2, data.unique.expand(len(mixtures), *data.unique.shape))
        seen = {"common_mass": mixtures[..., data.is_common].sum(-1), "entropy": mixture_entropy(mixtures)}
        record.add(step, {**seen, "largest": mixtures.amax(-1), "distinct": own, "mixture": mixtures[0]})

    train_cells(
        data,
        [1.0],
        [1.0],
        num_repetitions=config.num_repetitions,
        num_steps=config.num_steps,
        generator=torch.Generator().manual_seed(seed),
        looks={*log_steps(config.num_steps, per_decade=20), *range(0, min(DENSE_UNTIL, config.num_steps) + 1, 2)},
        look=look,
    )


def follow_population(config: Config, arm: Arm, record: StudyRecord) -> None:
    """The same with infinitely long sequences, without momentum and with it."""
    data = SequenceClassData(arm.num_last, 1)
    looks = frozenset(log_steps(config.num_steps, per_decade=20))
    for name, momentum, lr in (("momentum", MOMENTUM, 1.0), ("flow", 0.0, 1.0 / (1 - MOMENTUM))):
        trained = simulate_population(data.population(), config.num_steps, lr_y=lr, lr_z=lr, momentum=momentum)
        for step, mixtures in enumerate(trained):
            if step in looks:
                mass = mixtures[:, data.is_common].sum(1)
                record.add(step, {f"{name}/common_mass": mass, f"{name}/entropy": mixture_entropy(mixtures)})


def grid(config: Config, arm: Arm, seed: int, record: StudyRecord) -> None:
    """Entropy of attention after 100 steps for every pair of rates, two next tokens a query, random start."""
    data = SequenceClassData(arm.num_last, 2, length=config.length, batch_size=config.batch_size)
    num_repetitions = config.num_repetitions if arm.num_last == 1 else config.num_panel_repetitions
    lr_z = [rate for rate in RATES for _ in RATIOS]
    Z = train_cells(
        data,
        [rate * ratio for rate in RATES for ratio in RATIOS],
        lr_z,
        num_repetitions=num_repetitions,
        num_steps=min(DENSE_UNTIL, config.num_steps),
        generator=torch.Generator().manual_seed(seed),
        start="uniform",
    )
    entropy = mixture_entropy(class_mixtures(Z, data.population())).mean(-1)
    record.declare(Series("entropy", ("repetition", "lr_z", "ratio"), "nats", "Mean entropy of c_n after training."))
    record.add(0, {"entropy": entropy.view(num_repetitions, len(RATES), len(RATIOS))})
