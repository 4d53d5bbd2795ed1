"""The tables of docs/numbers.md, made from benchmarks/results/bf16-*.csv.

python benchmarks/bf16_table.py
"""

import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.performance import RESULTS, read  # noqa: E402
from benchmarks.tables import fill, markdown  # noqa: E402

DOCUMENT = ROOT / "docs" / "numbers.md"
CHOSEN = "bf16, 8-bit states, rounded at random"
SHOWN = {
    "changed": ("changed a step", lambda x: f"{100 * x:.1f} %"),
    "progress": ("progress", lambda x: f"{x:.3f}"),
    "distance": ("distance", lambda x: f"{x:.3f}"),
    "cross_entropy": ("cross-entropy", lambda x: f"{x:.3f}"),
    "cos_sim": ("CosSim", lambda x: f"{x:.4f}"),
    "bytes_per_parameter": ("bytes a weight", lambda x: f"{x:.2f}"),
}


def _cell(values: list[float], shown: str) -> str:
    """Mean over the seeds, for qualities with their range."""
    form = SHOWN[shown][1]
    mean, ends = form(statistics.mean(values)), (form(min(values)), form(max(values)))
    ranged = shown in ("progress", "distance", "cross_entropy") and ends[0] != ends[1]
    return f"{mean} ({ends[0]} to {ends[1]})" if ranged else mean


def case_table(rows: list[dict[str, str]]) -> str:
    """The ways of one case in the order they were measured, each the mean over its seeds."""
    lines = []
    for way in dict.fromkeys(row["way"] for row in rows):
        own = [row for row in rows if row["way"] == way]
        cells = [_cell([float(row[name]) for row in own], name) for name in SHOWN]
        lines.append([f"**{way}**" if way == CHOSEN else way, *cells])
    return markdown(["Way", *(title for title, _ in SHOWN.values())], lines)


def document(text: str) -> str:
    """The document with the table of every case made anew."""
    for path in sorted(RESULTS.glob("bf16-*.csv")):
        text = fill(text, path.stem, case_table(read(path.stem)))
    return text


def main() -> None:
    """Rewrite the document."""
    DOCUMENT.write_text(document(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
