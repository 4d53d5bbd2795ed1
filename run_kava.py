"""Distil a teacher language model into a student: `accelerate launch run_kava.py ARGS.json [--name value ...]`."""

import sys

from kava_trainer.cli import exit_code_of, exit_with, train


def main(argv: list[str] | None = None) -> int:
    """Run one distillation and return the exit code.

    Args:
        argv: the command line without the program; `sys.argv[1:]` by default.

    Returns:
        0 when the run completed, 1 when it failed, 2 for a bad request, and 130, 143 or 138 when Ctrl-C, SIGTERM or
        SIGUSR1 ended it.
    """
    argv = sys.argv[1:] if argv is None else argv
    return exit_code_of(lambda: train(argv))


if __name__ == "__main__":
    exit_with(main)
