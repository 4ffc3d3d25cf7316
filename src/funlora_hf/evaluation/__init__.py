"""The evaluation of a run: accuracy matrix, image quality, zero forgetting, figures, report."""
