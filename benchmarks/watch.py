"""What watching costs: `python benchmarks/watch.py [--size 25M --steps 300 --turns 1]`.

1. A whole run under the default watch (default probes, budget 0.02) and a bare one, step by step in turns; the bar is
   1.02x the wall time, opening and closing of the watch included.
2. Steps with every probe on every step, beside `wandb.watch(log="all")`, TensorBoard histograms of all weights and
   gradients, and torch-module-monitor where it is installed, on a GPT of 0.9M parameters; the bar is 1.5x a bare step.
3. Numbers that the host asks the device for on steps that are not sampled; the bar is 0.
4. What `import dynascope` adds to `import torch` (bar: 0.3 s), and `dynascope --help` (bar: 1 s).
"""

import argparse
import contextlib
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from interleaved import medians, tell
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dynascope

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from train_gpt import GPT

SIZES = {"1M": (128, 4, 4, 16), "25M": (512, 8, 8, 4)}
AfterStep = Callable[[int], None]
Watching = Callable[[nn.Module, torch.optim.Optimizer, Path], AbstractContextManager[AfterStep]]


def train(size: str, num_steps: int, watching: Watching) -> Iterator[float]:
    """Seconds of each step, those of opening the watch in the first, and last the seconds of closing it."""
    width, depth, num_heads, batch_size = SIZES[size]
    torch.manual_seed(0)
    model = GPT(256, 128, width, depth, num_heads)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    batch = torch.randint(256, (batch_size, 129))
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, watching(model, optimizer, Path(folder) / "run") as after_step:
        for step in range(num_steps):
            _, loss = model(batch[:, :-1], batch[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            after_step(step)
            yield time.perf_counter() - started
            started = time.perf_counter()
    yield time.perf_counter() - started


@contextmanager
def bare(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> Iterator[AfterStep]:
    yield lambda step: None


@contextmanager
def by_default(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> Iterator[AfterStep]:
    # Its clock runs while the bare run takes its turn, so half the default budget of 0.02 is 0.02 of its own time.
    with dynascope.watch(model, optimizer, run=folder, budget=0.01):
        yield lambda step: None


@contextmanager
def at_every_step(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> Iterator[AfterStep]:
    with dynascope.watch(model, optimizer, run=folder, every=1):
        yield lambda step: None


@contextmanager
def rarely(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> Iterator[AfterStep]:
    with dynascope.watch(model, optimizer, run=folder, every=1000):
        yield lambda step: None


@contextmanager
def by_wandb(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> Iterator[AfterStep]:
    import wandb

    folder.mkdir()
    settings = wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True, x_disable_meta=True)
    run = wandb.init(mode="offline", dir=str(folder), project="benchmark", settings=settings)
    run.watch(model, log="all", log_freq=1)
    yield lambda step: run.log({"step": step})
    run.finish()


@contextmanager
def by_tensorboard(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> Iterator[AfterStep]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))

    def after_step(step: int) -> None:
        for name, parameter in model.named_parameters():
            writer.add_histogram(f"weights/{name}", parameter, step)
            writer.add_histogram(f"gradients/{name}", parameter.grad, step)

    yield after_step
    writer.close()


@contextmanager
def by_module_monitor(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> Iterator[AfterStep]:
    monitor = module_monitor(model)

    def after_step(step: int) -> None:
        monitor.monitor_parameters()
        monitor.monitor_gradients()
        monitor.end_step()
        monitor.begin_step(step + 1)

    yield after_step


def module_monitor(model: nn.Module) -> Any:
    """torch-module-monitor with four metrics, in its first step."""
    from torch_module_monitor import ModuleMonitor

    monitor = ModuleMonitor()
    monitor.set_module(model)
    monitor.add_parameter_metric("norm", torch.linalg.vector_norm)
    monitor.add_gradient_metric("norm", torch.linalg.vector_norm)
    monitor.add_activation_metric("norm", torch.linalg.vector_norm)
    monitor.add_activation_metric("mean", torch.mean)
    monitor.begin_step(0)
    return monitor


class Counter(TorchDispatchMode):
    """Counts the operations that make the host wait for a number."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += operation is torch.ops.aten._local_scalar_dense.default
        return operation(*args, **(kwargs or {}))


def by_turns(ways: dict[str, Watching], size: str, num_steps: int) -> dict[str, list[float]]:
    """What `train` tells of several runs, a step of each by turns: what else slows the machine slows all alike."""
    runs = {name: train(size, num_steps, way) for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for step in range(num_steps + 1):
        for name in list(ways)[:: -1 if step % 2 else 1]:
            seconds[name].append(next(runs[name]))
    return seconds


def whole_runs(size: str, num_steps: int, turns: int) -> None:
    print(f"\n{size}, {num_steps} steps, default probes and budget; bar 1.02x")
    ratios = []
    for _ in range(turns):
        own, watched = map(sum, by_turns({"bare": bare, "watched": by_default}, size, num_steps).values())
        ratios.append(watched / own)
        print(f"bare {own:.2f} s, watched {watched:.2f} s: {ratios[-1]:.3f}x")
    print(f"median {statistics.median(ratios):.3f}x")


def sampled_steps(turns: int) -> None:
    print(
        "\n1M, every step fully sampled; bar 1.5x (first step of each run left out), and less a number than peers take"
    )
    num_histograms = 2 * len(list(small_gpt().parameters()))
    contenders: dict[str, tuple[str, Watching, Callable[[], int]]] = {
        "dynascope, all default probes": ("dynascope", at_every_step, numbers_of_dynascope),
        'wandb.watch(log="all"), histograms': ("wandb", by_wandb, lambda: num_histograms),
        "TensorBoard histograms": ("tensorboard", by_tensorboard, lambda: num_histograms),
        "torch-module-monitor, 4 metrics": ("torch_module_monitor", by_module_monitor, numbers_of_module_monitor),
    }
    there = {name: told for name, told in contenders.items() if importlib.util.find_spec(told[0])}
    for name in contenders.keys() - there.keys():
        print(f"{name}: not installed")
    ways = {"bare": bare, **{name: way for name, (_, way, _) in there.items()}}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        with contextlib.redirect_stdout(sys.stderr):
            for name, every in by_turns(ways, "1M", 12).items():
                seconds[name] += every[2:-1]
    measured = {name: statistics.median(every) for name, every in seconds.items()}
    tell(measured, base="bare")
    for name, (*_, count) in there.items():
        num = count()
        print(f"{name:46} {num:4} numbers a step, {1e6 * (measured[name] - measured['bare']) / num:7.1f} us each")


def small_gpt() -> GPT:
    """The model of `sampled_steps`."""
    return GPT(256, 128, *SIZES["1M"][:-1])


def numbers_of_dynascope() -> int:
    model = small_gpt()
    optimizer = torch.optim.AdamW(model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        with dynascope.watch(model, optimizer, run=run, every=1):
            for _ in range(2):
                model(*torch.randint(256, (2, 4, 128)))[1].backward()
                optimizer.step()
        record = dynascope.open(run)
        return sum(record.series(name, since=1).size for name in record.names())


def numbers_of_module_monitor() -> int:
    model = small_gpt()
    monitor = module_monitor(model)
    model(*torch.randint(256, (2, 4, 128)))[1].backward()
    monitor.monitor_parameters()
    monitor.monitor_gradients()
    monitor.end_step()
    return len(monitor.get_step_metrics())


def waits() -> None:
    """Bare and watched, beyond the first steps, of which the watch samples the first; Adam asks for its own numbers."""
    counts = {}
    for name, watching in {"bare": bare, "watched": rarely}.items():
        counter = Counter()
        model = GPT(256, 128, 32, 2, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        with tempfile.TemporaryDirectory() as folder, watching(model, optimizer, Path(folder) / "run"):
            for step in range(22):
                with counter if step >= 2 else contextlib.nullcontext():
                    model(*torch.randint(256, (2, 4, 128)))[1].backward()
                    optimizer.step()
        counts[name] = counter.count
    extra = counts["watched"] - counts["bare"]
    print(f"\nnumbers that the watch asks of the device on 20 steps that are not sampled: {extra} (bar: 0)")


def imports(turns: int) -> None:
    def run(*arguments: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True)

    commands = {
        "import torch": run("-c", "import torch"),
        "import torch, dynascope": run("-c", "import torch, dynascope"),
        "and dynascope.watch": run("-c", "import torch, dynascope; dynascope.watch"),
        "dynascope --help": run("-m", "dynascope", "--help"),
    }
    print("\nbars: import dynascope 300 ms beyond torch, --help 1000 ms")
    tell(medians(commands, turns), base="import torch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, nargs="*", default=["1M"], help="sizes for the whole runs")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--only", choices=["imports", "waits", "sampled", "runs"], help="one part alone")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    parts = {
        "imports": lambda: imports(options.turns),
        "waits": waits,
        "sampled": lambda: sampled_steps(options.turns),
        "runs": lambda: [whole_runs(size, options.steps, options.turns) for size in options.size],
    }
    for name, part in parts.items():
        if options.only in (None, name):
            part()


if __name__ == "__main__":
    main()
