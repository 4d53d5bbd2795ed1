"""The table of the rooms in CONTRIBUTING.md: `python tests/helpers/house.py` writes it anew."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- rooms -->\n", "<!-- end of rooms -->\n"

FLOORS = [
    {"cli"},
    {"runs"},
    {"reports"},
    {"trainer"},
    {"evaluation"},
    {"distillation"},
    {"models", "data"},  # side by side: neither knows the other
    {"config"},
    {"quickstart"},
    {"utils"},
]
"""The rooms from the top floor down."""


def first_line(path: Path) -> str:
    """The first line of a file's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]


def files_of(folder: Path) -> str:
    """The files of a folder by their names, those of each folder within it behind its name."""
    names = [path.stem for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
    inner = [path for path in sorted(folder.iterdir()) if (path / "__init__.py").exists()]
    return ", ".join([*(f"`{name}`" for name in names), *(f"`{path.name}/` ({files_of(path)})" for path in inner)])


def table() -> str:
    """The rooms, what each holds by its own docstring, and its files."""
    package = ROOT / "kava_trainer"
    rows = ["| Room | Holds | Files |", "|---|---|---|"]
    for room in (room for floor in FLOORS for room in sorted(floor)):
        if room == "cli":
            rows.append(f"| `cli.py` | {first_line(package / 'cli.py')} | |")
        else:
            rows.append(f"| `{room}/` | {first_line(package / room / '__init__.py')} | {files_of(package / room)} |")
    return "\n".join(rows) + "\n"


def document(text: str) -> str:
    """The text of the document with the table as the code has it."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}{table()}{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    DOCUMENT.write_text(document(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
