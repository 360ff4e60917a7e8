"""Better image classifiers from better labels: from a teacher, or from the network itself."""

from typing import TYPE_CHECKING, Any

from softlabels.distiller import Distiller, StepOutput
from softlabels.losses import (
    KDLoss,
    LabelSmoothingLoss,
    NKDLoss,
    SoftLabels,
    USKDLoss,
    ZipfLSLoss,
    kd_loss,
    label_smoothing_loss,
    nkd_loss,
    uskd_loss,
    uskd_targets,
    zipf_ls_loss,
    zipf_ls_targets,
)
from softlabels.taps import FeatureTap
from softlabels.teacher import Teacher

if TYPE_CHECKING:
    from softlabels.training import train

__version__ = "0.1.0"

__all__ = [
    "Distiller",
    "FeatureTap",
    "KDLoss",
    "LabelSmoothingLoss",
    "NKDLoss",
    "SoftLabels",
    "StepOutput",
    "Teacher",
    "USKDLoss",
    "ZipfLSLoss",
    "kd_loss",
    "label_smoothing_loss",
    "nkd_loss",
    "uskd_loss",
    "uskd_targets",
    "zipf_ls_loss",
    "zipf_ls_targets",
]


def __getattr__(name: str) -> Any:
    # `train` needs the extra `softlabels[train]`: it is imported when it is first asked for.
    if name == "train":
        from softlabels.training import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
