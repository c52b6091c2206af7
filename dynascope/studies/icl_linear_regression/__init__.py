"""One layer of multi-head softmax attention learns to regress in context (arXiv 2503.12734)."""

from dynascope.studies.harness import Paper, Study
from dynascope.studies.icl_linear_regression.claims import CLAIMS
from dynascope.studies.icl_linear_regression.method import Arm, Config, train

study = Study(
    name="icl-linear-regression",
    paper=Paper(
        "2503.12734",
        "In-Context Linear Regression Demystified: Training Dynamics and Mechanistic Interpretability of Multi-Head "
        "Softmax Attention",
        2025,
    ),
    arms={
        **{f"heads-{heads}": Arm(heads) for heads in (1, 2, 3, 4)},
        "linear": Arm(1, attention="linear"),
        "anisotropic": Arm(2, has_correlated_inputs=True),
        **{f"tasks-{heads}": Arm(heads, is_multi_task=True) for heads in (4, 3, 2)},
    },
    presets={
        "smoke": Config(num_tests=100, num_steps=4, batch_size=8, num_networks=2, test_lengths=(10, 40)),
        "small": Config(),
        "paper": Config(num_steps=500_000, lr=1e-3),
    },
    train=train,
    figures="dynascope.studies.icl_linear_regression.figures",
    claims=CLAIMS,
)
