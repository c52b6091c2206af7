"""The tangent kernel of any model, its limit at infinite width, and what it predicts of training."""

from dynascope.kernels.alignment import (
    centered,
    effective_rank,
    kernel_alignment,
    kernel_distance,
    kernel_velocity,
    label_power,
)
from dynascope.kernels.distributed import ntk_rows
from dynascope.kernels.empirical import examples_at_once, ntk, ntk_trace, ntk_vp
from dynascope.kernels.lanczos import top_eigenvalue
from dynascope.kernels.limits import limit_kernels
from dynascope.kernels.linearize import LinearizedTwin, linearize
from dynascope.kernels.predict import (
    GPEnsemble,
    KernelTraining,
    kernel_regression,
    kernel_regression_baseline,
    max_learning_rate,
    mode_times,
    ntk_solve,
    predict_cross_entropy,
    predict_ensemble,
    predict_ode,
)

__all__ = [
    "GPEnsemble",
    "KernelTraining",
    "LinearizedTwin",
    "centered",
    "effective_rank",
    "examples_at_once",
    "kernel_alignment",
    "kernel_distance",
    "kernel_regression",
    "kernel_regression_baseline",
    "kernel_velocity",
    "label_power",
    "limit_kernels",
    "linearize",
    "max_learning_rate",
    "mode_times",
    "ntk",
    "ntk_rows",
    "ntk_solve",
    "ntk_trace",
    "ntk_vp",
    "predict_cross_entropy",
    "predict_ensemble",
    "predict_ode",
    "top_eigenvalue",
]
