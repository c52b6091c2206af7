"""Few tokens carry GRPO, and a tilt of them trades exploitation for exploration (arXiv 2510.03669)."""

from dynascope.studies.harness import Paper, Study
from dynascope.studies.token_hidden_reward.claims import CLAIMS
from dynascope.studies.token_hidden_reward.method import ARMS, Config, train

study = Study(
    name="token-hidden-reward",
    paper=Paper(
        "2510.03669",
        "Token Hidden Reward: Steering Exploration-Exploitation in Group Relative Deep Reinforcement Learning",
        2025,
    ),
    arms=ARMS,
    # The first teaches the start model of a seed; the others find it.
    after={arm: ("neutral",) for arm in ARMS if arm != "neutral"},
    presets={
        "smoke": Config(
            (1,), width=32, base_steps=60, num_steps=2, num_prompts=8, num_samples=4, test_problems=8, test_every=1
        ),
        "small": Config(),
        # The paper trains Qwen2.5 models on competition mathematics: 40 steps of 128 prompts, 8 answers each.
        "paper": Config(
            (3,), num_layers=4, width=256, base_steps=1000, num_steps=40, num_prompts=128, lr=1e-5, test_every=10
        ),
    },
    train=train,
    figures="dynascope.studies.token_hidden_reward.figures",
    claims=CLAIMS,
)
