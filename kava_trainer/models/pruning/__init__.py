"""Cutting a student out of its teacher: which blocks, neurons and heads it keeps, and what they make together."""
