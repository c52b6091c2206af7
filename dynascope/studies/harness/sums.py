"""What studies share whose arms learn sums by reinforcement learning, all from one start model a seed."""

from dataclasses import dataclass

from dynascope.rl.loop import LoopConfig
from dynascope.rl.tasks.arithmetic import Arithmetic
from dynascope.rl.tasks.base_model import BaseModel
from dynascope.studies.harness.policy import Evaluation


@dataclass(frozen=True)
class SumsConfig:
    """Sizes and lengths; a study's own `Config` extends it, and states anew what differs there.

    Raises ValueError for sizes that no start model, training or test can have.

    >>> SumsConfig(digits=(1,), num_steps=20).loop.num_steps
    20
    """

    digits: tuple[int, ...] = (2,)
    """Levels of difficulty."""
    num_layers: int = 2
    width: int = 64
    base_steps: int = 200
    """Of supervised learning behind the start model; more make it stronger, and leave less to learn."""
    num_steps: int = 60
    """Rollouts."""
    num_prompts: int = 32
    """A rollout."""
    num_samples: int = 8
    """Completions a prompt."""
    num_minibatches: int = 2
    """Optimizer steps a pass over a rollout."""
    num_passes: int = 1
    lr: float = 3e-4
    test_problems: int = 128
    test_samples: int = 16
    test_every: int = 10

    def __post_init__(self) -> None:
        _ = self.start, self.loop, self.evaluation  # check their sizes

    @property
    def task(self) -> Arithmetic:
        """Sums of these levels."""
        return Arithmetic(self.digits)

    @property
    def start(self) -> BaseModel:
        """The model that every arm starts from."""
        return BaseModel(self.task, self.num_layers, self.width, num_steps=self.base_steps)

    @property
    def loop(self) -> LoopConfig:
        """The amount of training, the same for all arms."""
        return LoopConfig(self.num_steps, self.num_prompts, self.num_samples, self.num_minibatches, self.num_passes)

    @property
    def evaluation(self) -> Evaluation:
        """How policies are tested."""
        return Evaluation(self.test_problems, self.test_samples, self.test_every)
