"""Better image classifiers from better labels: from a teacher, or from the network itself."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softlabels.distill.distiller import (
        Distiller as Distiller,
    )
    from softlabels.distill.distiller import (
        StepOutput as StepOutput,
    )
    from softlabels.distill.teacher import (
        Teacher as Teacher,
    )
    from softlabels.distill.teacher_cache import (
        TeacherCache as TeacherCache,
    )
    from softlabels.experiments.train import (
        train as train,
    )
    from softlabels.losses import (
        KDLoss as KDLoss,
    )
    from softlabels.losses import (
        LabelSmoothingLoss as LabelSmoothingLoss,
    )
    from softlabels.losses import (
        NKDLoss as NKDLoss,
    )
    from softlabels.losses import (
        SoftLabels as SoftLabels,
    )
    from softlabels.losses import (
        USKDLoss as USKDLoss,
    )
    from softlabels.losses import (
        ZipfLSLoss as ZipfLSLoss,
    )
    from softlabels.losses import (
        kd_loss as kd_loss,
    )
    from softlabels.losses import (
        label_smoothing_loss as label_smoothing_loss,
    )
    from softlabels.losses import (
        nkd_loss as nkd_loss,
    )
    from softlabels.losses import (
        uskd_loss as uskd_loss,
    )
    from softlabels.losses import (
        uskd_targets as uskd_targets,
    )
    from softlabels.losses import (
        zipf_ls_loss as zipf_ls_loss,
    )
    from softlabels.losses import (
        zipf_ls_targets as zipf_ls_targets,
    )
    from softlabels.taps import (
        FeatureTap as FeatureTap,
    )

__version__ = "0.1.0"

# Read when first asked for: `softlabels --help` does not wait for torch, and `train` needs the
# extra `softlabels[train]`, which the rest does not.
_LAZY = {
    "Distiller": "distill",
    "StepOutput": "distill",
    "KDLoss": "losses",
    "LabelSmoothingLoss": "losses",
    "NKDLoss": "losses",
    "SoftLabels": "losses",
    "USKDLoss": "losses",
    "ZipfLSLoss": "losses",
    "kd_loss": "losses",
    "label_smoothing_loss": "losses",
    "nkd_loss": "losses",
    "uskd_loss": "losses",
    "uskd_targets": "losses",
    "zipf_ls_loss": "losses",
    "zipf_ls_targets": "losses",
    "FeatureTap": "taps",
    "Teacher": "distill",
    "TeacherCache": "distill",
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
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        room = import_module(f"{__name__}.{_LAZY[name]}")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{__name__}.{name} needs pip install 'softlabels[train]': {error}"
        ) from error
    value = getattr(room, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
