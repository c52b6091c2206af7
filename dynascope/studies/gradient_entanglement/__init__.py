"""Margin losses pull both responses of a pair the same way, the more they share (arXiv 2410.13828)."""

from dynascope.losses import MARGIN_LOSSES
from dynascope.studies.gradient_entanglement.claims import CLAIMS
from dynascope.studies.gradient_entanglement.method import SUFFIXES, Arm, Config, train
from dynascope.studies.harness import Paper, Study

study = Study(
    name="gradient-entanglement",
    paper=Paper("2410.13828", "A Common Pitfall of Margin-based Language Model Alignment: Gradient Entanglement", 2024),
    arms={
        **{f"dpo-{suffix}": Arm("dpo", suffix) for suffix in SUFFIXES},
        **{loss: Arm(loss) for loss in MARGIN_LOSSES if loss != "dpo"},
        **{remedy: Arm("dpo", remedy=remedy) for remedy in ("normalized", "disentangled", "diff", "sparse")},
    },
    presets={
        "smoke": Config(width=16, num_heads=2, num_pairs=4, sft_steps=3, num_steps=4, look_every=2),
        "small": Config(),
        "paper": Config(
            width=768, num_layers=12, num_heads=12, num_pairs=512, sft_steps=128, sft_lr=1.41e-5, num_steps=4096
        ),
    },
    train=train,
    figures="dynascope.studies.gradient_entanglement.figures",
    claims=CLAIMS,
)
