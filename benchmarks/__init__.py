"""Measurements behind the figures in README and docs; none of them is a test."""
