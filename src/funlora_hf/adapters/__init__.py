"""The adapter of a class: on disk, in memory, and the base that it fits."""
