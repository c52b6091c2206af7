"""What a probe is: a name, what it needs to see, the series it yields, and one measurement."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, ClassVar

from torch import Tensor

from dynascope.record import Series


class Need(StrEnum):
    """What a probe must be shown; it decides which view `measure` receives, and at which moment.

    At the optimizer's step (`StepView`): PARAMETERS, GRADIENTS, PREVIOUS_GRADIENTS, UPDATES, OPTIMIZER_STATE.
    In the shadow pass, once per place (results are stacked along a leading axis of places):
    MODULES (`ModuleOutput`), ACTIVATIONS (`ModuleOutput`), BLOCKS (`ModuleOutput`), ATTENTION (`AttentionCall`).
    In a differentiable shadow pass: CURVATURE (`CurvatureView`).
    Beside the shadow pass, the model itself to call as it likes: MODEL (`ModelView`).
    From what the user hands over: EXAMPLES (`ExampleBatch`).
    """

    PARAMETERS = "parameters"
    GRADIENTS = "gradients"
    PREVIOUS_GRADIENTS = "previous gradients"
    UPDATES = "updates"
    OPTIMIZER_STATE = "optimizer state"
    MODULES = "modules"
    ACTIVATIONS = "activations"
    BLOCKS = "blocks"
    ATTENTION = "attention"
    CURVATURE = "curvature"
    MODEL = "model"
    EXAMPLES = "examples"


class Probe:
    """Reads one family of quantities out of a live training run.

    A subclass states `name`, `needs` and `series`, and gives `measure`, which must leave what it is shown untouched,
    keep results on the device (no `.item()`), and return one tensor for each of its series, shaped as the series' dims
    say (a probe of places leaves out the leading axis of places). The mathematics belongs in a public pure function
    beside the class.

    `default` probes run whenever no list of probes is given.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]]
    series: ClassVar[tuple[Series, ...]]
    default: ClassVar[bool] = True

    def measure(self, view: Any) -> Mapping[str, Tensor]:
        """The probe's series, measured on one view."""
        raise TypeError(f"{type(self).__name__} must define measure(view)")
