"""What can be trained class after class: one file a strategy, and their registry."""
