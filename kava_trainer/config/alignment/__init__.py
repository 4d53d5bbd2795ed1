"""What is aligned, by the arguments alone."""
