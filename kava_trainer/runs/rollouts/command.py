"""What `python -m kava_trainer rollouts` is given, and how it ends."""

import sys
from pathlib import Path

from ...config.parser import parse_arguments
from ...utils.errors import BadRequest, Interrupted, exit_code

_NOT_ASKED = ["--rollouts_from", "null", "--teacher_cache_dir", "null", "--on_policy_fraction", "0"]
"""What a run that reads the file may ask for, and has no part in writing it."""


def write_answers(argv: list[str]) -> int:
    """Let a student answer the prompts of the training data, and write its answers to a file.

    Args:
        argv: a JSON file of arguments as of a run, or the output folder of a finished run, whose finished student
            answers; the file to write, which must not be there yet; then `--name value` pairs.

    Returns:
        0 when the file is written; 130, 143 or 138 when Ctrl-C, SIGTERM or SIGUSR1 ended it.

    Raises:
        BadRequest, RunFailed: as `sample_rollouts`, and `BadRequest` as `parse_arguments`.
    """
    if len(argv) < 2 or any(word.startswith("-") for word in argv[:2]):
        raise BadRequest("The file to write is missing;", "write rollouts ARGS.json OUT.jsonl.")
    asked, path, given = Path(argv[0]), Path(argv[1]).expanduser(), [*argv[2:], *_NOT_ASKED]
    arguments, finished = None if asked.is_dir() else parse_arguments([argv[0], *given]), None
    from ..measure import read_finished_run  # which takes seconds, that no mistake in the arguments need wait for
    from .sample import sample_rollouts, sampling_of

    if arguments is None:
        finished = read_finished_run(asked)
        arguments = parse_arguments(given, sampling_of(finished))
    try:
        sample_rollouts(arguments, path, finished)
    except Interrupted as interruption:
        print("Interrupted before all prompts were answered, so nothing was written.", file=sys.stderr)
        return exit_code(interruption.number)
    return 0
