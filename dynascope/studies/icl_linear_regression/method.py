"""One layer of multi-head softmax attention learns to regress in context, by debiased gradient descent (arXiv 2503.12734).

Each prompt is a regression of its own: examples (x, y), and a query whose label is asked for. After training every head
compares inputs only (KQ = ω I) and passes on labels only (OV = μ); heads are of one size and both signs, and cancel. Two
such heads are one step of gradient descent on centred inputs; one head can only smooth. Softmax divides by the number of
examples by itself, so longer prompts are no trouble; correlated inputs are preconditioned; several tasks share heads.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dynascope.data.in_context.linear_regression import LinearRegressionICL, toeplitz_covariance
from dynascope.nn.icl_attention import MultiHeadSoftmaxICL
from dynascope.probes.circuits import HeadCircuits
from dynascope.probes.views import ModelView
from dynascope.record import Series
from dynascope.studies.harness import StudyRecord, descend, log_steps
from dynascope.theory.in_context_regression import debiased_gd_predict

CHUNK = 4000
RHO = 0.5
TASKS = ((0, 1, 2, 3), (2, 3, 4, 5))
TASK_DIM = 6


@dataclass(frozen=True)
class Config:
    """Sizes and lengths."""

    dim: int = 5
    length: int = 40
    task_length: int = 48
    noise_variance: float = 0.1
    test_lengths: tuple[int, ...] = (10, 20, 40, 60, 80, 100)
    num_tests: int = 40_000
    num_steps: int = 7000
    batch_size: int = 256
    lr: float = 3e-3
    num_networks: int = 5
    """Networks with two heads, trained side by side: each seed is the experiment of several starts."""

    def __post_init__(self) -> None:
        sizes = (
            self.dim,
            self.length,
            self.task_length,
            self.num_tests,
            self.num_steps,
            self.batch_size,
            self.num_networks,
        )
        if min(sizes) < 1:
            raise ValueError("every size must be at least 1")
        if self.length not in self.test_lengths:
            raise ValueError(f"test_lengths must have the training length {self.length} among them")


@dataclass(frozen=True)
class Arm:
    """How many heads, of what kind, on which inputs and tasks."""

    num_heads: int
    attention: str = "softmax"
    has_correlated_inputs: bool = False
    is_multi_task: bool = False


def train(config: Config, arm: Arm, seed: int, record: StudyRecord) -> None:
    """Adam on the square error of the query's label, on prompts that are never seen twice."""
    # A second thread costs more than it brings on products this small, and everything where cores are shared.
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    prompts, tests = sampler(config, arm, query_noise=not arm.is_multi_task), sampler(config, arm, query_noise=False)
    model = MultiHeadSoftmaxICL(
        prompts.dim,
        arm.num_heads,
        prompts.num_tasks,
        num_networks=num_networks(config, arm),
        attention=arm.attention,
        linear_scale=1 / prompts.length,
        generator=generator,
    )
    probe = HeadCircuits()
    for series in probe.series:
        record.declare(series)

    def loss() -> Tensor:
        batch = prompts.sample(config.batch_size, generator)
        errors: Tensor = (model(batch.context, batch.query) - batch.target).square().mean((1, 2))
        return errors.sum()

    def look(step: int) -> None:
        with torch.no_grad():
            record.add(step, dict(probe.measure(ModelView(step, model, (), {}, config.lr))))

    looks = log_steps(config.num_steps, per_decade=12)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
    descend(optimizer, loss, config.num_steps, looks=looks, look=look)

    lengths = (prompts.length,) if arm.is_multi_task else config.test_lengths
    record.declare(
        Series("risk", ("length", "network", "task"), description="Mean squared error on prompts of each length.")
    )
    record.declare(
        Series("setting", ("number",), description="Inputs and examples of a prompt, variance of the noise.")
    )
    record.add(0, {"setting": torch.tensor([prompts.dim, prompts.length, config.noise_variance])})
    record.declare(Series("correlation", ("network",), description="Of the answers with debiased gradient descent."))
    # Labels asked for carry their noise in the single task, and none in the authors' script for several.
    noise = 0.0 if arm.is_multi_task else config.noise_variance
    risks = []
    for length in lengths:
        answers, targets, descent = answered(model, tests, config.num_tests, length, seed)
        risks.append((answers - targets).square().mean(1) + noise)
        if length == config.length and not arm.is_multi_task:
            pairs = [torch.corrcoef(torch.stack([one[:, 0], descent]))[0, 1] for one in answers]
            record.add(config.num_steps, {"correlation": torch.stack(pairs)})
    circuits = model.circuits()
    record.add(config.num_steps, {"lengths": torch.tensor(lengths), "risk": torch.stack(risks)})
    record.add(config.num_steps, {"kq": circuits.kq.detach(), "ov": circuits.ov.detach()})


def sampler(config: Config, arm: Arm, *, query_noise: bool) -> LinearRegressionICL:
    """The law of an arm's prompts."""
    if arm.is_multi_task:
        return LinearRegressionICL(
            TASK_DIM, config.task_length, config.noise_variance, tasks=TASKS, query_noise=query_noise
        )
    covariance = toeplitz_covariance(config.dim, RHO) if arm.has_correlated_inputs else None
    return LinearRegressionICL(
        config.dim, config.length, config.noise_variance, covariance=covariance, query_noise=query_noise
    )


def num_networks(config: Config, arm: Arm) -> int:
    """Several where the pattern is judged; three, to take the middle one, where tasks compete for heads; or one."""
    if arm.is_multi_task:
        return 3
    return config.num_networks if arm.num_heads == 2 and arm.attention == "softmax" else 1


@torch.no_grad()
def answered(
    model: MultiHeadSoftmaxICL, tests: LinearRegressionICL, count: int, length: int, seed: int
) -> tuple[Float[Tensor, "networks prompts tasks"], Float[Tensor, "prompts tasks"], Float[Tensor, " prompts"]]:
    """Answers on the seed's tests of one length, the noiseless labels, and what debiased descent says of the first."""
    generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + length)
    answers, targets, descent = [], [], []
    for start in range(0, count, CHUNK):
        batch = tests.sample(min(CHUNK, count - start), generator, length=length)
        answers.append(model(batch.context, batch.query))
        targets.append(batch.target)
        descent.append(debiased_gd_predict(batch.x, batch.y[..., 0], batch.query_x, 1.0))
    return torch.cat(answers, 1), torch.cat(targets), torch.cat(descent)
