"""Parts: modules and reparametrizations."""

from dynascope.nn.committee import QuadraticCommittee
from dynascope.nn.ensembles import RunningMoments, TwoLayerNet, train_ensemble
from dynascope.nn.head_intervention import HeadIntervention
from dynascope.nn.norms import NoNorm, remove_norms
from dynascope.nn.ntk_parametrization import NTKConv2d, NTKLinear, ntk_parametrize
from dynascope.nn.output_scale import OutputScale, lazy_param_groups
from dynascope.nn.relu_attention import register_with_transformers, relu_attention, sigmoid_attention, softmax1
from dynascope.nn.sigma_reparam import (
    SigmaReparam,
    iterate_each_step,
    merge_sigma_reparam,
    sigma_reparam,
    spectral_norms,
)
from dynascope.nn.toy_transformer import ToyTransformer
from dynascope.nn.yz_stack import YZStack
from dynascope.nn.yz_transformer import YZTransformer

__all__ = [
    "HeadIntervention",
    "NTKConv2d",
    "NTKLinear",
    "NoNorm",
    "OutputScale",
    "QuadraticCommittee",
    "RunningMoments",
    "SigmaReparam",
    "ToyTransformer",
    "TwoLayerNet",
    "YZStack",
    "YZTransformer",
    "iterate_each_step",
    "lazy_param_groups",
    "merge_sigma_reparam",
    "ntk_parametrize",
    "register_with_transformers",
    "relu_attention",
    "remove_norms",
    "sigma_reparam",
    "sigmoid_attention",
    "softmax1",
    "spectral_norms",
    "train_ensemble",
]
