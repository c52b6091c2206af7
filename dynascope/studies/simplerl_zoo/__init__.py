"""Zero RL on several base models: what decides whether it grows or collapses (arXiv 2503.18892)."""

from dynascope.studies.harness import Paper, Study
from dynascope.studies.simplerl_zoo.claims import CLAIMS
from dynascope.studies.simplerl_zoo.method import Arm, Config, train

study = Study(
    name="simplerl-zoo",
    paper=Paper(
        "2503.18892",
        "SimpleRL-Zoo: Investigating and Taming Zero Reinforcement Learning for Open Base Models in the Wild",
        2025,
    ),
    arms={  # those that take longest first, so that no process is left alone with one
        "strong": Arm("strong"),
        "middle": Arm("middle"),
        "weak": Arm("weak"),
        "weak-strict": Arm("weak", rule="strict_format"),
        "weak-hard": Arm("weak", level="hard"),
        "cold-long": Arm("weak", cold_start="long"),
        "weak-easy": Arm("weak", level="easy"),
        "cold-short": Arm("weak", cold_start="short"),
        "format-bandit": Arm(bandit="format"),
        "format-bandit-strict": Arm(rule="strict_format", bandit="format"),
        "difficulty-bandit-weak": Arm("weak", bandit="difficulty"),
        "difficulty-bandit-strong": Arm("strong", bandit="difficulty"),
    },
    presets={
        "smoke": Config(
            widths=(16, 16, 16), base_steps=(2, 3, 4), base_batch=8, num_layers=1, num_steps=3, num_prompts=2, num_samples=2,
            short_start=1, long_start=2, num_tests=4, test_every=2, bandit_steps=(45, 5),
        ),
        "small": Config(),
        "paper": Config(
            (1, 2, 3, 4, 5), widths=(128, 256, 512), base_steps=(1000, 2000, 4000), base_batch=256, base_lr=1e-3,
            num_layers=4, num_steps=100, num_prompts=1024, lr=1e-4, short_start=100, long_start=500, num_tests=500,
            test_samples=32, test_every=5,
        ),
    },
    train=train,
    figures="dynascope.studies.simplerl_zoo.figures",
    claims=CLAIMS,
)  # fmt: skip
