"""Losses: tensors in, tensors out, a file each. They need torch alone; `Method` is their base."""

from softlabels.losses._checks import check_values
from softlabels.losses._memory_bank import MemoryBank
from softlabels.losses._method import (
    METHODS,
    Count,
    Defaults,
    Method,
    Positive,
    Range,
    Shapes,
    Share,
    Stages,
    Temperature,
    Value,
    Weight,
)
from softlabels.losses._non_target import SoftLabels
from softlabels.losses.at import ATLoss
from softlabels.losses.bake import BAKELoss, bake_targets
from softlabels.losses.ban import BANLoss
from softlabels.losses.byot import BYOTLoss
from softlabels.losses.crd import CRDLoss
from softlabels.losses.cs_kd import CSKDLoss
from softlabels.losses.ddgsd import DDGSDLoss
from softlabels.losses.dist import DISTLoss
from softlabels.losses.dkd import DKDLoss
from softlabels.losses.dks import DKSLoss
from softlabels.losses.fitnet import FitNetLoss
from softlabels.losses.frskd import FRSKDLoss
from softlabels.losses.kd import KDLoss, kd_loss
from softlabels.losses.kdcl import KDCLLoss
from softlabels.losses.label_smoothing import LabelSmoothingLoss, label_smoothing_loss
from softlabels.losses.mgd import MGDLoss
from softlabels.losses.mixskd import MixSKDLoss
from softlabels.losses.nkd import NKDLoss, nkd_loss
from softlabels.losses.nst import NSTLoss
from softlabels.losses.ofd import OFDLoss
from softlabels.losses.ols import OLSLoss
from softlabels.losses.pkt import PKTLoss
from softlabels.losses.ps_kd import PSKDLoss
from softlabels.losses.reviewkd import ReviewKDLoss
from softlabels.losses.rkd import RKDLoss
from softlabels.losses.sad import SADLoss
from softlabels.losses.sp import SPLoss
from softlabels.losses.srrl import SRRLLoss
from softlabels.losses.tat import TaTLoss
from softlabels.losses.tf_fd import TfFDLoss
from softlabels.losses.tf_kd import TfKDLoss
from softlabels.losses.tf_kd_self import TfKDSelfLoss
from softlabels.losses.tf_nkd import TfNKDLoss
from softlabels.losses.uskd import USKDLoss, uskd_loss, uskd_targets
from softlabels.losses.vid import VIDLoss
from softlabels.losses.vitkd import ViTKDLoss
from softlabels.losses.weighted_sum import WeightedSum
from softlabels.losses.wsld import WSLDLoss
from softlabels.losses.zipf_ls import ZipfLSLoss, zipf_ls_loss, zipf_ls_targets

__all__ = [
    "METHODS",
    "ATLoss",
    "BAKELoss",
    "BANLoss",
    "BYOTLoss",
    "CRDLoss",
    "CSKDLoss",
    "Count",
    "DDGSDLoss",
    "DISTLoss",
    "DKDLoss",
    "DKSLoss",
    "Defaults",
    "FRSKDLoss",
    "FitNetLoss",
    "KDCLLoss",
    "KDLoss",
    "LabelSmoothingLoss",
    "MGDLoss",
    "MemoryBank",
    "Method",
    "MixSKDLoss",
    "NKDLoss",
    "NSTLoss",
    "OFDLoss",
    "OLSLoss",
    "PKTLoss",
    "PSKDLoss",
    "Positive",
    "RKDLoss",
    "Range",
    "ReviewKDLoss",
    "SADLoss",
    "SPLoss",
    "SRRLLoss",
    "Shapes",
    "Share",
    "SoftLabels",
    "Stages",
    "TaTLoss",
    "Temperature",
    "TfFDLoss",
    "TfKDLoss",
    "TfKDSelfLoss",
    "TfNKDLoss",
    "USKDLoss",
    "VIDLoss",
    "Value",
    "ViTKDLoss",
    "WSLDLoss",
    "Weight",
    "WeightedSum",
    "ZipfLSLoss",
    "bake_targets",
    "check_values",
    "kd_loss",
    "label_smoothing_loss",
    "nkd_loss",
    "uskd_loss",
    "uskd_targets",
    "zipf_ls_loss",
    "zipf_ls_targets",
]
