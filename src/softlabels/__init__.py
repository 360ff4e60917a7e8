"""Better image classifiers from better labels: from a teacher, or from the network itself."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softlabels.distill import Distiller, StepOutput, Teacher, TeacherCache
    from softlabels.experiments.train import train as train
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

__version__ = "0.1.0"

# Read when first asked for: `softlabels --help` does not wait for torch, and `train` needs the
# extra `softlabels[train]`, which the rest does not. All other names are those of losses.
_MODULES = {
    **dict.fromkeys(("Distiller", "StepOutput", "Teacher", "TeacherCache"), "distill"),
    "FeatureTap": "taps",
    "train": "experiments.train",
}

__all__ = [
    "Distiller",
    "FeatureTap",
    "KDLoss",
    "LabelSmoothingLoss",
    "NKDLoss",
    "SoftLabels",
    "StepOutput",
    "Teacher",
    "TeacherCache",
    "USKDLoss",
    "ZipfLSLoss",
    "__version__",
    "kd_loss",
    "label_smoothing_loss",
    "nkd_loss",
    "uskd_loss",
    "uskd_targets",
    "zipf_ls_loss",
    "zipf_ls_targets",
]


def __getattr__(name: str) -> Any:
    if name not in {*__all__, *_MODULES}:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f"{__name__}.{_MODULES.get(name, 'losses')}")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{__name__}.{name} needs pip install 'softlabels[train]': {error}"
        ) from error
    globals()[name] = value = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
