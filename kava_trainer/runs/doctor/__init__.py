"""The checks of `doctor`, by what they look at; they ask the functions that a run asks."""
