"""One class's adapter: on disk, in memory, and the base that it fits."""
