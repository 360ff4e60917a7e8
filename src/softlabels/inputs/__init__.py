"""What a method may read: one class for each kind of tensor, with what provides it.

A method declares `inputs`, a mapping from each argument of its `terms` to one of these. The
`Distiller` asks each of them for its value.
"""

from softlabels.inputs.aux_branches import AuxBranches
from softlabels.inputs.base import (
    BatchInput,
    Input,
    NetworkInput,
    Provider,
    StudentInput,
    TeacherInput,
    Value,
)
from softlabels.inputs.batch import FromBatch, Target
from softlabels.inputs.student import (
    AuxLogits,
    Features,
    Logits,
    PeerLogits,
    SecondPass,
    Votes,
    WeakLogits,
)
from softlabels.inputs.teacher import Classifier, NormParameters, TeacherLogits

__all__ = [
    "AuxBranches",
    "AuxLogits",
    "BatchInput",
    "Classifier",
    "Features",
    "FromBatch",
    "Input",
    "Logits",
    "NetworkInput",
    "NormParameters",
    "PeerLogits",
    "Provider",
    "SecondPass",
    "StudentInput",
    "Target",
    "TeacherInput",
    "TeacherLogits",
    "Value",
    "Votes",
    "WeakLogits",
]
