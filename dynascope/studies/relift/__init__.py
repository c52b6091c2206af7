"""Reinforcement learning keeps what a model can do, fine-tuning brings what it cannot: interleave them (arXiv 2506.07527)."""

from dynascope.studies.harness import Paper, Study
from dynascope.studies.relift.claims import CLAIMS
from dynascope.studies.relift.method import Arm, Config, train

study = Study(
    name="relift",
    paper=Paper(
        "2506.07527",
        "Learning What Reinforcement Learning Can't: Interleaved Online Fine-Tuning for Hardest Questions",
        2025,
    ),
    arms={
        "rl": Arm("never"),
        "relift": Arm("relift"),
        "random": Arm("random"),
        "all": Arm("all"),
        "uniform": Arm("uniform(8)"),
        "rl-and-sft-loss": Arm("never", "one loss"),
        "luffy": Arm("never", "one group"),
        "relift-lacking": Arm("relift", lacks_hardest=True),
        "sft-then-rl": Arm("always", "one after the other"),
        "sft": Arm("always"),
    },
    presets={
        "smoke": Config(
            (1, 2), num_layers=1, width=16, base_steps=4, num_steps=3, num_prompts=4, num_samples=2, sft_batch=2,
            num_questions=6,
        ),
        "small": Config(),
        "paper": Config(
            (2, 3, 4, 5), num_layers=4, width=256, base_steps=2000, base_batch=128, base_lr=1e-3, num_steps=900,
            num_prompts=128, rl_lr=1e-4, sft_batch=128, sft_lr=1e-4, num_questions=1000, num_looks=30,
        ),
    },
    train=train,
    figures="dynascope.studies.relift.figures",
    claims=CLAIMS,
)  # fmt: skip
