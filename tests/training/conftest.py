from shared.patterns import image_folder, source
from shared.run_folders import make_analysis, make_gallery, make_run

__all__ = ["image_folder", "make_analysis", "make_gallery", "make_run", "source"]
