"""One page that lays several runs side by side: results, arguments that differ, and curves over each other."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .charts import compared_charts
from .findings.language import TIE
from .findings.rows import course_figures
from .page import drawn, render
from .run_reader import RunRecord
from .summary import Summary, write_text
from .tables import (
    Figure,
    best_of,
    cost_figures,
    difference_text,
    evaluation_rows,
    figure_at,
    final_figures,
    step_figures,
    verdict_of,
)

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


def _results(summary: Summary) -> list[list[Figure]]:
    """The figures of one run that are compared, in groups."""
    evaluated = [
        Figure(figure.place, f"{label}: {figure.label.lower()}", figure.value)
        for label, figures in evaluation_rows(summary)
        for figure in figures
    ]
    return [final_figures(summary), course_figures(summary), step_figures(summary), evaluated, cost_figures(summary)]


def compared_rows(summaries: Sequence[Summary]) -> list[list[Figure]]:
    """One row for each figure that any of the runs has measured, with that of each run; the runs need not name the
    same steps."""
    rows = []
    for groups in zip(*map(_results, summaries), strict=True):
        columns = [{figure.place: figure for figure in group} for group in groups]
        labels = {place: figure.label for column in columns for place, figure in column.items()}
        for place in sorted(labels, key=_step_of):
            rows.append([column.get(place, Figure(place, labels[place], None)) for column in columns])
    return [row for row in rows if any(figure.value is not None for figure in row)]


def _step_of(place: str) -> int:
    """The step that a place in the summary is of; 0 for all others, whose order stays."""
    group, _, step = place.rpartition(".")
    return int(step) if group == "cos_sim_at" and step.isdigit() else 0


@dataclass(frozen=True)
class Cell:
    """A figure of one run in the table."""

    figure: Figure
    difference: str
    """From the first run; empty for that one."""
    best: bool


_OF_A_TOKEN = ("loss", "cross_entropy", "perplexity")
"""Ends of the names of figures that are means over tokens, and of no use beside those of other tokens."""


def read_other_tokens(summaries: Sequence[Summary]) -> bool:
    """Whether the students of some runs read the same held-out answers in other tokens than those of others.

    That is told by how many these are; a run that does not tell is taken for one of the same tokens.
    """
    return len({one.held_out_tokens for one in summaries if one.held_out_tokens is not None}) > 1


def _cells(row: Sequence[Figure], other_tokens: bool = False) -> list[Cell]:
    if other_tokens and row[0].name.endswith(_OF_A_TOKEN):
        return [Cell(figure, "", False) for figure in row]
    best = best_of(row)
    return [Cell(figure, difference_text(figure, row[0]) if n else "", n == best) for n, figure in enumerate(row)]


_MEASURED_ON = ("dataset_name", "dataset_config_name", "dataset_test_split", "max_eval_samples", "max_length")
"""Arguments that say on what a student was measured."""


def better_run(summaries: Sequence[Summary]) -> tuple[int | None, str]:
    """Which run has the better student, by the cross-entropy of its answers, and a sentence on that.

    Returns:
        Its number, or None where there is none, and why.
    """
    figures = [
        Figure(
            "evaluation.student_after.cross_entropy", "", getattr(one.evaluation.student_after, "cross_entropy", None)
        )
        for one in summaries
    ]
    if sum(figure.value is not None for figure in figures) < 2:
        return None, "No run is marked as the better one: the finished student was measured in fewer than two."
    asked = [tuple(str(one.arguments.get(name)) for name in _MEASURED_ON) for one in summaries]
    if len({*zip(asked, [one.held_out_examples for one in summaries], strict=True)}) > 1:
        return None, "No run is marked as the better one: their students were measured on different data."
    if read_other_tokens(summaries):
        told = "their students read the answers in other tokens, and cross-entropies are those of a token"
        return None, f"No run is marked as the better one: {told}."
    best = best_of(figures)
    if best is None:
        return None, f"No run is marked as the better one: cross-entropies within {100 * TIE:.0f} % count as equal."
    if summaries[best].verdict.collapsed:
        return (
            None,
            "No run is marked as the better one: the alignment of that with the lowest cross-entropy collapsed.",
        )
    others = " Another run kept more of the teacher's language." if _keeps_more(summaries, best) else ""
    return best, f"The better run has the lowest cross-entropy on the held-out answers.{others}"


def _keeps_more(summaries: Sequence[Summary], best: int) -> bool:
    """Whether another run's student has more of the teacher's language than that of the best one, on the same text."""
    place = "evaluation.student_after.retention_cross_entropy"
    alike = [one.retention == summaries[best].retention for one in summaries]
    figures = [
        Figure(place, "", figure_at(one, place) if same else None) for one, same in zip(summaries, alike, strict=True)
    ]
    return best_of(figures) not in (None, best)


def comparison_page(records: Sequence[RunRecord]) -> str:
    """The page that compares runs as HTML."""
    names, summaries = run_names([record.folder for record in records]), [record.summary for record in records]
    found = compared_charts({name: record.log_history for name, record in zip(names, records, strict=True)})
    better, told = better_run(summaries)
    return render(
        "comparison.html.j2",
        names=names,
        verdicts=[verdict_of(record) for record in records],
        notes=[(name, record.note) for name, record in zip(names, records, strict=True) if record.note],
        better=better,
        told=told,
        results=[_cells(row, read_other_tokens(summaries)) for row in compared_rows(summaries)],
        arguments=differing_arguments(summaries),
        charts=drawn(found),
    )


def is_comparison(text: str) -> bool:
    """Whether a file holds what `write_comparison` writes."""
    return "- KAVA comparison</title>" in text


def write_comparison(records: Sequence[RunRecord], path: Path) -> Path:
    """Write the page that compares runs. Raises `OSError` if it cannot be written."""
    write_text(path, comparison_page(records))
    return path
