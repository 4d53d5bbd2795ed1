"""`push`: send the student of a run that was completed to the hub, with its model card, projector and summary."""

import argparse
import sys

HELP = "send a finished run to the hub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="output_dir of a run that was completed")
    parser.add_argument(
        "repo",
        metavar="REPO",
        help="owner/name on the hub, or name for one of your own; it is made where it is missing, else files of "
        "the same names are replaced in it",
    )
    parser.add_argument("--private", action="store_true", help="make it private")
    parser.add_argument("--revision", help="branch to send to, made where it is missing; the main one by default")
    parser.epilog = "The token is that of hf auth login or HF_TOKEN."


def run(options: argparse.Namespace) -> int:
    """Send a finished run.

    Args:
        options: `output_dir`, `repo`, `private` and `revision`.

    Returns:
        0 when it was sent, 130, 143 or 138 when Ctrl-C, SIGTERM or SIGUSR1 ended it.

    Raises:
        BadRequest: if there is no finished run, or the name cannot be that of a repository.
        RunFailed: if the hub did not take it; what is on disk is as it was.
    """
    from ..console import Console
    from ..errors import RunFailed
    from ..finished import completed_summary, find_student
    from ..hub import Place, push_command
    from ..publishing import make_repository, publish
    from ..signals import WATCH, Interrupted, exit_code

    summary = completed_summary(options.output_dir)
    student = find_student(options.output_dir, summary)
    place = Place(options.repo, private=options.private or None, revision=options.revision)
    console = Console()
    try:
        with WATCH:
            repository = make_repository(place, student, options.output_dir)
            place = repository.place
            if repository.was_there:
                console.print(f"{place.repo_id} is there already: files of the same names are replaced in it.")
            problem = publish(console, options.output_dir, student, summary, place)
    except Interrupted as interruption:
        print(f"Interrupted. Push again with: {push_command(options.output_dir, place)}", file=sys.stderr)
        return exit_code(interruption.number)
    if problem is not None:
        raise RunFailed(problem)
    console.print(f"Pushed to {place.repo_id}{' (private)' if place.private else ''}: {repository.url}")
    return 0
