"""Wide networks train like kernel machines, and a kernel known in closed form says how (arXiv 1806.07572)."""

from dynascope.studies.harness import Paper, Study
from dynascope.studies.neural_tangent_kernel.claims import CLAIMS
from dynascope.studies.neural_tangent_kernel.method import WIDTHS, Arm, Config, train

study = Study(
    name="neural-tangent-kernel",
    paper=Paper("1806.07572", "Neural Tangent Kernel: Convergence and Generalization in Neural Networks", 2018),
    arms={
        **{f"circle-{width}": Arm("circle", width) for width in WIDTHS},
        **{f"{task}-{width}": Arm(task, width) for task in ("digits", "direction") for width in (64, 4096)},
        "ensemble": Arm("ensemble"),
        "definiteness": Arm("definiteness"),
    },
    presets={
        "smoke": Config(num_steps=3, num_digits=16, num_mode_steps=5, num_networks=3, ensemble_width=8, narrower=32),
        "small": Config(),
        "paper": Config(num_digits=512, num_networks=200, ensemble_width=1000, num_steps=1000),
    },
    train=train,
    figures="dynascope.studies.neural_tangent_kernel.figures",
    claims=CLAIMS,
)
