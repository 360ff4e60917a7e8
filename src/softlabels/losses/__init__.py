"""Losses: tensors in, tensors out. They need torch alone, and know no model and no loop."""

from softlabels.losses.checks import check_values
from softlabels.losses.kd import KDLoss, kd_loss
from softlabels.losses.label_smoothing import LabelSmoothingLoss, label_smoothing_loss
from softlabels.losses.nkd import NKDLoss, nkd_loss
from softlabels.losses.nontarget import LossOutput, SoftLabels
from softlabels.losses.table import METHODS
from softlabels.losses.uskd import USKDLoss, uskd_loss, uskd_targets
from softlabels.losses.zipf_ls import ZipfLSLoss, zipf_ls_loss, zipf_ls_targets

__all__ = [
    "METHODS",
    "KDLoss",
    "LabelSmoothingLoss",
    "LossOutput",
    "NKDLoss",
    "SoftLabels",
    "USKDLoss",
    "ZipfLSLoss",
    "check_values",
    "kd_loss",
    "label_smoothing_loss",
    "nkd_loss",
    "uskd_loss",
    "uskd_targets",
    "zipf_ls_loss",
    "zipf_ls_targets",
]
