"""REINFORCE++ made stable, and a judge that reasons (arXiv 2505.02835)."""

from dynascope.studies.harness import Paper, Study
from dynascope.studies.r1_reward.claims import CLAIMS
from dynascope.studies.r1_reward.method import Arm, Config, train

study = Study(
    name="r1-reward",
    paper=Paper(
        "2505.02835", "R1-Reward: Training Multimodal Reward Model Through Stable Reinforcement Learning", 2025
    ),
    arms={
        "reinforce_pp": Arm(),
        "pre-clip": Arm(pre_clip=True),
        "filter": Arm(filter=True),
        "both": Arm(pre_clip=True, filter=True),
        "consistency": Arm(pre_clip=True, filter=True, consistency=True),
        "cold": Arm(pre_clip=True, filter=True, is_cold=True),
        "hard": Arm(pre_clip=True, filter=True, is_hard=True),
        "drift": Arm(world="drift"),
        "drift-pre-clip": Arm(pre_clip=True, world="drift"),
        "easy": Arm(world="easy"),
        "easy-filter": Arm(filter=True, world="easy"),
    },
    presets={
        "smoke": Config(
            width=16, teach_steps=5, num_steps=2, num_prompts=16, num_passes=2, forced_steps=2, test_prompts=16
        ),
        "small": Config(),
        "paper": Config(
            width=3584,
            num_layers=28,
            num_heads=28,
            teach_steps=6250,
            num_steps=195,
            num_prompts=256,
            num_passes=2,
            lr=3e-7,
            test_prompts=1250,
        ),
    },
    train=train,
    figures="dynascope.studies.r1_reward.figures",
    claims=CLAIMS,
)
