"""One layer of multi-head softmax attention learns to regress in context, by debiased gradient descent (arXiv 2503.12734).

Each prompt is a regression of its own: examples (x, y), and a query whose label is asked for. After training every head
compares inputs only (KQ = ω I) and passes on labels only (OV = μ); heads are of one size and both signs, and cancel. Two
such heads are one step of gradient descent on centred inputs; one head can only smooth. Softmax divides by the number of
examples by itself, so longer prompts are no trouble; correlated inputs are preconditioned; several tasks share heads.
"""

from dynascope.studies.harness import Paper, Study
from dynascope.studies.icl_linear_regression.claims import CLAIMS
from dynascope.studies.icl_linear_regression.training import Arm, Config, train

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
    figures="dynascope.studies.figures.icl_linear_regression",
    claims=CLAIMS,
)
