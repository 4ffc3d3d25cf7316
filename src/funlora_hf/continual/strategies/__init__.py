"""The strategies, one file for each, and their registry."""
