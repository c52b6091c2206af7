"""What a record costs beside TensorBoard and Weights & Biases: `python benchmarks/record.py [--steps 2000]`.

The same kind of stream (100 random scalars a step) goes to all three in one process, in turns; TensorBoard, the
slowest, gets a fifth of the steps. A turn's time runs from opening until everything is on disk and the writer is closed.
Medians over the turns. Then a record of 1 million steps × 20 series is opened and one series of it read, caches warm.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import wandb
from torch.utils.tensorboard import SummaryWriter

import dynascope
from dynascope.record import RecordWriter

NAMES = [f"train/metric_{number}" for number in range(100)]
Stream = list[dict[str, float]]


def to_dynascope(stream: Stream, folder: Path) -> None:
    with RecordWriter(folder) as record:
        for step, values in enumerate(stream):
            record.add(step, values)


def to_tensorboard(stream: Stream, folder: Path) -> None:
    writer = SummaryWriter(str(folder))
    for step, values in enumerate(stream):
        for name, value in values.items():
            writer.add_scalar(name, value, step)
    writer.close()


def to_wandb(stream: Stream, folder: Path) -> None:
    """W&B's own process goes on writing after `finish`; `teardown` waits for it."""
    folder.mkdir()
    settings = wandb.Settings(
        silent=True, console="off", disable_git=True, save_code=False, x_disable_stats=True, x_disable_meta=True
    )
    run = wandb.init(mode="offline", dir=str(folder), project="benchmark", settings=settings)
    for step, values in enumerate(stream):
        run.log(values, step=step)
    run.finish()
    wandb.teardown()


def measure(write: Callable[[Stream, Path], None], stream: Stream) -> tuple[float, float]:
    """Points a second, and bytes a point on disk."""
    num_points = len(stream) * len(NAMES)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "run"
        start = time.perf_counter()
        write(stream, folder)
        seconds = time.perf_counter() - start
        kinds = ("*.sqlite", "*tfevents*", "*.wandb")
        files = {path.resolve() for kind in kinds for path in folder.rglob(kind)}  # W&B links to its latest run
        num_bytes = sum(path.stat().st_size for path in files)
    return num_points / seconds, num_bytes / num_points


def measure_opening(turns: int) -> float:
    """Seconds to open a record of 1 million steps × 20 series and read one series whole."""
    with tempfile.TemporaryDirectory() as root:
        with RecordWriter(root) as record:
            for step in range(1_000_000):
                record.add(step, dict.fromkeys(NAMES[:20], step / 7))
        durations = []
        for _ in range(turns):
            start = time.perf_counter()
            series = dynascope.open(root)[NAMES[7]]
            durations.append(time.perf_counter() - start)
            assert series.sizes["step"] == 1_000_000
    return statistics.median(durations)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000, help="steps of the stream that TensorBoard gets")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()

    dice = random.Random(0)
    streams = {
        length: [{name: dice.random() for name in NAMES} for _ in range(length)]
        for length in (options.steps, 5 * options.steps)
    }
    writers = {
        "dynascope": (to_dynascope, streams[5 * options.steps]),
        "tensorboard": (to_tensorboard, streams[options.steps]),
        "wandb offline": (to_wandb, streams[5 * options.steps]),
    }
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in writers}
    for _ in range(options.turns):
        for name, (write, stream) in writers.items():
            measured[name].append(measure(write, stream))
    speed = {name: statistics.median(rate for rate, _ in turns) for name, turns in measured.items()}
    size = {name: statistics.median(bytes_ for _, bytes_ in turns) for name, turns in measured.items()}

    print(f"{'':14} {'points/s':>12} {'dynascope is':>13} {'bytes/point':>12}")
    for name in writers:
        print(f"{name:14} {speed[name]:12,.0f} {speed['dynascope'] / speed[name]:12.1f}x {size[name]:12.1f}")
    print(f"open 1M steps x 20 series and read one: {measure_opening(options.turns):.3f} s")


if __name__ == "__main__":
    main()
