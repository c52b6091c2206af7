"""Heads that have nothing to do breed attention sinks, drained values and residual peaks (arXiv 2410.13835)."""

from dynascope.studies.active_dormant_heads.claims import CLAIMS
from dynascope.studies.active_dormant_heads.method import Arm, Config, train
from dynascope.studies.harness import Paper, Study

study = Study(
    name="active-dormant-heads",
    paper=Paper(
        "2410.13835",
        "Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs",
        2024,
    ),
    arms={
        "softmax": Arm(),
        "relu": Arm(attention="relu"),
        "deep-adam": Arm(depth=3),
        "deep-relu": Arm(depth=3, attention="relu"),
        "deep-sgd": Arm(depth=3, optimizer="sgd"),
    },
    presets={
        "smoke": Config(num_tokens=8, context=16, batch_size=4, width=16, num_steps=9, num_deep_steps=9, num_tests=8),
        "small": Config(),
        "paper": Config(
            num_tokens=65,
            context=256,
            batch_size=512,
            width=256,
            num_steps=10_000,
            num_deep_steps=10_000,
            lr=3e-4,
            sgd_lr=0.03,
            num_tests=512,
        ),
    },
    train=train,
    figures="dynascope.studies.active_dormant_heads.figures",
    claims=CLAIMS,
)
