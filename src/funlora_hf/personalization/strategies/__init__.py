"""One file for each way to learn one concept after another."""
