"""The tables of docs/performance.md, made from benchmarks/results/*.csv.

python benchmarks/performance.py
"""

import csv
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.tables import fill, markdown  # noqa: E402

RESULTS, DOCUMENT = ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md"
WAYS = {
    "a": "the usual loop", "b": "transformers' Trainer", "c": "as TRL and DistillKit do it", "d": "**KAVA**",
    "e": "**KAVA, cached teacher**", "f": "floor: the student's decoder alone", "g": "plain fine-tuning with Trainer",
}  # fmt: skip
PARTS = {
    "forward": "forward: teacher, student, projectors, losses", "backward": "backward", "optimizer": "optimizer",
    "outside": "everything else",
}  # fmt: skip
WRITING = {
    "one at a time": "transformers' `generate`, one prompt at a time", "8 together": "**KAVA**, 8 prompts at a time",
    "all together": "**KAVA**, all 32 at a time", "continuous": "transformers' continuous batching",
}  # fmt: skip


def read(name: str) -> list[dict[str, str]]:
    """The rows of one result."""
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def step_table(name: str) -> str:
    """What a step costs in each way, at one size with one set of terms."""
    header = ["Way", "examples/s", "tokens/s", "x usual", "x floor", "of the limit", "peak GB"]
    lines = []
    for row in read(name):
        share = f"{100 * float(row['fraction_of_limit']):.0f} %" if row["fraction_of_limit"] else ""
        figures = [f"{float(row['examples_per_second']):.3g}", f"{float(row['tokens_per_second']):.4g}"]
        ratios = [f"{float(row[ratio]):.2f}" for ratio in ("ratio_to_usual", "ratio_to_floor")]
        lines.append([WAYS[row["way"]], *figures, *ratios, share, f"{int(row['peak_memory_bytes']) / 1e9:.2f}"])
    return markdown(header, lines)


def loop_table(name: str) -> str:
    """Where the time of the quickstart's training loop goes."""
    rows = [[PARTS[row["part"]], row["seconds"], f"{100 * float(row['share']):.1f} %"] for row in read(name)]
    return markdown(["Part", "seconds", "share"], rows)


def writing_table(name: str) -> str:
    """What writing the student's answers takes in each way: all of one length, and as they end."""
    parts = {part: {row["way"]: row for row in read(name) if row["part"] == part} for part in ("full", "ending")}
    lines = []
    for way, label in WRITING.items():
        figures = [
            [row["tokens"], f"{float(row['tokens_per_second']):,.0f}", f"{float(row['ratio']):.1f}"]
            for row in (parts["full"][way], parts["ending"][way])
        ]
        lines.append([label, *figures[0], *figures[1]])
    columns = ["tokens", "tokens/s", "x one at a time"]
    return markdown(["Way", *columns, *(f"{column}, as they end" for column in columns)], lines)


def own_answers_table(name: str) -> str:
    """What a step costs in which the student answers some of the prompts itself."""
    lines = []
    for row in (row for row in read(name) if row["part"] == "step"):
        fraction, every = row["way"].split(", every ")
        figures = [f"{1000 * float(row['seconds']):.0f}", f"{float(row['ratio']):.2f}"]
        lines.append([fraction, every, *figures, f"{100 * float(row['generation_share']):.0f} %"])
    columns = ["`rollouts_every`", "ms a step", "x a step without", "share of the generation"]
    return markdown(["`on_policy_fraction`", *columns], lines)


def streaming_table(name: str) -> str:
    """What a stream takes while examples go by, or what the index of a teacher cache takes."""
    names = {
        "examples": ("Examples", "{:,.0f}"),
        "seconds": ("seconds", "{:.4g}"),
        "cpu_seconds": ("CPU seconds", "{:.2f}"),
        "resident_mb": ("resident MB", "{:.0f}"),
        "seconds_to_resume": ("seconds to resume there", "{:.1f}"),
        "index_mb": ("index, MB", "{:.1f}"),
        "grown_mb": ("growth of the process, MB", "{:.0f}"),
    }
    rows = read(name)
    lines = [[names[column][1].format(float(value)) for column, value in row.items()] for row in rows]
    return markdown([names[column][0] for column in rows[0]], lines)


def document(text: str) -> str:
    """The document with the table of every result made anew."""
    for kind, table in (("step", step_table), ("loop", loop_table), ("streaming", streaming_table)):
        for path in sorted(RESULTS.glob(f"{kind}-*.csv")):
            text = fill(text, path.stem, table(path.stem))
    for path in sorted(RESULTS.glob("rollouts-*.csv")):
        text = fill(text, f"{path.stem}-writing", writing_table(path.stem))
        text = fill(text, f"{path.stem}-step", own_answers_table(path.stem))
    return text


def main() -> None:
    """Rewrite the document."""
    DOCUMENT.write_text(document(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
