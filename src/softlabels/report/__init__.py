"""The HTML page of a run, or of a comparison of runs. It reads run folders and nothing else."""

from softlabels.report.page import write_report

__all__ = ["write_report"]
