"""The papers' networks for small images, registered with timm."""
