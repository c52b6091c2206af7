"""Parts: modules and reparametrizations."""

from dynascope.nn.committee import QuadraticCommittee
from dynascope.nn.ensembles import RunningMoments, TwoLayerNet, train_ensemble
from dynascope.nn.norms import NoNorm, remove_norms
from dynascope.nn.ntk_parametrization import NTKConv2d, NTKLinear, ntk_parametrize
from dynascope.nn.output_scale import OutputScale, lazy_param_groups
from dynascope.nn.sigma_reparam import (
    SigmaReparam,
    iterate_each_step,
    merge_sigma_reparam,
    sigma_reparam,
    spectral_norms,
)
from dynascope.nn.yz_transformer import YZTransformer

__all__ = [
    "NTKConv2d",
    "NTKLinear",
    "NoNorm",
    "OutputScale",
    "QuadraticCommittee",
    "RunningMoments",
    "SigmaReparam",
    "TwoLayerNet",
    "YZTransformer",
    "iterate_each_step",
    "lazy_param_groups",
    "merge_sigma_reparam",
    "ntk_parametrize",
    "remove_norms",
    "sigma_reparam",
    "spectral_norms",
    "train_ensemble",
]
