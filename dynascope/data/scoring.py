"""Scoring a whole dataset with one model or several, by example."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, SequentialSampler

from dynascope.data.evaluation import evaluating
from dynascope.data.per_example import LossFunction
from dynascope.data.scores import by_example, cross_entropy, el2n, grand, l1_error, margin
from dynascope.kernels.layerwise import called, logits_of

if TYPE_CHECKING:
    import xarray

EXAMPLE_ID = "example_id"
FROM_LOGITS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"el2n": el2n, "l1_error": l1_error, "margin": margin}


class with_ids(Dataset[Any]):  # noqa: N801  reads as what it does: with_ids(dataset)
    """A dataset whose examples also tell their position: as a last element, or under "example_id" of a mapping.

    >>> inputs, labels, ids = next(iter(DataLoader(with_ids(dataset), batch_size=8, shuffle=True)))
    """

    def __init__(self, dataset: Dataset[Any] | Sequence[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        example = self.dataset[index]
        if isinstance(example, Mapping):
            return {**example, EXAMPLE_ID: index}
        return (*example, index) if isinstance(example, tuple) else (example, index)


def score_examples(
    models: nn.Module | Sequence[nn.Module],
    loader: DataLoader[Any],
    scores: Iterable[str] = ("el2n", "grand"),
    *,
    at: int = 0,
    loss_fn: LossFunction = cross_entropy,
) -> "xarray.Dataset":
    """Every example's scores under each model, dims (run, step, example); the mean over "run" is what one selects by.

    Args:
        models: The same training from several initialisations; 10 are the paper's choice (see `reliability`).
        loader: Batches (inputs, labels) or (inputs, labels, ids), or mappings with "labels" and "example_id"; without
            augmentation, as a score is of the example itself.
        scores: Any of "el2n", "grand", "l1_error", "margin".
        at: The step at which the models were taken; the one label of the axis "step".
        loss_fn: For "grand": one loss an example, from what the model returns and the labels.

    Where the logits are of sequences (examples, tokens, classes), scores are means over tokens (see `over_tokens`), so
    labels must stand where they are predicted. The models are looked at in evaluation mode, each on the device where it
    is; their modes, buffers and the random state are afterwards what they were. Raises ValueError for an unknown score,
    for a loader that shuffles without ids (see `with_ids`), and for one that drops its last batch.

    >>> scores = score_examples(models, loader, at=200)
    >>> keep = select(scores["el2n"].mean("run").values[0], keep=0.5)
    """
    import xarray

    wanted = tuple(scores)
    for name in wanted:
        if name not in (*FROM_LOGITS, "grand"):
            raise ValueError(f"unknown score {name!r}; there are {', '.join((*FROM_LOGITS, 'grand'))}")
    if loader.drop_last and len(loader.dataset) % (loader.batch_size or 1):  # type: ignore[arg-type]
        raise ValueError("the loader drops its last batch, whose examples would have no score: use drop_last=False")
    models = [models] if isinstance(models, nn.Module) else list(models)
    if not models:
        raise ValueError("give at least one model")
    runs = [_scores_of(model, loader, wanted, loss_fn) for model in models]
    examples = np.sort(runs[0][EXAMPLE_ID])
    values = {}
    for name in wanted:
        ordered = [run[name][np.argsort(run[EXAMPLE_ID], kind="stable")] for run in runs]
        values[name] = (("run", "step", "example"), np.stack(ordered)[:, None])
    return xarray.Dataset(values, coords={"run": np.arange(len(models)), "step": [at], "example": examples})


def unpacked(batch: Any) -> tuple[Any, Tensor, Tensor | None]:
    """(inputs, labels, ids or None) of a batch in one of the forms that loaders give."""
    if isinstance(batch, Mapping):
        rest = dict(batch)
        ids = rest.pop(EXAMPLE_ID, None)
        labels = rest.pop("labels", None)
        labels = rest.pop("label", None) if labels is None else labels
        if labels is None:
            raise ValueError('a batch has neither "labels" nor "label"')
        return rest, labels, ids
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
        raise ValueError("a batch is (inputs, labels), (inputs, labels, ids), or a mapping with labels")
    return batch[0], batch[1], batch[2] if len(batch) == 3 else None


def moved_batches(loader: DataLoader[Any], device: torch.device) -> Iterator[tuple[Any, Tensor, Tensor | None]]:
    """A loader's batches, unpacked, on a device; drawing them leaves the random state as it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for batch in loader:
            inputs, labels, ids = unpacked(batch)
            if isinstance(inputs, Mapping):
                inputs = {name: value.to(device) for name, value in inputs.items()}
            else:
                inputs = inputs.to(device)
            yield inputs, labels.to(device), ids


def _scores_of(
    model: nn.Module, loader: DataLoader[Any], names: Sequence[str], loss_fn: LossFunction
) -> dict[str, np.ndarray]:
    """Scores by name, and ids, in the order of the loader; only scores are kept, never all logits."""
    kept: dict[str, list[Tensor]] = {name: [] for name in (*names, EXAMPLE_ID)}
    device = next(model.parameters()).device
    seen = 0
    with evaluating(model):
        for inputs, labels, ids in moved_batches(loader, device):
            if ids is None and not isinstance(loader.sampler, SequentialSampler):
                raise ValueError(
                    "the loader shuffles, and its examples carry no ids: wrap the dataset in with_ids(dataset)"
                )
            if any(name in FROM_LOGITS for name in names):
                with torch.no_grad():
                    logits = logits_of(called(model, inputs))
            for name in names:
                if name == "grand":
                    value = grand(model, loss_fn, (inputs, labels))
                else:
                    value = by_example(FROM_LOGITS[name], logits, labels)
                kept[name].append(value.detach().cpu())
            kept[EXAMPLE_ID].append(
                torch.arange(seen, seen + len(labels)) if ids is None else torch.as_tensor(ids).cpu()
            )
            seen += len(labels)
    gathered = {name: torch.cat(values).numpy() for name, values in kept.items()}
    if len(np.unique(gathered[EXAMPLE_ID])) < seen:
        raise ValueError("the loader gave an example twice; scoring wants each once")
    return gathered
