"""Callbacks of `KavaTrainer`, one a file."""
