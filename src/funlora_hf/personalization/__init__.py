"""Continual personalization of text-to-image models: one concept after another, from a few images each."""
