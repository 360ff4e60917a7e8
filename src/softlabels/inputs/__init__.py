"""What a method may read: one class for each kind of tensor."""

from softlabels.inputs.declared import (
    SecondPass,
    AuxBranches,
    Classifier,
    AuxLogits,
    Features,
    FromBatch,
    Logits,
    NormParameters,
    PeerLogits,
    Input,
    Target,
    TeacherLogits,
    Votes,
    WeakLogits,
)

__all__ = [
    "Again",
    "Branches",
    "Classifier",
    "Exits",
    "Features",
    "FromBatch",
    "Logits",
    "NormParameters",
    "PeerLogits",
    "Signal",
    "Target",
    "TeacherLogits",
    "Votes",
    "WeakLogits",
]
