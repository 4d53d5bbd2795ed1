"""Distil a teacher language model into a student: `accelerate launch run_kava.py ARGS.json [--name value ...]`."""

import logging
import sys

from kava_trainer.errors import BadRequest, RunFailed

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on import it warns of an optional kernel package


def main(argv: list[str] | None = None) -> int:
    """Run one distillation and return the exit code.

    Args:
        argv: the command line without the program; `sys.argv[1:]` by default.

    Returns:
        0 when the run completed, 1 when it failed, 2 for a bad request, 130 or 143 when Ctrl-C or SIGTERM ended it.
    """
    from kava_trainer.parsing import parse_arguments
    from kava_trainer.pipeline import run

    argv = sys.argv[1:] if argv is None else argv
    try:
        return run(parse_arguments(argv), argv)
    except (BadRequest, RunFailed) as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("Interrupted while no step was running, so there was nothing to save.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
