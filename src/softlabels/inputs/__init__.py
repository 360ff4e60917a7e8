"""What a method may read: one class for each kind of tensor."""

from softlabels.inputs.declared import (
    AuxBranches,
    AuxLogits,
    Classifier,
    Features,
    FromBatch,
    Input,
    Logits,
    NormParameters,
    PeerLogits,
    SecondPass,
    Target,
    TeacherLogits,
    Votes,
    WeakLogits,
)

__all__ = [
    "AuxBranches",
    "AuxLogits",
    "Classifier",
    "Features",
    "FromBatch",
    "Input",
    "Logits",
    "NormParameters",
    "PeerLogits",
    "SecondPass",
    "Target",
    "TeacherLogits",
    "Votes",
    "WeakLogits",
]
