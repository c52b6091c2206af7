"""Parts: modules and reparametrizations."""

from dynascope.nn.norms import NoNorm, remove_norms
from dynascope.nn.sigma_reparam import (
    SigmaReparam,
    iterate_each_step,
    merge_sigma_reparam,
    sigma_reparam,
    spectral_norms,
)

__all__ = [
    "NoNorm",
    "SigmaReparam",
    "iterate_each_step",
    "merge_sigma_reparam",
    "remove_norms",
    "sigma_reparam",
    "spectral_norms",
]
