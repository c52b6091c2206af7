"""Small real trainings under watch: healthy ones stay silent, sick ones speak."""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dynascope
from dynascope.findings import Follower, all_detectors
from dynascope.record import Finding, RecordWriter, open_record

Made = Callable[..., list[Finding]]


@pytest.fixture
def findings_of(tmp_path: Path) -> Made:
    """Trains a network on a smooth function of 8 numbers and gives its findings."""

    def run(
        model: nn.Module, *, lr: float, steps: int = 300, optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW
    ) -> list[Finding]:
        generator = torch.Generator().manual_seed(1)
        truth = torch.randn(8, 1, generator=generator)

        def batch() -> tuple[Tensor, Tensor]:
            x = torch.randn(64, 8, generator=generator)
            return x, torch.tanh(x @ truth) + 0.1 * torch.randn(64, 1, generator=generator)

        opt = optimizer(model.parameters(), lr=lr)
        with dynascope.watch(model, opt, run=tmp_path / "run", every=1):
            for _ in range(steps):
                x, y = batch()
                opt.zero_grad()
                nn.functional.mse_loss(model(x), y).backward()
                opt.step()
        return open_record(tmp_path / "run").findings

    return run


def mlp(activation: type[nn.Module] = nn.GELU) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 32), activation(), nn.Linear(32, 32), activation(), nn.Linear(32, 1))


SICK = {"warning", "critical"}


@pytest.mark.parametrize("activation", [nn.GELU, nn.ReLU, nn.Tanh])
def test_healthy_training_has_nothing_to_warn_of(findings_of: Made, activation: type[nn.Module]) -> None:
    findings = findings_of(mlp(activation), lr=1e-3)
    # A machine that gets busy slows down in truth, which says nothing of the training.
    assert [finding for finding in findings if finding.severity in SICK and finding.id != "throughput-loss"] == []


def test_lr_far_too_high_is_told_early(findings_of: Made) -> None:
    findings = findings_of(mlp(), lr=5.0, optimizer=torch.optim.SGD, steps=120)
    assert {"loss-not-finite", "divergence", "exploding-gradients", "update-ratio"} & {
        finding.id for finding in findings
    }
    assert min(finding.step for finding in findings if finding.severity in SICK) < 30


def test_dead_relus_are_told_by_name(findings_of: Made) -> None:
    model = mlp(nn.ReLU)
    with torch.no_grad():
        model[2].bias.fill_(-50.0)
    dead = [finding for finding in findings_of(model, lr=1e-4, steps=20) if finding.id == "dead-units"]
    assert [(finding.step, finding.where) for finding in dead] == [(0, "3")]


def test_deep_sigmoid_network_loses_the_gradient(findings_of: Made) -> None:
    layers = [part for _ in range(12) for part in (nn.Linear(8, 8), nn.Sigmoid())]
    findings = findings_of(nn.Sequential(*layers, nn.Linear(8, 1)), lr=1e-3, steps=10)
    assert [finding.step for finding in findings if finding.id == "vanishing-gradients"] == [0]


def test_findings_come_while_the_run_goes_on(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "run") as record:
        follower = Follower(open_record(tmp_path / "run"), all_detectors)
        for step in range(100):
            record.add(step, {"loss": 2.0 + 0.001 * (step % 7)})
        record.flush()
        assert follower.new_findings() == []
        record.add(100, {"loss": float("nan")})
        record.flush()
        assert [(finding.id, finding.step) for finding in follower.new_findings()] == [("loss-not-finite", 100)]
        assert follower.new_findings() == []


def test_second_optimizer_has_detectors_of_its_own(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "run") as record:
        for step in range(10):
            record.add(step, {"loss": 1.0, "optimizer2/loss": float("nan") if step > 5 else 1.0})
    findings = Follower(open_record(tmp_path / "run"), all_detectors).new_findings()
    assert [(finding.id, finding.step) for finding in findings] == [("loss-not-finite", 6)]


def test_every_remedy_is_python() -> None:
    folder = Path(dynascope.__file__).parent / "findings"
    texts = []
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "remedy":
                texts.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "1.0" for part in _parts(node.value))
                )
    assert len(texts) >= 13
    for text in texts:
        compile(text, "remedy", "exec")


def _parts(node: ast.expr) -> list[ast.expr]:
    return list(node.values) if isinstance(node, ast.JoinedStr) else [node]
