"""Every detector of the library, and all of them over one record."""

from collections.abc import Sequence

from dynascope.findings.activations import DeadUnits
from dynascope.findings.attention import EntropyCollapse
from dynascope.findings.circuits import InContextDescent
from dynascope.findings.curvature import EdgeOfStability
from dynascope.findings.demonstrations import ConstantFineTuning
from dynascope.findings.detector import Detector, Follower
from dynascope.findings.extreme_tokens import ExtremeTokens
from dynascope.findings.generalization import DelayedGeneralization, Overfitting
from dynascope.findings.gradients import DivergencePrecursor, ExplodingGradients, UpdateRatio, VanishingGradients
from dynascope.findings.loss import LossSpike, Plateau
from dynascope.findings.policy import NeutralRatios, OneSidedAdvantages
from dynascope.findings.policy_stability import AdvantageOutliers, OneSidedRewards, PreClipHides, RatioExplosion
from dynascope.findings.preference import SynchronizedLogps
from dynascope.findings.reasoning import GuessingDetector, RewardSaturationDetector
from dynascope.findings.scan_snap import AttentionSnap
from dynascope.findings.speed import ThroughputLoss
from dynascope.findings.zero_rl import (
    ErraticStops,
    FormatPressure,
    KeywordIllusion,
    LengthCollapse,
    UnhealthyGrowth,
    UnsuitableQuestions,
)
from dynascope.record import Finding, Record


def all_detectors() -> Sequence[Detector]:
    """A fresh set of every detector."""
    return [
        LossSpike(),
        Plateau(),
        DivergencePrecursor(),
        ExplodingGradients(),
        VanishingGradients(),
        UpdateRatio(),
        DeadUnits(),
        EntropyCollapse(),
        AttentionSnap(),
        InContextDescent(),
        ExtremeTokens(),
        EdgeOfStability(),
        Overfitting(),
        DelayedGeneralization(),
        SynchronizedLogps(),
        OneSidedAdvantages(),
        NeutralRatios(),
        ConstantFineTuning(),
        GuessingDetector(),
        RatioExplosion(),
        PreClipHides(),
        AdvantageOutliers(),
        OneSidedRewards(),
        RewardSaturationDetector(),
        UnhealthyGrowth(),
        ErraticStops(),
        LengthCollapse(),
        FormatPressure(),
        UnsuitableQuestions(),
        KeywordIllusion(),
        ThroughputLoss(),
    ]


def detect(record: Record) -> list[Finding]:
    """What all detectors conclude from a record.

    >>> [finding.message for finding in detect(dynascope.open("runs/mine"))]
    """
    return Follower(record, all_detectors).new_findings()
