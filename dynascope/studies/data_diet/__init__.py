"""Examples that matter can be told early in training, and half of the data can go (arXiv 2107.07075)."""

from dynascope.studies.data_diet.claims import CLAIMS
from dynascope.studies.data_diet.method import ARMS, Config, train
from dynascope.studies.harness import Paper, Study

study = Study(
    name="data-diet",
    paper=Paper("2107.07075", "Deep Learning on a Data Diet: Finding Important Examples Early in Training", 2021),
    arms=ARMS,
    presets={
        "smoke": Config(
            num_epochs=2,
            score_epochs=(0, 1, 2),
            spawn_epochs=(0, 1),
            num_score_runs=2,
            num_retrainings=1,
            num_kernel_examples=4,
            num_held_out=1500,
        ),
        "small": Config(),
        # The paper's length; its images are not bundled.
        "paper": Config(
            num_epochs=200,
            score_epochs=(0, 1, 2, 5, 10, 20, 200),
            spawn_epochs=(0, 1, 2, 5, 10, 20, 50, 100),
            lr=0.1,
            num_retrainings=4,
        ),
    },
    train=train,
    figures="dynascope.studies.data_diet.figures",
    after={
        name: (arm.scores_of,)
        for name, arm in ARMS.items()
        if arm.task in ("barrier", "kernel") or (arm.task == "retrain" and arm.by != "random")
    },
    claims=CLAIMS,
)
