"""Attention scans, then snaps: one layer trained by SGD, its two learning rates, and real text (arXiv 2305.16380)."""

from dynascope.studies.harness import Paper, Study, StudyRecord
from dynascope.studies.scan_and_snap.claims import CLAIMS
from dynascope.studies.scan_and_snap.synthetic import Arm, Config, follow_population, grid, scan
from dynascope.studies.scan_and_snap.text import train_on_text


def train(config: Config, arm: Arm, seed: int, record: StudyRecord) -> None:
    """One arm."""
    if arm.task == "scan":
        scan(config, arm, seed, record)
    elif arm.task == "population":
        follow_population(config, arm, record)
    elif arm.task == "grid":
        grid(config, arm, seed, record)
    else:
        train_on_text(config, arm, seed, record)


study = Study(
    name="scan-and-snap",
    paper=Paper(
        "2305.16380",
        "Scan and Snap: Understanding Training Dynamics and Token Composition in 1-layer Transformer",
        2023,
    ),
    arms={
        "scan": Arm("scan"),
        "population": Arm("population"),
        **{f"grid-{num_last}": Arm("grid", num_last) for num_last in (1, 3, 5, 10)},
        **{f"text-{model}": Arm("text", model=model) for model in ("yz", "yz-stack", "transformer")},
    },
    presets={
        "smoke": Config(
            num_steps=4,
            num_repetitions=2,
            num_panel_repetitions=1,
            length=16,
            batch_size=8,
            num_bytes=20_000,
            vocab=50,
            window=8,
            width=8,
            text_steps=4,
            stack_steps=4,
            text_batch=4,
            dropout=0.2,
            clip=0.5,
            num_windows=40,
        ),
        "small": Config(),
        "paper": Config(
            num_panel_repetitions=10,
            num_bytes=4_000_000,
            vocab=30_000,
            width=200,
            text_steps=50_000,
            stack_steps=50_000,
            dropout=0.2,
            clip=0.5,
            num_windows=5000,
        ),
    },
    train=train,
    figures="dynascope.studies.scan_and_snap.figures",
    claims=CLAIMS,
)
