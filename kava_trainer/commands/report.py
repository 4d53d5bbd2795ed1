"""Build `report.html` and `report.png` of finished, interrupted or killed runs anew, and compare several runs."""

import argparse
from pathlib import Path

HELP = "build the report of runs anew, and compare several"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folders, and where the comparison goes."""
    parser.add_argument("folders", nargs="+", metavar="OUTPUT_DIR", help="output_dir of a run")
    parser.add_argument(
        "--output",
        default="comparison.html",
        metavar="FILE",
        help="where the page that compares several runs is written (default: %(default)s in the current folder)",
    )


def run(options: argparse.Namespace) -> int:
    """Build the reports, and with several folders the comparison.

    Args:
        options: with `folders` and `output`.

    Raises:
        BadRequest: naming every folder that no report can be made of, before anything is written.
    """
    from ..comparison import is_comparison, write_comparison  # these take seconds, which --help need not wait for
    from ..disk import check_output_file
    from ..errors import BadRequest
    from ..report import write_report
    from ..run_folder import read_run

    folders = [Path(folder) for folder in options.folders]
    records, problems = [], []
    twice = sorted({str(folder) for folder in folders if [f.resolve() for f in folders].count(folder.resolve()) > 1})
    if twice:
        problems.append(f"{', '.join(twice)} is named more than once; name each run once.")
    for folder in dict.fromkeys(folders):
        try:
            records.append(read_run(folder))
        except BadRequest as error:
            problems.append(str(error))
    if len(folders) > 1:
        try:
            check_output_file(Path(options.output), is_comparison)
        except BadRequest as error:
            problems.append(str(error))
    if problems:
        raise BadRequest("\n".join(problems))
    try:
        for record in records:
            print(f"Report: {write_report(record)}")
        if len(records) > 1:
            print(f"Comparison: {write_comparison(records, Path(options.output)).resolve()}")
    except OSError as error:
        raise BadRequest(f"{error.filename or options.output} cannot be written: {error.strerror}.") from error
    return 0
