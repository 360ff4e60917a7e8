from shared.patterns import image_folder, source

__all__ = ["image_folder", "source"]
