"""One run, from a configuration to a trained network. Needs softlabels[train]."""

from softlabels.training.config import Config, ConfigError
from softlabels.training.observers import Observer
from softlabels.training.trainer import TrainResult, run

__all__ = ["Config", "ConfigError", "Observer", "TrainResult", "run"]
