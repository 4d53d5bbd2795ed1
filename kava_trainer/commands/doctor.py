"""`doctor`: look at everything that a run needs, without training, and end with what to change."""

HELP = "check environment, models, data, memory and disk before a run, without training"
PASSES_ON = True
"""The words that follow are KAVA's own arguments, which `parsing.parse_arguments` reads."""

USAGE = "ARGS.json [--name value ...]"


def run(argv: list[str]) -> int:
    """Check a run before it is started.

    Args:
        argv: as for `train`.

    Returns:
        0 where the run could train, 2 where it would be refused.

    Raises:
        Interrupted: if a signal came.
    """
    from ..doctor import examine  # it takes seconds, which --help need not wait for

    return 0 if examine(argv) else 2
