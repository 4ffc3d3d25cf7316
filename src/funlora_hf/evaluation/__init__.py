"""What judges a run: classifier, accuracy matrix, held-out loss, figures."""
