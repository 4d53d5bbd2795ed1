"""What `explain` tells of every argument, as a table beside the code: to read it from the fields of the arguments takes
seconds, because those import torch and transformers.

The table knows what it was made of. Where that is not what is installed the fields are read all the same.
"""

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("arguments.json")
"""`python tests/helpers/argument_table.py` makes it."""

_SOURCES = ("arguments.py", "alignment/teacher_arguments.py", "model_arguments.py", "data_arguments.py", "help.py")


def fingerprint() -> str:
    """What the table depends on, as a checksum: the fields of KAVA's arguments, and the notes on them."""
    parts = [line for name in _SOURCES for line in _assigned((TABLE.parent / name).read_text(encoding="utf-8"))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _assigned(source: str) -> Iterator[str]:
    """The assignments of a file and of its classes as they stand there; what its functions do does not count."""
    body, lines = ast.parse(source).body, source.splitlines()
    nodes = [*body, *(node for kind in body if isinstance(kind, ast.ClassDef) for node in kind.body)]
    for node in nodes:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            yield from lines[node.lineno - 1 : node.end_lineno]


def table_text(rows: Iterable[dict[str, Any]]) -> str:
    """The text of the table that these rows make, a row a line."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    made_of = json.dumps({"transformers": version("transformers"), "fields": fingerprint()})
    return f'{{"made_of": {made_of}, "arguments": [\n{lines}\n]}}\n'


def read_table() -> list[dict[str, Any]] | None:
    """The rows of the table; None where it was made of something else than what is installed."""
    found = json.loads(TABLE.read_text(encoding="utf-8"))
    made_of = {"transformers": version("transformers"), "fields": fingerprint()}
    return found["arguments"] if found["made_of"] == made_of else None
