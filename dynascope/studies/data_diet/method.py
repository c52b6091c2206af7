"""Examples that matter can be told early in training, and half of the data can go (arXiv 2107.07075).

Real 8 × 8 digits, small convolutional nets and MLPs. Each seed repeats the whole experiment: nets are scored early in
training (EL2N, GraNd, forgetting), their mean scores choose what is kept, and fresh nets train on that with the same
number of steps. Then twins are spawned along training for error barriers, and the tangent kernel is followed, each on
the easiest and the hardest tenth of the examples. CIFAR-10 and ResNet-18 are the paper's; digits need no download.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from dynascope.data import ForgettingTracker, PrunedSampler, el2n, error_barrier, grand, instability, select
from dynascope.data.landscape import State
from dynascope.data.scores import cross_entropy
from dynascope.kernels import kernel_velocity, ntk
from dynascope.record import Record, Series
from dynascope.studies.harness import StudyRecord


@dataclass(frozen=True)
class Config:
    """Lengths are in epochs of the full training set, whatever is kept of it: budgets are equal in steps."""

    num_epochs: int = 40
    score_epochs: tuple[int, ...] = (0, 1, 2, 5, 10, 40)
    """When scores are taken; the one before the last (a quarter of the training) is what pruning goes by."""
    spawn_epochs: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 24)
    num_score_runs: int = 10
    num_retrainings: int = 3
    num_kernel_examples: int = 30
    batch_size: int = 128
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    noise: float = 0.1
    num_held_out: int = 500

    @property
    def prune_epoch(self) -> int:
        """The epoch whose scores pruning goes by."""
        return self.score_epochs[-2]


@dataclass(frozen=True)
class Arm:
    """What an arm does; a retraining arm keeps a share of the examples by the scores of another arm."""

    task: Literal["score", "retrain", "barrier", "kernel"]
    network: Literal["conv", "mlp"] = "conv"
    width: float = 1.0
    is_noisy: bool = False
    keep: float = 1.0
    by: Literal["random", "el2n", "grand at init"] = "random"
    scores_of: str = "score-conv"
    drop_hardest: float = 0.0


ARMS = {
    "score-conv": Arm("score"),
    "score-mlp": Arm("score", network="mlp"),
    "score-noisy": Arm("score", is_noisy=True),
    "full": Arm("retrain"),
    **{f"random-{percent}": Arm("retrain", keep=percent / 100) for percent in (50, 30, 20)},
    **{f"el2n-{percent}": Arm("retrain", keep=percent / 100, by="el2n") for percent in (50, 30, 20)},
    "mlp-scores-50": Arm("retrain", keep=0.5, by="el2n", scores_of="score-mlp"),
    "grand-at-init-50": Arm("retrain", keep=0.5, by="grand at init"),
    "narrow-random-50": Arm("retrain", keep=0.5, width=0.25),
    "narrow-el2n-50": Arm("retrain", keep=0.5, width=0.25, by="el2n"),
    "noisy-el2n-50": Arm("retrain", keep=0.5, by="el2n", scores_of="score-noisy", is_noisy=True),
    "noisy-window-50": Arm("retrain", keep=0.5, by="el2n", scores_of="score-noisy", is_noisy=True, drop_hardest=0.1),
    "barrier": Arm("barrier"),
    "kernel": Arm("kernel"),
}


# Data and networks


@dataclass(frozen=True)
class Data:
    """The digits, standardized, with a fixed split; `clean_labels` are the true ones of the training part."""

    images: Tensor
    labels: Tensor
    clean_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def digits(config: Config, *, is_noisy: bool, seed: int) -> Data:
    """Noise gives a share of the training examples a random other label; the seed chooses them."""
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images = ((images.float() - 4.88) / 6.02).view(-1, 1, 8, 8)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, used = order[: config.num_held_out], order[config.num_held_out :]
    clean = labels[used]
    generator = torch.Generator().manual_seed(seed)
    given = clean.clone()
    if is_noisy:
        wrong = torch.randperm(len(clean), generator=generator)[: round(config.noise * len(clean))]
        given[wrong] = (clean[wrong] + torch.randint(1, 10, (len(wrong),), generator=generator)) % 10
    return Data(images[used], given, clean, images[test], labels[test])


def network(arm: Arm) -> nn.Module:
    """Two convolutions and two linear layers (about 20 thousand parameters at width 1), or an MLP."""
    few, many = round(16 * arm.width), round(32 * arm.width)
    if arm.network == "mlp":
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 4 * many),
            nn.ReLU(),
            nn.Linear(4 * many, 4 * few),
            nn.ReLU(),
            nn.Linear(4 * few, 10),
        )
    convolutions = nn.Sequential(
        nn.Conv2d(1, few, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(few, many, 3, padding=1), nn.ReLU()
    )
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(16 * many, many), nn.ReLU(), nn.Linear(many, 10))


def begin(config: Config, arm: Arm, seed: int) -> State:
    """A fresh network and its optimizer."""
    torch.manual_seed(seed)
    model = network(arm)
    return model, torch.optim.SGD(
        model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, nesterov=True
    )


def train_epochs(
    config: Config,
    state: State,
    data: Data,
    sampler: PrunedSampler,
    epochs: range,
    tracker: ForgettingTracker | None = None,
) -> Iterator[int]:
    """Train, stopping at the beginning of each epoch; the learning rate falls at 30, 60 and 80 % of the training."""
    model, optimizer = state
    for epoch in epochs:
        yield epoch
        drops = sum(epoch >= share * config.num_epochs for share in (0.3, 0.6, 0.8))
        set_lr(optimizer, config.lr * 0.2**drops)
        sampler.set_epoch(epoch)
        for ids in torch.tensor(list(sampler)).split(config.batch_size):
            logits = model(data.images[ids])
            optimizer.zero_grad()
            F.cross_entropy(logits, data.labels[ids]).backward()
            optimizer.step()
            if tracker is not None:
                tracker.update(ids, logits.argmax(-1) == data.labels[ids])
    yield epochs.stop


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """One learning rate for all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = lr


