"""Recipes (YAML files with arguments of a run) and their reader."""
