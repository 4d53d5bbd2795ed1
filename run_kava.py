"""Distil a teacher language model into a student: `accelerate launch run_kava.py ARGS.json [--name value ...]`."""

import logging
import sys

from kava_trainer.errors import BadRequest, RunFailed

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on import it warns of an optional kernel package

NOTHING_TO_SAVE = "Interrupted before the first step, so there was nothing to save. Start again with the same command."


def main(argv: list[str] | None = None) -> int:
    """Run one distillation and return the exit code.

    Args:
        argv: the command line without the program; `sys.argv[1:]` by default.

    Returns:
        0 when the run completed, 1 when it failed, 2 for a bad request, and 130, 143 or 138 when Ctrl-C, SIGTERM or
        SIGUSR1 ended it.
    """
    from kava_trainer.parsing import parse_arguments
    from kava_trainer.pipeline import run
    from kava_trainer.signals import Interrupted, exit_code

    argv = sys.argv[1:] if argv is None else argv
    try:
        return run(parse_arguments(argv), argv)
    except (BadRequest, RunFailed) as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    except Interrupted as interruption:
        print(NOTHING_TO_SAVE, file=sys.stderr)
        return exit_code(interruption.number)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # while the libraries are imported
        print(NOTHING_TO_SAVE, file=sys.stderr)
        sys.exit(130)
