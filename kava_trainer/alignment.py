"""How well student and target agree, and what that is called."""

STATUSES = ((0.95, "Excellent"), (0.90, "Great"), (0.70, "Good"), (0.50, "Learning"))
"""Lower edges of CosSim, inclusive, from the best status down; below the last one it is `Adapting`."""


def alignment_status(cos_sim: float) -> str:
    """The status a CosSim is shown with: `Adapting`, `Learning`, `Good`, `Great` or `Excellent`."""
    return next((status for edge, status in STATUSES if cos_sim >= edge), "Adapting")
