"""Every argument of a run, and each check of them that needs no model."""
