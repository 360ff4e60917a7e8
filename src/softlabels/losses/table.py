"""The table of methods: a new method is its own file and one line here."""

from __future__ import annotations

from torch import nn

from softlabels.losses.kd import KDLoss
from softlabels.losses.nkd import NKDLoss
from softlabels.losses.uskd import USKDLoss
from softlabels.losses.zipf_ls import ZipfLSLoss

__all__ = ["METHODS"]

METHODS: dict[str, type[nn.Module]] = {
    "kd": KDLoss,
    "nkd": NKDLoss,
    "uskd": USKDLoss,
    "zipf_ls": ZipfLSLoss,
}
