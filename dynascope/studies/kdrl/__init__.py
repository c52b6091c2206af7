"""Rewards and a teacher together, on the policy's own samples (arXiv 2506.02208)."""

from dynascope.studies.harness import Paper, Study
from dynascope.studies.kdrl.claims import CLAIMS
from dynascope.studies.kdrl.method import Arm, Config, train

study = Study(
    name="kdrl",
    paper=Paper(
        "2506.02208",
        "KDRL: Post-Training Reasoning LLMs via Unified Knowledge Distillation and Reinforcement Learning",
        2025,
    ),
    arms={
        "grpo": Arm(),
        "kd-k1": Arm(from_rewards=False, kind="k1"),
        "kd-k2": Arm(from_rewards=False, kind="k2"),
        "sft": Arm(from_rewards=False, kind="sft"),
        "kdrl": Arm(kind="k2"),
        "kdrl-k3": Arm(kind="k3"),
        "kdrl-top": Arm(kind="full", top=4),
        "kdrl-annealed": Arm(kind="k2", is_annealed=True),
        "kdrl-response": Arm(kind="k2", mask="response"),
        "kdrl-group": Arm(kind="k2", mask="group"),
        "weak-grpo": Arm(is_weak=True),
        "weak-kdrl": Arm(kind="k2", is_weak=True),
    },
    presets={
        "smoke": Config(
            (1,), width=32, base_steps=40, weak_steps=20, teacher_width=32, teacher_steps=60, num_steps=2, num_prompts=4,
            num_samples=4, test_problems=8, test_every=1,
        ),
        "small": Config(),
        # The paper: R1-Distill-Qwen-1.5B, a 7B teacher, about 280 steps, coefficient 2e-3, nothing clamped.
        "paper": Config(
            (3,), num_layers=4, width=256, base_steps=1000, weak_steps=700, teacher_layers=8, teacher_width=512,
            teacher_steps=4000, beta=2e-3, clamp=20.0, num_steps=280, num_prompts=128, lr=1e-5, test_every=140,
        ),
    },
    train=train,
    figures="dynascope.studies.kdrl.figures",
    claims=CLAIMS,
)  # fmt: skip
