"""Code that tuners of any method need and PEFT does not have; `tuner` and `baselines` share it."""
