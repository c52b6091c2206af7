"""A study whose outcome is known: `second` starts where `first` ended and adds 1; `unlucky` fails."""

import time
from dataclasses import dataclass

import torch

from dynascope.studies import Claim, Paper, Runs, Study, StudyRecord


@dataclass(frozen=True)
class Config:
    num_steps: int = 3
    gains: tuple[float, ...] = (1.0,)
    is_slow: bool = False
    note: str | None = None


def train(config: Config, arm: float, seed: int, record: StudyRecord) -> None:
    start = float(record.earlier["first"]["height"][-1]) if record.earlier else 0.0
    for step in range(config.num_steps):
        record.add(step, {"height": start + arm + 0.01 * torch.rand(()).item()})
        if config.is_slow:
            record.flush()
            time.sleep(0.2)
    if arm < 0:
        raise RuntimeError("out of luck")


def gained(runs: Runs) -> float:
    return float(runs["second"]["height"][-1] - runs["first"]["height"][-1])


study = Study(
    name="toy",
    paper=Paper("0000.00000", "A Toy", 2020),
    arms={"second": 1.0, "first": 5.0, "unlucky": -1.0},
    presets={"smoke": Config(num_steps=1), "small": Config()},
    train=train,
    claims=[
        Claim("C1", "Second is higher.", "Section 1", 1.0, "gain (m)", gained, ">", 0.5),
        Claim("C2", "Luck is there.", "Section 2", None, "luck", lambda runs: runs["unlucky"]["height"][-1], ">", 0.0),
    ],
    after={"second": ("first",)},
)
