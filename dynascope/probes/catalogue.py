"""The probes by name."""

import difflib
from collections.abc import Sequence

from dynascope.probes.activations import Activations, DeadUnits
from dynascope.probes.adam import AdamHealth
from dynascope.probes.attention import Attention
from dynascope.probes.circuits import HeadCircuits
from dynascope.probes.curvature import Curvature
from dynascope.probes.displacement import WeightDisplacement
from dynascope.probes.examples import Examples
from dynascope.probes.extreme_tokens import ExtremeTokens
from dynascope.probes.gradients import GradientNoise, Gradients
from dynascope.probes.memory import Memory
from dynascope.probes.probe import Probe
from dynascope.probes.residual import Residual
from dynascope.probes.tangent_kernel import TangentKernel
from dynascope.probes.updates import Updates
from dynascope.probes.weights import Weights

_ALL: tuple[type[Probe], ...] = (
    Gradients,
    GradientNoise,
    Updates,
    AdamHealth,
    Activations,
    DeadUnits,
    Residual,
    Attention,
    Weights,
    Memory,
    Curvature,
    Examples,
    WeightDisplacement,
    TangentKernel,
    HeadCircuits,
    ExtremeTokens,
)


def available() -> dict[str, type[Probe]]:
    """Every probe of the library by name; those with `default = True` run when none are named."""
    return {probe.name: probe for probe in _ALL}


def choose_probes(chosen: Sequence[str | type[Probe] | Probe] | None = None) -> list[Probe]:
    """Probes from names, classes and instances; None gives the default ones, "default" and "all" stand for sets.

    Raises ValueError for an unknown name, telling what there is.

    >>> [probe.name for probe in choose_probes(["default", "curvature"])]
    """
    known = available()
    probes: dict[str, Probe] = {}
    for choice in ["default"] if chosen is None else chosen:
        if isinstance(choice, Probe):
            probes[choice.name] = choice
        elif isinstance(choice, type):
            probes[choice.name] = choice()
        elif choice in ("default", "all"):
            probes |= {name: cls() for name, cls in known.items() if cls.default or choice == "all"}
        elif choice in known:
            probes[choice] = known[choice]()
        elif choice != "none":
            near = difflib.get_close_matches(choice, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown probe {choice!r}{hint} Known: {', '.join(known)}, default, all, none.")
    return list(probes.values())
