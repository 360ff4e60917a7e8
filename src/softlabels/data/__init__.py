"""Data sources, augmentation, mixing and randomness."""

from softlabels.data.batch import Batch, DataInfo
from softlabels.data.mixup import MixupCutmix, mixup_extras
from softlabels.data.source import DataSource
from softlabels.data.sources.by_name import open_source

__all__ = ["Batch", "DataInfo", "DataSource", "MixupCutmix", "mixup_extras", "open_source"]
