"""Distil a teacher language model into a student: `accelerate launch run_kava.py ARGS.json [--name value ...]`."""

import logging
import sys
import traceback
from types import TracebackType

from kava_trainer.errors import BadRequest, RunFailed
from kava_trainer.redaction import without_secrets

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
    from kava_trainer.signals import Interrupted, exit_code

    argv = sys.argv[1:] if argv is None else argv
    try:
        arguments = parse_arguments(argv)
        from kava_trainer.pipeline import run  # it takes seconds, which a mistake in the arguments need not wait for

        return run(arguments, argv)
    except (BadRequest, RunFailed) as error:
        print(f"Error: {without_secrets(str(error))}", file=sys.stderr)
        return error.exit_code
    except Interrupted as interruption:
        print(NOTHING_TO_SAVE, file=sys.stderr)
        return exit_code(interruption.number)


def show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an exception that nothing expected as Python does, without secrets."""
    print(without_secrets("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


if __name__ == "__main__":
    sys.excepthook = show_traceback
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # while the libraries are imported
        print(NOTHING_TO_SAVE, file=sys.stderr)
        sys.exit(130)
