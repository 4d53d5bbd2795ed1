"""`python -m kava_trainer COMMAND ...`: the subcommands, and how each of them ends."""

import argparse
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from types import ModuleType, TracebackType
from typing import NoReturn

from . import __version__
from .errors import BadRequest, Interrupted, RunFailed, exit_code
from .redaction import without_secrets

COMMANDS = ("doctor", "train", "cache", "evaluate", "report", "push", "explain")
"""In the order of `--help`; each is a module of `commands`."""

NOTHING_TO_SAVE = "Interrupted before the first step, so there was nothing to save. Start again with the same command."


_ALL_ARGUMENTS = "The arguments are those of a run: see python -m kava_trainer train --help."


def exit_code_of(work: Callable[[], int]) -> int:
    """Do the work of a command and return its exit code; what went wrong is told in plain sentences.

    Returns:
        What `work` returns, 1 where a run failed, 2 for a bad request, and 130, 143 or 138 when Ctrl-C, SIGTERM or
        SIGUSR1 ended it before there was anything to save.
    """
    try:
        return work()
    except (BadRequest, RunFailed) as error:
        print(f"Error: {without_secrets(str(error))}", file=sys.stderr)
        return error.exit_code
    except Interrupted as interruption:
        print(NOTHING_TO_SAVE, file=sys.stderr)
        return exit_code(interruption.number)


def show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an exception that nothing expected as Python does, without secrets."""
    print(without_secrets("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def exit_with(main: Callable[[], int]) -> NoReturn:
    """Run a program and exit the process with the code that it returns.

    Args:
        main: the program; an exception that it does not expect is shown without secrets.
    """
    sys.excepthook = show_traceback
    try:
        code = main()
    except KeyboardInterrupt:  # while the libraries are imported
        print(NOTHING_TO_SAVE, file=sys.stderr)
        code = 130
    # To import it takes seconds, and where nobody has, there are no ranks. In a run that failed the others may wait for
    # this one in the middle of a gradient, and Gloo would wait with them.
    ranks = sys.modules.get(f"{__package__}.ranks")
    if ranks is not None and code != 1:
        ranks.disconnect()
    sys.exit(code)


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand and return its exit code.

    Args:
        argv: the command line without the program; `sys.argv[1:]` by default.
    """
    argv = (sys.argv[1:] if argv is None else argv) or ["--help"]
    commands = {name: import_module(f".commands.{name}", __package__) for name in COMMANDS}
    command = commands.get(argv[0])
    if getattr(command, "PASSES_ON", False) and not (hasattr(command, "USAGE") and {"-h", "--help"} & {*argv}):
        return exit_code_of(lambda: command.run(argv[1:]))
    options = _parser(commands).parse_args(argv)
    return exit_code_of(lambda: commands[options.command].run(options))


def _parser(commands: dict[str, ModuleType]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kava_trainer", description="Distil a language model.")
    parser.add_argument("--version", action="version", version=f"kava-trainer {__version__}")
    parts = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in commands.items():
        part = parts.add_parser(name, help=command.HELP, description=command.__doc__)
        if hasattr(command, "USAGE"):
            part.usage, part.epilog = f"{parser.prog} {name} {command.USAGE}", _ALL_ARGUMENTS
        if hasattr(command, "add_arguments"):
            command.add_arguments(part)
    return parser
