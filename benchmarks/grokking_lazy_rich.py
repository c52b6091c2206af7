"""The committee's closed forms against autograd's, and a sweep at once against a loop: `python benchmarks/grokking_lazy_rich.py`.

40 dimensions, 200 neurons, 200 examples, as in the study. The recipe takes a step by autograd, and the tangent kernel from the
Jacobian of every example; both are compared first. The sweep is of two α, two ε and `--seeds` seeds.
"""

import argparse
import copy
import itertools

import torch
from interleaved import medians, tell
from torch import Tensor
from torch.func import functional_call, jacrev

from dynascope.data.teachers import quadratic_teacher
from dynascope.kernels import ntk
from dynascope.nn import QuadraticCommittee
from dynascope.theory.committee import committee_ntk, committee_sweep, summary_statistics

DIM, NEURONS, EXAMPLES, STEPS = 40, 200, 200, 50
DIALS = {"alpha": 1.0, "eps": 0.25}


def by_autograd(model: QuadraticCommittee, x: Tensor, y: Tensor) -> Tensor:
    optimizer = torch.optim.SGD(model.parameters(), lr=model.lr)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return model.weight.detach()


def in_closed_form(model: QuadraticCommittee, x: Tensor, y: Tensor) -> Tensor:
    model.descend(x, y, STEPS)
    return model.weight.detach()


def by_jacobian(model: QuadraticCommittee, x: Tensor) -> Tensor:
    values = {name: one.detach() for name, one in model.named_parameters()}
    jacobian = jacrev(lambda given: functional_call(model, given, (x,)))(values)["weight"].flatten(1)
    return jacobian @ jacobian.T


def from_statistics(model: QuadraticCommittee, x: Tensor) -> Tensor:
    return committee_ntk(summary_statistics(model.weight.detach()), x, x, **DIALS, num_neurons=NEURONS)


def sweep(arms: list[tuple[float, float, int]]) -> Tensor:
    sizes = {"dim": DIM, "num_neurons": NEURONS, "num_examples": EXAMPLES}
    return committee_sweep(arms, **sizes, num_steps=STEPS, looks=[0, STEPS]).test.total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    x, y, _ = quadratic_teacher(DIM, EXAMPLES, generator=generator)
    start = QuadraticCommittee(DIM, NEURONS, **DIALS, center=True, generator=generator)
    ends = [way(copy.deepcopy(start), x, y) for way in (in_closed_form, by_autograd)]
    kernels = [way(start, x) for way in (from_statistics, by_jacobian)]
    print(f"largest difference of weights {float((ends[0] - ends[1]).abs().max()):.1e}", end=", ")
    print(f"of kernels {float((kernels[0] - kernels[1]).abs().max() / kernels[1].abs().max()):.1e}")
    print(f"\n{STEPS} steps of full-batch descent")
    steps = {"in closed form": in_closed_form, "by autograd": by_autograd}
    tell(
        medians({name: lambda way=way: way(copy.deepcopy(start), x, y) for name, way in steps.items()}, options.turns),
        "in closed form",
    )
    print(f"\nthe tangent kernel of {EXAMPLES} examples")
    ways = {
        "from two statistics": lambda: from_statistics(start, x),
        "dynascope.kernels.ntk": lambda: ntk(start, x, output="trace"),
        "from the Jacobian": lambda: by_jacobian(start, x),
    }
    tell(medians(ways, options.turns), "from two statistics")
    arms = list(itertools.product((0.25, 1.0), (0.05, 0.25), range(options.seeds)))
    gap = sweep(arms) - torch.cat([sweep([arm]) for arm in arms], dim=1)
    print(f"\n{len(arms)} committees, {STEPS} steps; largest difference of test losses {float(gap.abs().max()):.1e}")
    sweeps = {
        "at once": lambda: sweep(arms),
        "one by one": lambda: [sweep([arm]) for arm in arms],
        "one alone": lambda: sweep(arms[:1]),
    }
    tell(medians(sweeps, options.turns), "at once")


if __name__ == "__main__":
    main()
