"""Helpers that import no other part of the package."""
