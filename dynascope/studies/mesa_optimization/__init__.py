"""Next-token training installs one step of gradient descent in linear attention, if the data allow it (arXiv 2405.16845)."""

from dynascope.studies.harness import Paper, Study
from dynascope.studies.mesa_optimization.claims import CLAIMS
from dynascope.studies.mesa_optimization.method import SCALES, STARTS, Arm, Config, train

study = Study(
    name="mesa-optimization",
    paper=Paper(
        "2405.16845", "On Mesa-Optimization in Autoregressively Trained Transformers: Emergence and Capability", 2024
    ),
    arms={
        **{f"sparse-{scale:g}": Arm("sparse", scale) for scale in SCALES},
        **{f"gaussian-from-{place}": Arm("gaussian", start=start) for place, start in enumerate(STARTS)},
        **{f"gaussian-{scale:g}": Arm("gaussian", scale) for scale in (0.5, 2.0)},
        "ones-masked": Arm("ones", is_masked=True),
        "ones": Arm("ones"),
    },
    presets={
        "smoke": Config(length=6, num_sequences=20, num_gaussian=20, num_steps=3, num_tests=20),
        "small": Config(),
        "paper": Config(dim=5, length=100, num_sequences=10_000, num_gaussian=10_000, num_steps=200, num_tests=10_000),
    },
    train=train,
    figures="dynascope.studies.mesa_optimization.figures",
    claims=CLAIMS,
)
