"""The subcommands of `python -m kava_trainer`, one a file: `HELP`, `add_arguments(parser)` and `run(options)`."""
