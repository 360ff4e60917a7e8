"""The table of methods: a new method is its own file and one line here."""

from __future__ import annotations

from torch import nn

from softlabels.losses.at import ATLoss
from softlabels.losses.bake import BAKELoss
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
from softlabels.losses.kd import KDLoss
from softlabels.losses.kdcl import KDCLLoss
from softlabels.losses.mgd import MGDLoss
from softlabels.losses.mixskd import MixSKDLoss
from softlabels.losses.nkd import NKDLoss
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
from softlabels.losses.uskd import USKDLoss
from softlabels.losses.vid import VIDLoss
from softlabels.losses.vitkd import ViTKDLoss
from softlabels.losses.wsld import WSLDLoss
from softlabels.losses.zipf_ls import ZipfLSLoss

__all__ = ["METHODS"]

# With a teacher: its logits, then its features. Without: labels alone, then more work.
METHODS: dict[str, type[nn.Module]] = {
    "kd": KDLoss,
    "dkd": DKDLoss,
    "nkd": NKDLoss,
    "wsld": WSLDLoss,
    "dist": DISTLoss,
    "srrl": SRRLLoss,
    "fitnet": FitNetLoss,
    "at": ATLoss,
    "ofd": OFDLoss,
    "rkd": RKDLoss,
    "crd": CRDLoss,
    "reviewkd": ReviewKDLoss,
    "vid": VIDLoss,
    "sp": SPLoss,
    "pkt": PKTLoss,
    "nst": NSTLoss,
    "mgd": MGDLoss,
    "vitkd": ViTKDLoss,
    "tat": TaTLoss,
    "tf_kd": TfKDLoss,
    "tf_kd_self": TfKDSelfLoss,
    "tf_nkd": TfNKDLoss,
    "ols": OLSLoss,
    "uskd": USKDLoss,
    "zipf_ls": ZipfLSLoss,
    "ban": BANLoss,
    "cs_kd": CSKDLoss,
    "ps_kd": PSKDLoss,
    "ddgsd": DDGSDLoss,
    "byot": BYOTLoss,
    "dks": DKSLoss,
    "sad": SADLoss,
    "frskd": FRSKDLoss,
    "bake": BAKELoss,
    "mixskd": MixSKDLoss,
    "tf_fd": TfFDLoss,
    "kdcl": KDCLLoss,
}
