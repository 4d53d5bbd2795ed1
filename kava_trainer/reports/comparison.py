"""One page that lays several runs side by side: results, arguments that differ, and curves over each other."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from .charts import compared_charts
from .page import drawn, render
from .run_reader import RunRecord
from .summary import Summary, write_text
from .tables import Figure, alignment_figures, cost_figures, evaluation_rows, verdict_of

_WHERE = {"output_dir", "final_dir", "logging_dir", "run_name", "resume_from_checkpoint"}
"""Arguments that differ between any two runs and say nothing."""


def run_names(folders: Sequence[Path]) -> list[str]:
    """A short name for each folder: its last part, and as many before it as tell it from the others."""
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def differing_arguments(summaries: Sequence[Summary]) -> list[tuple[str, list[str]]]:
    """The arguments that are not the same in all runs, with the value of each; `-` where a run does not tell."""
    asked = [summary.arguments for summary in summaries]
    names = dict.fromkeys(name for arguments in asked for name in arguments if name not in _WHERE)
    shown = [(name, [json.dumps(a[name], ensure_ascii=False) if name in a else "-" for a in asked]) for name in names]
    return [(name, values) for name, values in shown if len(set(values)) > 1]


def _results(summary: Summary) -> list[Figure]:
    """The figures of one run that are compared."""
    evaluated = [
        Figure(figure.place, f"{label}: {figure.label.lower()}", figure.value)
        for label, figures in evaluation_rows(summary)
        for figure in figures
    ]
    return alignment_figures(summary) + evaluated + cost_figures(summary)


def comparison_page(records: Sequence[RunRecord]) -> str:
    """The page that compares runs as HTML."""
    names = run_names([record.folder for record in records])
    columns = [_results(record.summary) for record in records]
    found = compared_charts({name: record.log_history for name, record in zip(names, records, strict=True)})
    return render(
        "comparison.html.j2",
        names=names,
        verdicts=[verdict_of(record) for record in records],
        notes=[(name, record.note) for name, record in zip(names, records, strict=True) if record.note],
        results=[row for row in zip(*columns, strict=True) if any(figure.value is not None for figure in row)],
        arguments=differing_arguments([record.summary for record in records]),
        charts=drawn(found),
    )


def is_comparison(text: str) -> bool:
    """Whether a file holds what `write_comparison` writes."""
    return "- KAVA comparison</title>" in text


def write_comparison(records: Sequence[RunRecord], path: Path) -> Path:
    """Write the page that compares runs. Raises `OSError` if it cannot be written."""
    write_text(path, comparison_page(records))
    return path