# The four tasks


def train(config: Config, arm: Arm, seed: int, record: StudyRecord) -> None:
    """One arm of one repetition."""
    data = digits(config, is_noisy=arm.is_noisy, seed=seed)
    {"score": score, "retrain": retrain, "barrier": barrier, "kernel": kernel}[arm.task](
        config, arm, seed, record, data
    )


def score(config: Config, arm: Arm, seed: int, record: StudyRecord, data: Data) -> None:
    """Scores of every example from several independent trainings, at several epochs."""
    size = len(data.labels)
    for name in ("el2n", "grand"):
        record.declare(Series(name, ("run", "example"), "", f"{name} of every example in each training, by epoch."))
    record.declare(Series("forgetting", ("run", "example"), "events", "Falls from right to wrong over the training."))
    record.declare(Series("input_norm", ("example",), "", "Euclidean norm of the input."))
    record.declare(Series("mislabelled", ("example",), "", "1 where noise changed the label."))
    found = {(name, epoch): [] for name in ("el2n", "grand") for epoch in config.score_epochs}  # type: ignore[var-annotated]
    forgotten = []
    for run in range(config.num_score_runs):
        run_seed = 1000 * seed + run
        state, tracker = begin(config, arm, run_seed), ForgettingTracker(size)
        sampler = PrunedSampler(range(size), seed=run_seed)
        for epoch in train_epochs(config, state, data, sampler, range(config.num_epochs), tracker):
            if epoch in config.score_epochs:
                with torch.no_grad():
                    found["el2n", epoch].append(el2n(state[0](data.images), data.labels))
                found["grand", epoch].append(grand(state[0], cross_entropy, (data.images, data.labels)))
        forgotten.append(tracker.scores())
    for (name, epoch), scores in found.items():
        record.add(epoch, {name: torch.stack(scores)})
    is_wrong = (data.labels != data.clean_labels).float()
    record.add(config.num_epochs, {"forgetting": torch.stack(forgotten), "mislabelled": is_wrong})
    record.add(0, {"input_norm": data.images.flatten(1).norm(dim=1)})


