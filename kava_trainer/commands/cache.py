"""`cache`: the teacher reads all examples of a run once and writes its states to teacher_cache_dir."""

import sys

from ..errors import Interrupted, exit_code

HELP = "fill the teacher cache that a later run reads, and stop"
PASSES_ON = True
"""The words that follow are KAVA's own arguments, which `parsing.parse_arguments` reads."""

USAGE = "ARGS.json [--name value ...]"


def run(argv: list[str]) -> int:
    """Fill the teacher cache of a run.

    Args:
        argv: as for `train`; `teacher_cache_dir` must be among the arguments.

    Returns:
        0 when all examples are in the cache; 130, 143 or 138 when Ctrl-C, SIGTERM or SIGUSR1 ended it.

    Raises:
        BadRequest, RunFailed: as `untrained.fill_cache`.
    """
    from ..parsing import parse_arguments

    arguments = parse_arguments(argv)
    from ..untrained import fill_cache  # it takes seconds, which a mistake in the arguments need not wait for

    try:
        fill_cache(arguments)
    except Interrupted as interruption:
        print("Interrupted. What has been written is whole; the same command goes on from there.", file=sys.stderr)
        return exit_code(interruption.number)
    return 0
