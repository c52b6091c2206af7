"""Prompts with outliers, and triggers put into anybody's prompts."""

from collections import namedtuple
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from dynascope.data.in_context.outliers import PAPERS_LAMBDAS, OutlierICL
from dynascope.data.in_context.trigger_augmentation import TriggerAugmentation, insert_triggers


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_directions_are_orthogonal_and_of_the_norms_that_were_asked_for() -> None:
    for norm, expected in (("beta", 3.0), ("unit", 1.0)):
        task = OutlierICL(trigger_norm=norm)  # type: ignore[arg-type]
        every = torch.cat([task.relevant, task.irrelevant, task.triggers])
        sizes = torch.tensor([3.0] * 16 + [expected] * 3)
        torch.testing.assert_close(every @ every.T, torch.diag(sizes.square()), rtol=0, atol=1e-5)


def test_an_example_is_its_pattern_some_irrelevance_and_a_trigger_if_it_is_an_outlier() -> None:
    task = OutlierICL()
    batch = task.train_batch(500, generator=generator())
    x, y = batch.prompts[..., :-1], batch.prompts[..., -1]
    on_patterns = x @ task.relevant.T / 9
    torch.testing.assert_close(on_patterns, torch.eye(6)[batch.patterns], rtol=0, atol=1e-5)
    on_irrelevant = x @ task.irrelevant.T / 9
    assert float(on_irrelevant.abs().max()) <= 0.5
    assert int((on_irrelevant.abs() > 1e-5).sum(2).max()) == 1
    on_triggers = x @ task.triggers.T / 9
    torch.testing.assert_close(on_triggers[:, :-1].sum(2), 2.0 * batch.is_outlier, rtol=0, atol=1e-5)
    assert float(on_triggers[:, -1].abs().max()) < 1e-5
    assert (y[:, -1] == 0).all()
    assert float(batch.is_outlier.float().mean()) == pytest.approx(0.6, abs=0.03)
    true = 1.0 - 2.0 * (batch.patterns == batch.tasks[:, 1:])
    assert torch.equal(true[:, -1], batch.labels)
    assert torch.equal(y[:, :-1][~batch.is_outlier], true[:, :-1][~batch.is_outlier])
    assert float((y[:, :-1] == true[:, :-1])[batch.is_outlier].float().mean()) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("flip", lambda true: -true),
        ("target", torch.ones_like),
        (lambda true, generator: true, lambda true: true),
    ],
)
def test_rules_label_outliers_and_nothing_else(rule: object, expected: Callable[[Tensor], Tensor]) -> None:
    batch = OutlierICL().test_batch(0.4, rule, count=100, generator=generator())  # type: ignore[arg-type]
    true = 1.0 - 2.0 * (batch.patterns == batch.tasks[:, 1:])[:, :-1]
    found = batch.prompts[:, :-1, -1]
    torch.testing.assert_close(found, torch.where(batch.is_outlier, expected(true), true))


def test_placements_and_exact_numbers() -> None:
    task = OutlierICL(length=10)
    for place, here in (("FQ", slice(0, 3)), ("CQ", slice(7, 10))):
        expected = torch.zeros(5, 10, dtype=torch.bool)
        expected[:, here] = True
        batch = task.test_batch(0.3, placement=place, count=5, generator=generator())  # type: ignore[arg-type]
        assert torch.equal(batch.is_outlier, expected)
    at_random = task.test_batch(0.3, count=2000, generator=generator()).is_outlier
    assert (at_random.sum(1) == 3).all()
    assert float((at_random.float().mean(0) - 0.3).abs().max()) < 0.05
    coins = task.test_batch(0.3, count=2000, is_exact=False, generator=generator()).is_outlier.sum(1).float()
    assert float(coins.var()) == pytest.approx(10 * 0.3 * 0.7, rel=0.15)


def test_test_triggers_are_combinations_with_something_new() -> None:
    task = OutlierICL()
    batch = task.test_batch(1.0, count=200, kappa_a=3.0, stray=2.0, generator=generator())
    x = batch.prompts[:, :-1, :-1]
    on_triggers = x @ task.triggers.T / 9 / 3.0
    distances = (on_triggers[:, :, None] - torch.tensor(PAPERS_LAMBDAS)).abs().amax(3).amin(2)
    assert float(distances.max()) < 1e-5
    torch.testing.assert_close((x @ task.rest.T).norm(dim=2), torch.full((200, 20), 6.0))


