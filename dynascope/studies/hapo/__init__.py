"""What a token's entropy decides at every stage of policy optimization, part by part over DAPO (arXiv 2509.16591)."""

from dynascope.studies.hapo.claims import CLAIMS
from dynascope.studies.hapo.method import ARMS, Config, train
from dynascope.studies.harness import Paper, Study

study = Study(
    name="hapo",
    paper=Paper(
        "2509.16591",
        "From Uniform to Heterogeneous: Tailoring Policy Optimization to Every Token's Nature",
        2025,
    ),
    arms=ARMS,
    # The first teaches the start model of a seed; the others find it.
    after={arm: ("dapo",) for arm in ARMS if arm != "dapo"},
    presets={
        "smoke": Config(
            (1,), 1, 32, base_steps=100, num_steps=4, num_prompts=8, num_samples=8, num_minibatches=1, lr=1e-4,
            test_problems=8, test_samples=4, test_every=2,
        ),
        "small": Config(),
        "paper": Config(
            (3,), 4, 256, base_steps=1000, num_steps=500, num_prompts=512, num_samples=16, num_minibatches=16,
            num_passes=1, lr=1e-6, test_problems=512,
            # The recipe's buffer is 4096 of about 12,000 tokens; here it is the four that no right completion needs.
            dual_clip=10.0, overlong_buffer=4,
        ),
    },
    train=train,
    figures="dynascope.studies.hapo.figures",
    claims=CLAIMS,
)  # fmt: skip
