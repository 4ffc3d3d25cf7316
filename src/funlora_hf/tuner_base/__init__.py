"""What tuners for PEFT need that PEFT does not have, whatever their method: shared by `tuner` and `baselines`."""
