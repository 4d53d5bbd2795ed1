"""`explain`: what each argument is for."""

import argparse
import os
import sys

HELP = "say of every argument what it does, its default and its unit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("name", nargs="*", metavar="NAME", help="an argument, or a part of the names of several")
    parser.add_argument("--markdown", action="store_true", help="print the text of docs/arguments.md")


def run(options: argparse.Namespace) -> int:
    """Print all arguments, those that are named, or the text of `docs/arguments.md`; always 0.

    Raises:
        BadRequest: for a name that no argument has, or has a part of.
    """
    from ..explaining import all_arguments, as_markdown, explain_in_full, find_arguments

    if options.markdown:
        text = as_markdown()
    else:
        text = explain_in_full(find_arguments(options.name) if options.name else all_arguments()) + "\n"
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:  # as by `head`; Python would complain once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
