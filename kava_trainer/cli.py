"""`python -m kava_trainer COMMAND ...`: the subcommands, and how each of them ends.

What a command works with is imported when it runs: it takes seconds, which neither `--help` nor a mistake in the
arguments need wait for.
"""

import argparse
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from . import __version__
from .utils.before_imports import let_threads_sleep
from .utils.console import outlive_readers, tell_loading
from .utils.errors import BadRequest, Interrupted, RunFailed, exit_code
from .utils.redaction import without_secrets

NOTHING_TO_SAVE = "Interrupted before the first step, so there was nothing to save. Start again with the same command."

_ARGUMENTS = "ARGS.json [--name value ...]"
_FIGURES = "(ARGS.json | OUTPUT_DIR) [--output FILE.json] [--name value ...]"
_ROLLOUTS = "(ARGS.json | OUTPUT_DIR) OUT.jsonl [--name value ...]"
_ALL_ARGUMENTS = "The arguments are those of a run: see python -m kava_trainer train --help."


def doctor(argv: list[str]) -> int:
    """Look at everything that a run needs, without training, and end with what to change.

    Args:
        argv: as for `train`.

    Returns:
        0 where the run could train, 2 where it would be refused.

    Raises:
        Interrupted: if a signal came.
    """
    tell_loading()
    from .runs.doctor.doctor import examine

    return 0 if examine(argv) else 2


def train(argv: list[str]) -> int:
    """Run one distillation, as `run_kava.py` does it.

    Args:
        argv: at most one JSON file, then `--name value` pairs, as for `run_kava.py`.

    Returns:
        0 when the run completed; 130, 143 or 138 when Ctrl-C, SIGTERM or SIGUSR1 ended it.

    Raises:
        BadRequest, RunFailed, Interrupted: as `pipeline.run`.
    """
    if {"-h", "--help"} & {*argv}:
        from .config.help import short_help
        from .config.launcher import program

        print(short_help(program()), end="")
        sys.exit(0)
    tell_loading()
    from .config.parser import parse_arguments

    arguments = parse_arguments(argv)
    from .runs.pipeline import run

    return run(arguments, argv)


def cache(argv: list[str]) -> int:
    """Let the teacher read all examples of a run once and write its states to teacher_cache_dir.

    Args:
        argv: as for `train`; `teacher_cache_dir` must be among the arguments.

    Returns:
        0 when all examples are in the cache; 130, 143 or 138 when Ctrl-C, SIGTERM or SIGUSR1 ended it.

    Raises:
        BadRequest, RunFailed: as `measure.fill_cache`.
    """
    tell_loading()
    from .config.parser import parse_arguments

    arguments = parse_arguments(argv)
    from .runs.measure import fill_cache

    try:
        fill_cache(arguments)
    except Interrupted as interruption:
        print("Interrupted. What has been written is whole; the same command goes on from there.", file=sys.stderr)
        return exit_code(interruption.number)
    return 0


def rollouts(argv: list[str]) -> int:
    """Let the student answer the prompts of the training data, and write its answers to a file for rollouts_from.

    With the folder of a finished run in place of the JSON file: its finished student, its data. Rows need no answers.

    Args:
        argv: a JSON file of arguments or the folder of a finished run, the file to write, then `--name value` pairs.

    Raises:
        BadRequest, RunFailed: as `command.write_answers`.
    """
    tell_loading()
    from .runs.rollouts.command import write_answers

    return write_answers(argv)


def evaluate(argv: list[str]) -> int:
    """Measure teacher and student on the held-out examples, without training.

    With the folder of a finished run in place of the JSON file: its teacher, its finished student, its data.

    Args:
        argv: as for `train`, with the output folder of a finished run in place of the JSON file if so wished, and
            with `--output` and the name of a JSON file for the figures.

    Returns:
        0, or 130, 143 or 138 when Ctrl-C, SIGTERM or SIGUSR1 ended it.

    Raises:
        BadRequest, RunFailed: as `measure.measure_models`.
    """
    tell_loading()
    from .config.parser import parse_arguments

    own = argparse.ArgumentParser(prog="python -m kava_trainer evaluate", add_help=False, allow_abbrev=False)
    own.add_argument("--output", type=Path)  # whole words only, so that --output_dir is left alone
    options, argv = own.parse_known_args(argv)
    folder = Path(argv[0]) if argv and not argv[0].startswith("-") and Path(argv[0]).is_dir() else None
    if folder is None:
        arguments, finished = parse_arguments(argv), None
    from .runs.measure import are_figures, measure_models, read_finished_run, write_figures
    from .utils.files import check_output_file

    if options.output is not None:
        check_output_file(options.output, are_figures)
    if folder is not None:
        finished = read_finished_run(folder)
        arguments = parse_arguments(argv[1:], finished.arguments)
    try:
        evaluation = measure_models(arguments, finished)
    except Interrupted as interruption:
        print("Interrupted before everything was measured.", file=sys.stderr)
        return exit_code(interruption.number)
    if options.output is not None:
        write_figures(options.output, arguments, evaluation, finished)
    return 0


