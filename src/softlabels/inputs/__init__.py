"""The signals that methods read, and how each is provided.

Signals of the student are provided inside the trained module, by a `Provider` each, which may
have learned parts. The others are given to it: labels, extras of the batch, the teachers or
stored answers.
"""

from softlabels.losses.reads import (
    Again,
    Branches,
    Classifier,
    Exits,
    Features,
    FromBatch,
    Logits,
    NormParameters,
    PeerLogits,
    Signal,
    Target,
    TeacherLogits,
    Votes,
    WeakLogits,
)
from softlabels.signals.given import (
    CacheReader,
    TeacherReader,
    checked_reads,
    given_values,
    images_key,
    reads_teacher,
    teachers_of,
)
from softlabels.signals.provider import Provider, Value
from softlabels.signals.student import provider_for

__all__ = [
    "Again",
    "Branches",
    "CacheReader",
    "Classifier",
    "Exits",
    "Features",
    "FromBatch",
    "Logits",
    "NormParameters",
    "PeerLogits",
    "Provider",
    "Signal",
    "Target",
    "TeacherLogits",
    "TeacherReader",
    "Value",
    "Votes",
    "WeakLogits",
    "checked_reads",
    "given_values",
    "images_key",
    "provider_for",
    "reads_teacher",
    "teachers_of",
]
