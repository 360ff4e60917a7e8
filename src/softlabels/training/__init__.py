"""The trainer: from a configuration to a folder with everything in it. Needs softlabels[train]."""

from softlabels.training.config import Config, ConfigError
from softlabels.training.trainer import TrainResult, run, train

__all__ = ["Config", "ConfigError", "TrainResult", "run", "train"]
