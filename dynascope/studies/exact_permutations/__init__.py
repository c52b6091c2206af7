"""Two-layer networks trained on k unit vectors permute every binary input exactly, as an ensemble (arXiv 2502.16763)."""

from dynascope.studies.exact_permutations.claims import CLAIMS
from dynascope.studies.exact_permutations.method import Arm, Config, train
from dynascope.studies.harness import Paper, Study

study = Study(
    name="exact-permutations",
    paper=Paper(
        "2502.16763",
        "Exact Learning of Permutations for Nonzero Binary Inputs with Logarithmic Training Size and Quadratic Ensemble "
        "Complexity",
        2025,
    ),
    arms={
        "closed-form": Arm("closed form"),
        **{f"sampled-{kernel}": Arm("sampled", kernel) for kernel in ("ntk", "nngp")},
        **{f"trained-{kernel}": Arm("trained", kernel) for kernel in ("ntk", "nngp")},
        **{f"every-input-{k}": Arm("every input", k=k) for k in (5, 8)},
    },
    presets={
        "smoke": Config(width=64, num_networks=8, num_steps=5, num_tests=50, most_sampled=20),
        "small": Config(),
        # The width and the steps of the paper's experiment.
        "paper": Config(width=50_000, num_steps=10_000, most_sampled=5000),
    },
    train=train,
    figures="dynascope.studies.exact_permutations.figures",
    claims=CLAIMS,
)