def report(options: argparse.Namespace) -> int:
    """Build `report.html` and `report.png` of finished, interrupted or killed runs anew, and compare several runs.

    Args:
        options: with `folders` and `output`.

    Raises:
        BadRequest: naming every folder that no report can be made of, before anything is written.
    """
    from .reports.run_reader import read_runs

    records, problems = read_runs([Path(folder) for folder in options.folders])
    if len(options.folders) > 1:
        from .reports.comparison import is_comparison, write_comparison
        from .utils.files import check_output_file

        try:
            check_output_file(Path(options.output), is_comparison)
        except BadRequest as error:
            problems += error.problems
    if problems:
        raise BadRequest.of(*problems)
    from .reports.page import write_report

    try:
        for record in records:
            print(f"Report: {write_report(record)}")
        if len(records) > 1:
            print(f"Comparison: {write_comparison(records, Path(options.output)).resolve()}")
    except OSError as error:
        raise BadRequest(f"{error.filename or options.output} cannot be written: {error.strerror}.") from error
    return 0


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", metavar="OUTPUT_DIR", help="output_dir of a run")
    told = "where the page that compares several runs is written (default: %(default)s in the current folder)"
    parser.add_argument("--output", default="comparison.html", metavar="FILE", help=told)


def push(options: argparse.Namespace) -> int:
    """Send the student of a run that was completed to the hub, with its model card, projector and summary.

    Args:
        options: `output_dir`, `repo`, `private` and `revision`.

    Returns:
        0 when it was sent, 130, 143 or 138 when Ctrl-C, SIGTERM or SIGUSR1 ended it.

    Raises:
        BadRequest: if there is no finished run, or the name cannot be that of a repository.
        RunFailed: if the hub did not take it; what is on disk is as it was.
    """
    from .reports.run_reader import completed_summary, find_student

    summary = completed_summary(options.output_dir)
    student = find_student(options.output_dir, summary)
    from .reports.publish import push_run
    from .utils.hub import Place

    place = Place(options.repo, private=options.private or None, revision=options.revision)
    return push_run(options.output_dir, student, summary, place)


def _add_push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="output_dir of a run that was completed")
    told = "owner/name on the hub, or name for one of your own; it is made where it is missing, else files of the same "
    parser.add_argument("repo", metavar="REPO", help=f"{told}names are replaced in it")
    parser.add_argument("--private", action="store_true", help="make it private")
    parser.add_argument("--revision", help="branch to send to, made where it is missing; the main one by default")
    parser.epilog = "The token is that of hf auth login or HF_TOKEN."


def explain(options: argparse.Namespace) -> int:
    """Say what each argument is for: all of them, those that are named, or the text of `docs/arguments.md`.

    Raises:
        BadRequest: for a name that no argument has, or has a part of.
    """
    from .config.help import all_arguments, as_markdown, explain_in_full, find_arguments

    if options.markdown:
        text = as_markdown()
    else:
        text = explain_in_full(find_arguments(options.name) if options.name else all_arguments()) + "\n"
    print(text, end="")
    return 0


def _add_explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="*", metavar="NAME", help="an argument, or a part of the names of several")
    parser.add_argument("--markdown", action="store_true", help="print the text of docs/arguments.md")


@dataclass(frozen=True)
class _Command:
    """What the command line knows of a subcommand. One without a parser of its own gets the words that follow as they
    are, and one without a usage also `--help`."""

    run: Callable[..., int]
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None
    usage: str | None = None


COMMANDS = {
    "doctor": _Command(
        doctor, "check environment, models, data, memory and disk before a run, without training", usage=_ARGUMENTS
    ),
    "train": _Command(train, "distil a student, as run_kava.py does"),
    "cache": _Command(cache, "fill the teacher cache that a later run reads, and stop", usage=_ARGUMENTS),
    "evaluate": _Command(evaluate, "measure teacher and student on the held-out examples", usage=_FIGURES),
    "rollouts": _Command(rollouts, "write a student's own answers to a file, for rollouts_from", usage=_ROLLOUTS),
    "report": _Command(report, "build the report of runs anew, and compare several", _add_report),
    "push": _Command(push, "send a finished run to the hub", _add_push),
    "explain": _Command(explain, "say of every argument what it does, its default and its unit", _add_explain),
}
"""In the order of `--help`."""


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
    outlive_readers()
    let_threads_sleep()
    try:
        code = main()
    except KeyboardInterrupt:  # while the libraries are imported
        print(NOTHING_TO_SAVE, file=sys.stderr)
        code = 130
    # To import it takes seconds, and where nobody has, there are no ranks. In a run that failed the others may wait for
    # this one in the middle of a gradient, and Gloo would wait with them.
    ranks = sys.modules.get(f"{__package__}.utils.distributed")
    if ranks is not None and code != 1:
        ranks.disconnect()
    sys.exit(code)


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand and return its exit code.

    Args:
        argv: the command line without the program; `sys.argv[1:]` by default.
    """
    argv = (sys.argv[1:] if argv is None else argv) or ["--help"]
    command = COMMANDS.get(argv[0])
    asks_for_help = command is not None and command.usage is not None and bool({"-h", "--help"} & {*argv})
    if command is not None and command.add_arguments is None and not asks_for_help:
        return exit_code_of(lambda: command.run(argv[1:]))
    options = _parser().parse_args(argv)
    return exit_code_of(lambda: COMMANDS[options.command].run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kava_trainer", description="Distil a language model.")
    parser.add_argument("--version", action="version", version=f"kava-trainer {__version__}")
    parts = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        told = (command.run.__doc__ or "").split("\n\n    Args:")[0].split("\n\n    Raises:")[0]
        part = parts.add_parser(name, help=command.help, description=told)
        if command.usage is not None:
            part.usage, part.epilog = f"{parser.prog} {name} {command.usage}", _ALL_ARGUMENTS
        if command.add_arguments is not None:
            command.add_arguments(part)
    return parser
