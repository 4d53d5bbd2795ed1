"""`train`: one distillation, as `run_kava.py` does it."""

HELP = "distil a student, as run_kava.py does"
PASSES_ON = True
"""The words that follow are KAVA's own arguments, which `parsing.parse_arguments` reads."""


def run(argv: list[str]) -> int:
    """Run one distillation.

    Args:
        argv: at most one JSON file, then `--name value` pairs, as for `run_kava.py`.

    Returns:
        0 when the run completed; 130, 143 or 138 when Ctrl-C, SIGTERM or SIGUSR1 ended it.

    Raises:
        BadRequest, RunFailed, Interrupted: as `pipeline.run`.
    """
    from ..parsing import parse_arguments

    arguments = parse_arguments(argv)
    from ..pipeline import run  # it takes seconds, which a mistake in the arguments need not wait for

    return run(arguments, argv)
