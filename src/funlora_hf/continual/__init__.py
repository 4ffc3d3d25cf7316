"""The continual loop and the strategies that it can run."""
