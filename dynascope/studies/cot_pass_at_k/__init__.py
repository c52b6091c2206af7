"""Rewards for right answers alone teach right reasoning, where right reasoning pays (arXiv 2506.14245)."""

from dynascope.studies.cot_pass_at_k.claims import CLAIMS
from dynascope.studies.cot_pass_at_k.method import Bandit, Config, Policy, train
from dynascope.studies.harness import Paper, Study

study = Study(
    name="cot-pass-at-k",
    paper=Paper(
        "2506.14245",
        "Reinforcement Learning with Verifiable Rewards Implicitly Incentivizes Correct Reasoning in Base LLMs",
        2025,
    ),
    arms={
        "bandit-prior": Bandit(0.9, 0.3),
        "bandit-equal": Bandit(0.6, 0.6),
        "bandit-violated": Bandit(0.4, 0.7),
        "grpo": Policy("guess"),
        "shortcut": Policy("shortcut"),
    },
    presets={
        "smoke": Config(
            width=16,
            teach_steps=10,
            teach_batch=32,
            num_steps=4,
            num_prompts=8,
            test_prompts=8,
            test_samples=8,
            test_every=2,
            sft_steps=5,
            bandit_steps=20,
        ),
        "small": Config(),
        "paper": Config(
            width=1024,
            num_layers=24,
            num_heads=16,
            num_digits=8,
            teach_steps=20_000,
            num_steps=400,
            num_prompts=512,
            num_samples=16,
            lr=1e-6,
            test_prompts=500,
            test_samples=1024,
            test_every=30,
            sft_steps=1000,
        ),
    },
    train=train,
    figures="dynascope.studies.cot_pass_at_k.figures",
    claims=CLAIMS,
)
