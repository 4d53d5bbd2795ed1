"""Callbacks of `KavaTrainer`, one a file."""

ALWAYS_LOGGED_STEPS = (50, 100, 200)
"""Optimizer steps with a log line whatever `logging_steps` is: the summary holds CosSim at each of them."""