def retrain(config: Config, arm: Arm, seed: int, record: StudyRecord, data: Data) -> None:
    """Accuracy of fresh networks that train on the kept examples, as many steps as on all of them."""
    size = len(data.labels)
    for repeat in range(config.num_retrainings):
        fresh = 1000 * seed + 500 + repeat
        kept = select(scores_for(config, arm, fresh, record, size), keep=arm.keep, drop_hardest=arm.drop_hardest)
        state = begin(config, arm, fresh)
        sampler = PrunedSampler(kept, epoch_size=size, seed=fresh)
        for _ in train_epochs(config, state, data, sampler, range(config.num_epochs)):
            pass
        with torch.no_grad():
            right = state[0](data.test_images).argmax(-1) == data.test_labels
        record.add(repeat, {"accuracy": 100 * right.double().mean(), "kept": float(len(kept))})


def scores_for(config: Config, arm: Arm, fresh: int, record: StudyRecord, size: int) -> np.ndarray:
    """What an arm selects by: mean scores of the scoring trainings, or chance."""
    if arm.by == "random":
        return np.random.default_rng(fresh).random(size)
    name, epoch = ("grand", 0) if arm.by == "grand at init" else ("el2n", config.prune_epoch)
    return mean_scores(record.earlier[arm.scores_of], name, epoch)


def barrier(config: Config, arm: Arm, seed: int, record: StudyRecord, data: Data) -> None:
    """Error barriers between twins by the epoch at which they part, on the easiest and the hardest tenth."""
    hard = mean_scores(record.earlier["score-conv"], "el2n", config.prune_epoch)
    easiest, hardest = tenths(hard)
    loader = DataLoader(TensorDataset(data.images, data.labels), batch_size=1024)

    def train_between(state: State, first: int, last: int, order: int) -> State:
        sampler = PrunedSampler(range(len(data.labels)), seed=1000 * seed + 100 * order + 7)
        for _ in train_epochs(config, state, data, sampler, range(first, last)):
            pass
        return state

    start = begin(config, arm, 1000 * seed + 900)
    for epoch in config.spawn_epochs:
        errors = instability(train_between, start, epoch, config.num_epochs, loader)
        record.add(epoch, {"barrier/easiest": error_barrier(errors[:, easiest])})
        record.add(epoch, {"barrier/hardest": error_barrier(errors[:, hardest])})


def kernel(config: Config, arm: Arm, seed: int, record: StudyRecord, data: Data) -> None:
    """How fast the tangent kernel turns from epoch to epoch, on the easiest and the hardest examples."""
    hard = mean_scores(record.earlier["score-conv"], "el2n", config.prune_epoch)
    parts = {
        name: part[: config.num_kernel_examples]
        for name, part in zip(("easiest", "hardest"), tenths(hard), strict=True)
    }
    state = begin(config, arm, 1000 * seed + 901)
    sampler = PrunedSampler(range(len(data.labels)), seed=1000 * seed + 901)
    before: dict[str, Tensor] = {}
    for epoch in train_epochs(config, state, data, sampler, range(config.num_epochs)):
        now = {name: ntk(copy.deepcopy(state[0]).eval(), data.images[part]) for name, part in parts.items()}
        if before:
            record.add(epoch, {f"velocity/{name}": kernel_velocity(before[name], now[name]) for name in parts})
        before = now


def mean_scores(record: Record, name: str, epoch: int) -> np.ndarray:
    """Mean over the scoring trainings of each example's score at an epoch."""
    return np.asarray(record[name].sel(step=epoch).mean("run").values, np.float64)


def tenths(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the lowest and of the highest tenth, the most extreme first."""
    order, size = np.argsort(scores, kind="stable"), len(scores) // 10
    return order[:size], order[::-1][:size].copy()
