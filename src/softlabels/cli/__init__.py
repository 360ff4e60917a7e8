"""The command `softlabels`. Torch is imported by the commands that need it, not for help."""

from softlabels.cli.program import main

__all__ = ["main"]
