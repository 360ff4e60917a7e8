"""Losses: tensors in, tensors out. They need torch alone, and know no model and no loop."""

from softlabels.losses._checks import check_values
from softlabels.losses._memory_bank import MemoryBank
from softlabels.losses._non_target import LossOutput, SoftLabels
from softlabels.losses._table import METHODS
from softlabels.losses.at import ATLoss, at_loss
from softlabels.losses.bake import BAKELoss, bake_loss, bake_targets
from softlabels.losses.ban import BANLoss, ban_loss
from softlabels.losses.byot import BYOTLoss, byot_loss
from softlabels.losses.crd import CRDLoss, crd_loss
from softlabels.losses.cs_kd import CSKDLoss, cs_kd_loss
from softlabels.losses.ddgsd import DDGSDLoss, ddgsd_loss
from softlabels.losses.dist import DISTLoss, dist_loss
from softlabels.losses.dkd import DKDLoss, dkd_loss
from softlabels.losses.dks import DKSLoss, dks_loss
from softlabels.losses.fitnet import FitNetLoss, fitnet_loss
from softlabels.losses.frskd import FRSKDLoss, frskd_loss
from softlabels.losses.kd import KDLoss, kd_loss
from softlabels.losses.kdcl import KDCLLoss, kdcl_loss
from softlabels.losses.label_smoothing import LabelSmoothingLoss, label_smoothing_loss
from softlabels.losses.mgd import MGDLoss, mgd_loss
from softlabels.losses.mixskd import MixSKDLoss, mixskd_loss
from softlabels.losses.nkd import NKDLoss, nkd_loss
from softlabels.losses.nst import NSTLoss, nst_loss
from softlabels.losses.ofd import OFDLoss, ofd_loss
from softlabels.losses.ols import OLSLoss, ols_loss
from softlabels.losses.pkt import PKTLoss, pkt_loss
from softlabels.losses.ps_kd import PSKDLoss, ps_kd_loss
from softlabels.losses.reviewkd import ReviewKDLoss, reviewkd_loss
from softlabels.losses.rkd import RKDLoss, rkd_loss
from softlabels.losses.sad import SADLoss, sad_loss
from softlabels.losses.sp import SPLoss, sp_loss
from softlabels.losses.srrl import SRRLLoss, srrl_loss
from softlabels.losses.tat import TaTLoss, tat_loss
from softlabels.losses.tf_fd import TfFDLoss, tf_fd_loss
from softlabels.losses.tf_kd import TfKDLoss, tf_kd_loss
from softlabels.losses.tf_kd_self import TfKDSelfLoss, tf_kd_self_loss
from softlabels.losses.tf_nkd import TfNKDLoss, tf_nkd_loss
from softlabels.losses.uskd import USKDLoss, uskd_loss, uskd_targets
from softlabels.losses.vid import VIDLoss, vid_loss
from softlabels.losses.vitkd import ViTKDLoss, vitkd_loss
from softlabels.losses.weighted_sum import WeightedSum
from softlabels.losses.wsld import WSLDLoss, wsld_loss
from softlabels.losses.zipf_ls import ZipfLSLoss, zipf_ls_loss, zipf_ls_targets

__all__ = [
    "METHODS",
    "ATLoss",
    "BAKELoss",
    "BANLoss",
    "BYOTLoss",
    "CRDLoss",
    "CSKDLoss",
    "DDGSDLoss",
    "DISTLoss",
    "DKDLoss",
    "DKSLoss",
    "FRSKDLoss",
    "FitNetLoss",
    "KDCLLoss",
    "KDLoss",
    "LabelSmoothingLoss",
    "LossOutput",
    "MGDLoss",
    "MemoryBank",
    "MixSKDLoss",
    "NKDLoss",
    "NSTLoss",
    "OFDLoss",
    "OLSLoss",
    "PKTLoss",
    "PSKDLoss",
    "RKDLoss",
    "ReviewKDLoss",
    "SADLoss",
    "SPLoss",
    "SRRLLoss",
    "SoftLabels",
    "TaTLoss",
    "TfFDLoss",
    "TfKDLoss",
    "TfKDSelfLoss",
    "TfNKDLoss",
    "USKDLoss",
    "VIDLoss",
    "ViTKDLoss",
    "WSLDLoss",
    "WeightedSum",
    "ZipfLSLoss",
    "at_loss",
    "bake_loss",
    "bake_targets",
    "ban_loss",
    "byot_loss",
    "check_values",
    "crd_loss",
    "cs_kd_loss",
    "ddgsd_loss",
    "dist_loss",
    "dkd_loss",
    "dks_loss",
    "fitnet_loss",
    "frskd_loss",
    "kd_loss",
    "kdcl_loss",
    "label_smoothing_loss",
    "mgd_loss",
    "mixskd_loss",
    "nkd_loss",
    "nst_loss",
    "ofd_loss",
    "ols_loss",
    "pkt_loss",
    "ps_kd_loss",
    "reviewkd_loss",
    "rkd_loss",
    "sad_loss",
    "sp_loss",
    "srrl_loss",
    "tat_loss",
    "tf_fd_loss",
    "tf_kd_loss",
    "tf_kd_self_loss",
    "tf_nkd_loss",
    "uskd_loss",
    "uskd_targets",
    "vid_loss",
    "vitkd_loss",
    "wsld_loss",
    "zipf_ls_loss",
    "zipf_ls_targets",
]
