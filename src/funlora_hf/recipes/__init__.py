"""Recipes, YAML that gives arguments of a run, and their reading."""
