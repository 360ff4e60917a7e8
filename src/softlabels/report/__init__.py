"""HTML pages of runs and of comparisons. They read run folders and nothing else."""

from softlabels.report.page import Variant, write_comparison, write_report

__all__ = ["Variant", "write_comparison", "write_report"]
