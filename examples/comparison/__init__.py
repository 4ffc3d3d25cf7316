"""Several strategies on the same tasks and seeds: which runs that takes, running them, and showing what they came to."""
