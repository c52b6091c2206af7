"""Histories of examples, through a watch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import dynascope
from dynascope.data import stacked_visits
from dynascope.probes.examples import Examples
from dynascope.probes.views import ExampleBatch


def test_values_are_those_of_the_batch() -> None:
    logits = torch.log(torch.tensor([[0.8, 0.2], [0.9, 0.1]]))
    found = Examples().measure(ExampleBatch(0, torch.tensor([5, 3]), logits, torch.tensor([0, 1])))
    assert found["examples/id"].tolist() == [5, 3]
    assert found["examples/correct"].tolist() == [1.0, 0.0]
    assert found["examples/confidence"].tolist() == pytest.approx([0.8, 0.1])
    assert found["examples/el2n"].tolist() == pytest.approx([0.2 * 2**0.5, 0.9 * 2**0.5])


def test_histories_come_back_by_example(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs, labels = torch.randn(10, 3), torch.randint(2, (10,))
    seen = np.full((3, 10), np.nan)
    with dynascope.watch(model, optimizer, run=tmp_path / "run", probes=["examples"]) as watch:
        for epoch in range(3):
            for ids in torch.randperm(10).split(4):  # the last batch has two
                logits = model(inputs[ids])
                seen[epoch, ids] = logits.softmax(-1)[torch.arange(len(ids)), labels[ids]].detach()
                watch.examples(ids, logits, labels[ids])
                optimizer.zero_grad()
                nn.functional.cross_entropy(logits, labels[ids]).backward()
                optimizer.step()
    record = dynascope.open(tmp_path / "run")
    ids, confidence = record["examples/id"].values, record["examples/confidence"].values
    visits = stacked_visits(
        [row[row >= 0] for row in ids], [c[row >= 0] for c, row in zip(confidence, ids, strict=True)], 10
    )
    np.testing.assert_allclose(visits, seen, rtol=1e-5)


def test_a_larger_batch_later_switches_it_off_with_a_reason(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    with dynascope.watch(
        model, torch.optim.SGD(model.parameters(), lr=0.1), run=tmp_path / "run", probes=["examples"]
    ) as watch:
        for size in (2, 4, 2):
            watch.examples(torch.arange(size), model(torch.randn(size, 3)), torch.zeros(size, dtype=torch.long))
    record = dynascope.open(tmp_path / "run")
    assert len(record["examples/id"]) == 1
    assert "largest must come first" in next(event.message for event in record.events if event.kind == "probe-off")
