"""Writes the table that `explain` reads: `python tests/helpers/argument_table.py`."""

import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kava_trainer.config.argument_table import TABLE, table_text
from kava_trainer.config.help import read_fields


def table():
    """The text of the table that the code makes."""
    return table_text(asdict(argument) for argument in read_fields())


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
