"""Transformers whose attention entropy collapses go unstable, and σReparam prevents both (arXiv 2303.06296)."""

from dataclasses import replace

from dynascope.studies.harness import Paper, Study
from dynascope.studies.sigma_reparam.claims import CLAIMS
from dynascope.studies.sigma_reparam.method import LR_FACTORS, TEXT_ARMS, Arm, Config, at, train

study = Study(
    name="sigma-reparam",
    paper=Paper("2303.06296", "Stabilizing Transformer Training by Preventing Attention Entropy Collapse", 2023),
    arms={
        **{
            at(name, factor): replace(arm, lr_factor=factor) for name, arm in TEXT_ARMS.items() for factor in LR_FACTORS
        },
        "heated": Arm(logit_factor=8.0),
        "vision-pre-ln": Arm(is_vision=True, has_warmup=True, weight_decay=0.05),
        "vision-sigma": Arm("none", is_sigma=True, is_vision=True),
        "vision-sigma-sgd": Arm("none", is_sigma=True, is_vision=True, optimizer="sgd", lr_factor=50.0),
    },
    presets={
        "smoke": Config(
            width=16, depth=1, num_heads=2, context=16, batch_size=4, num_steps=6, num_vision_steps=6, look_every=2
        ),
        "small": Config(),
        # The paper's sizes (ViT-B); its images are not bundled, so text stands for them.
        "paper": Config(
            width=768,
            depth=12,
            num_heads=12,
            context=1024,
            batch_size=64,
            num_steps=100_000,
            num_vision_steps=20_000,
            look_every=50,
        ),
    },
    train=train,
    figures="dynascope.studies.sigma_reparam.figures",
    claims=CLAIMS,
)
