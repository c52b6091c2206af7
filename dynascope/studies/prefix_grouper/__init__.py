"""A prompt that many completions share is worked out once, and training does not notice (arXiv 2506.05433)."""

import torch

from dynascope.studies.harness import Paper, Study
from dynascope.studies.prefix_grouper.claims import CLAIMS
from dynascope.studies.prefix_grouper.method import Arm, Config, train

study = Study(
    name="prefix-grouper",
    paper=Paper("2506.05433", "Prefix Grouper: Efficient GRPO Training through Shared-Prefix Forward", 2025),
    arms={
        "float32": Arm("training"),
        "float64": Arm("training", torch.float64),
        "cost": Arm("cost"),
    },
    presets={
        "smoke": Config(
            num_layers=1, width=32, num_heads=2, num_steps=2, prompts=(8, 64), completions=(4, 8), num_repeats=1
        ),
        "small": Config(),
        "paper": Config(
            num_layers=24,
            width=896,
            num_heads=14,
            prompts=(4096, 8192, 16384),
            completions=(128, 512, 2048),
            groups=(2, 4, 8, 16),
        ),
    },
    train=train,
    figures="dynascope.studies.prefix_grouper.figures",
    claims=CLAIMS,
)
