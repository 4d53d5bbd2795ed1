"""A student's own answers in a run: written to a file, and read from one."""
