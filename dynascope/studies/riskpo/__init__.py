"""A risk measure of bundled rewards instead of their mean keeps a policy's entropy (arXiv 2510.00911)."""

from dynascope.studies.harness import Paper, Study
from dynascope.studies.riskpo.claims import CLAIMS
from dynascope.studies.riskpo.method import ARMS, Config, train

study = Study(
    name="riskpo",
    paper=Paper(
        "2510.00911", "RiskPO: Risk-based Policy Optimization via Verifiable Reward for LLM Post-Training", 2025
    ),
    arms=ARMS,
    # The first teaches the start model of a seed; the others find it.
    after={arm: ("grpo-sequence",) for arm in ARMS if arm != "grpo-sequence"},
    presets={
        "smoke": Config(
            (1,), 1, 32, base_steps=30, num_steps=12, num_prompts=10, num_samples=4, test_problems=8, test_samples=8
        ),
        "small": Config(),
        "paper": Config(
            (3,), 4, 256, base_steps=1000, num_steps=500, num_prompts=512, num_samples=10, num_minibatches=4,
            num_passes=1, lr=1e-6,
        ),
    },
    train=train,
    figures="dynascope.studies.riskpo.figures",
    claims=CLAIMS,
)  # fmt: skip
