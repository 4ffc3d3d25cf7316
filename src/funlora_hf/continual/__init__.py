"""The continual loop: trainer, phases, batches, checkpoints, run folder, stops.

The modules of three lines are former import paths of `base` and of modules in `strategies/`.
"""
