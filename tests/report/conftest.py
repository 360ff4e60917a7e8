from shared.run_folders import make_analysis, make_gallery, make_run

__all__ = ["make_analysis", "make_gallery", "make_run"]
