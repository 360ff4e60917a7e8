"""Recipes: one YAML file for each row of a table."""