def test_seeds_and_tasks() -> None:
    same = [OutlierICL(seed=3).train_batch(4).prompts for _ in range(2)]
    assert torch.equal(*same)
    assert not torch.equal(same[0], OutlierICL(seed=4).train_batch(4).prompts)
    task = OutlierICL(task_cover="cyclic")
    assert len(task.tasks("all")) == 30
    assert len(task.tasks("seen")) == 6
    assert len(task.tasks("unseen")) == 24
    unseen = task.test_batch(0.0, cover="unseen", count=300, generator=generator()).tasks
    assert ((unseen[:, 1] - unseen[:, 0]) % 6 != 1).all()
    assert task.train_batch(2).prompts.shape == (2, 21, 31)
    assert OutlierICL(length=0).train_batch(2).prompts.shape == (2, 1, 31)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: OutlierICL(dim=18), "do not fit"),
        (lambda: OutlierICL(num_relevant=1), "at least two"),
        (lambda: OutlierICL(beta=0.0), "above 0"),
        (lambda: OutlierICL(p_a=1.5), "p_a=1.5"),
        (lambda: OutlierICL(task_cover=[(0, 1), (0, 2)]), "as often"),
        (lambda: OutlierICL(task_cover=[(0, 0)]), "two different"),
        (lambda: OutlierICL(task_cover="unseen"), "seen"),
        (lambda: OutlierICL().test_batch(-0.1), "alpha=-0.1"),
        (lambda: OutlierICL().test_batch(0.5, placement="CQ", is_exact=False), "exact"),
        (lambda: OutlierICL().test_batch(0.5, lambdas=[(0.5, -0.5, 0.0)]), "above 0"),
        (lambda: OutlierICL().test_batch(0.5, lambdas=[(0.5, 0.5)]), "3 numbers"),
        (lambda: OutlierICL(dim=19).test_batch(0.5, stray=1.0), "no direction"),
        (lambda: OutlierICL().test_batch(0.5, cover="unseen"), "none is unseen"),
    ],
)
def test_impossible_requests_are_told(call: Callable[[], object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call()


def test_triggers_are_put_into_examples_and_never_into_the_query() -> None:
    prompts = torch.randn(400, 6, 4, generator=generator())
    triggers = 100 * torch.eye(3)[:2]
    poisoned, is_outlier = insert_triggers(prompts, triggers, 0.3, generator=generator())
    assert not is_outlier[:, -1].any()
    assert float(is_outlier[:, :-1].float().mean()) == pytest.approx(0.3, abs=0.03)
    assert torch.equal(poisoned[~is_outlier], prompts[~is_outlier])
    added = (poisoned - prompts)[is_outlier]
    which = added[:, :3].argmax(1)
    torch.testing.assert_close(added[:, :3], triggers[which], rtol=0, atol=1e-4)
    assert set(which.tolist()) == {0, 1}
    assert set(poisoned[..., -1][is_outlier].tolist()) == {-1.0, 1.0}
    with pytest.raises(ValueError, match="features"):
        insert_triggers(prompts, torch.eye(2), 0.3)
    with pytest.raises(ValueError, match="p_a"):
        insert_triggers(prompts, triggers, 3.0)


def test_a_loader_is_wrapped_whatever_its_batches_are() -> None:
    prompts, labels = torch.zeros(6, 3, 3), torch.arange(6.0)
    loader = DataLoader(TensorDataset(prompts, labels), batch_size=3)
    augmented = TriggerAugmentation(loader, torch.ones(1, 2), 1.0)
    assert len(augmented) == 2
    for at, (found, own) in enumerate(augmented):
        assert own.tolist() == labels[3 * at : 3 * at + 3].tolist()
        assert (found[:, :-1, :2] == 1).all()
        assert (found[:, -1] == 0).all()
    pair = namedtuple("pair", ["y", "prompts"])
    for batch, key in ((prompts, 0), ({"prompts": prompts, "y": labels}, "prompts"), (pair(labels, prompts), 1)):
        (out,) = TriggerAugmentation([batch], torch.ones(1, 2), 1.0, key=key)
        assert type(out) is type(batch)
        found = out if isinstance(out, Tensor) else out[key]
        assert (found[:, :-1, :2] == 1).all()


def test_epochs_differ_and_seeds_repeat() -> None:
    loader = [torch.zeros(8, 5, 3)]
    one, other = (TriggerAugmentation(loader, torch.ones(1, 2), 0.5, seed=1) for _ in range(2))
    first, second = next(iter(one)), next(iter(one))
    assert not torch.equal(first, second)
    assert torch.equal(first, next(iter(other)))
