"""`evaluate`: measure teacher and student on the held-out examples, without training.

With the folder of a finished run in place of the JSON file: its teacher, its finished student, its data.
"""

import argparse
import sys
from pathlib import Path

from ..errors import Interrupted, exit_code

HELP = "measure teacher and student on the held-out examples"
PASSES_ON = True
"""But for `--output` the words that follow are KAVA's own arguments."""

USAGE = "(ARGS.json | OUTPUT_DIR) [--output FILE.json] [--name value ...]"


def run(argv: list[str]) -> int:
    """Measure teacher and student, print the figures of both, and write them where `--output` says.

    Args:
        argv: as for `train`, with the output folder of a finished run in place of the JSON file if so wished, and
            with `--output` and the name of a JSON file for the figures.

    Returns:
        0, or 130, 143 or 138 when Ctrl-C, SIGTERM or SIGUSR1 ended it.

    Raises:
        BadRequest, RunFailed: as `untrained.measure_models`.
    """
    from ..parsing import parse_arguments

    options, argv = _own_options().parse_known_args(argv)
    folder = Path(argv[0]) if argv and not argv[0].startswith("-") and Path(argv[0]).is_dir() else None
    arguments = None if folder else parse_arguments(argv)
    from ..disk import check_output_file
    from ..untrained import are_figures, measure_models, read_finished_run, write_figures

    if options.output is not None:
        check_output_file(options.output, are_figures)
    finished = read_finished_run(folder) if folder else None
    if finished is not None:
        arguments = parse_arguments(argv[1:], finished.arguments)
    try:
        evaluation = measure_models(arguments, finished)
    except Interrupted as interruption:
        print("Interrupted before everything was measured.", file=sys.stderr)
        return exit_code(interruption.number)
    if options.output is not None:
        write_figures(options.output, arguments, evaluation, finished)
    return 0


def _own_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kava_trainer evaluate", add_help=False, allow_abbrev=False)
    parser.add_argument("--output", type=Path)  # whole words only, so that --output_dir is left alone
    return parser
