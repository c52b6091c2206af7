"""Mamba's gate and in-context learning from poisoned prompts (arXiv 2510.00399)."""

from dynascope.studies.harness import Paper, Study
from dynascope.studies.mamba_icl_outliers.claims import CLAIMS
from dynascope.studies.mamba_icl_outliers.method import Arm, Config, train

study = Study(
    name="mamba-icl-outliers",
    paper=Paper("2510.00399", "Can Mamba Learn In Context with Outliers? A Theoretical Generalization Analysis", 2025),
    arms={
        "gated": Arm(),
        "linear": Arm(is_gated=False),
        "gated-two-lrs": Arm(has_two_lrs=True),
        "gated-more-outliers": Arm(p_a=0.8),
        "gated-no-outliers": Arm(p_a=0.0),
        "gated-cyclic": Arm(cover="cyclic"),
        "gated-deep": Arm(p_a=0.4, layers=3),
        "linear-deep": Arm(is_gated=False, p_a=0.4, layers=3),
    },
    presets={
        "smoke": Config(
            dim=10,
            num_relevant=3,
            num_irrelevant=2,
            length=6,
            batch=16,
            gated_steps=6,
            linear_steps=4,
            deep_batch=8,
            deep_steps=3,
            num_tests=40,
            num_probed=20,
        ),
        "small": Config(),
        # The paper does not say how long it trained; 8000 steps were seen to change little.
        "paper": Config(gated_steps=8000, linear_steps=8000, deep_batch=256, deep_steps=8000, num_tests=20_000),
    },
    train=train,
    figures="dynascope.studies.mamba_icl_outliers.figures",
    claims=CLAIMS,
)
