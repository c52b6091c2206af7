"""Grokking without weight decay: first lazy, later rich (arXiv 2310.06110)."""

from dynascope.studies.grokking_lazy_rich.claims import CLAIMS, at
from dynascope.studies.grokking_lazy_rich.method import ALPHAS, Arm, Config, train
from dynascope.studies.harness import Paper, Study

study = Study(
    name="grokking-lazy-rich",
    paper=Paper("2310.06110", "Grokking as the Transition from Lazy to Rich Training Dynamics", 2023),
    arms={
        **{at(alpha): Arm(alpha=alpha) for alpha in ALPHAS},
        "few-examples": Arm(num_examples=60),
        "many-examples": Arm(num_examples=800),
        "eps-0.05": Arm(eps=0.05),
        "eps-1": Arm(eps=1.0),
        # The same α·ε as alpha-1.
        "eps-0.05-alpha-5": Arm(alpha=5.0, eps=0.05),
        "eps-1-alpha-0.25": Arm(alpha=0.25, eps=1.0),
        "mean-field": Arm("mean field", eps=0.5),
        **{f"digits-{at(alpha)}": Arm("digits", alpha=alpha) for alpha in (0.1, 2.0)},
        **{f"modular-{at(alpha)}": Arm("modular", alpha=alpha) for alpha in (0.3, 10.0)},
    },
    presets={
        "smoke": Config(
            num_steps=20,
            num_neurons=20,
            mean_field_dim=20,
            mean_field_samples=50,
            mean_field_steps=3,
            num_digit_steps=3,
            num_modular_steps=3,
            modulus=5,
        ),
        "small": Config(),
        "paper": Config(
            dim=100, num_neurons=500, num_steps=100_000, num_digit_steps=250_000, num_modular_steps=100_000, modulus=113
        ),
    },
    train=train,
    figures="dynascope.studies.grokking_lazy_rich.figures",
    claims=CLAIMS,
)
