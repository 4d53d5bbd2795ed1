"""The quickstart's problems as a jsonl file, for tools that read no other form of them."""

import argparse
import json
import sys
from collections.abc import Sequence

from . import SPLIT_SIZES
from .problems import SPLITS, generate_problems


def main(argv: Sequence[str] | None = None) -> None:
    """Write problems, one JSON object with `question` and `answer` a line, to standard output.

    Args:
        argv: the command line; that of the process by default.
    """
    parser = argparse.ArgumentParser(prog="python -m kava_trainer.quickstart.export", description=__doc__)
    parser.add_argument("--split", choices=SPLITS, default="test", help="which problems; test are the held-out ones")
    parser.add_argument("--count", type=int, help="how many, from the first; all of the split by default")
    options = parser.parse_args(argv)
    size = SPLIT_SIZES[options.split]
    for problem in generate_problems(size, options.split)[: size if options.count is None else options.count]:
        sys.stdout.write(json.dumps(problem) + "\n")


if __name__ == "__main__":
    main()
