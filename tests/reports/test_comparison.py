"""Several runs side by side: what differs, by how much, and which is the better one."""

import math
import re

import pytest

from kava_trainer.reports.comparison import (
    better_run,
    compared_rows,
    comparison_page,
    differing_arguments,
    run_names,
)
from kava_trainer.reports.run_reader import read_run
from kava_trainer.reports.summary import ModelFigures, RunSummary, Summary
from kava_trainer.reports.tables import Figure, best_of, difference_text


def test_only_arguments_that_differ_are_compared():
    runs = [{"output_dir": "a", "seed": 1, "same": [1]}, {"output_dir": "b", "seed": 2, "same": [1], "new": "x"}]
    found = differing_arguments([Summary(arguments=arguments) for arguments in runs])
    assert found == [("seed", ["1", "2"]), ("new", ["-", '"x"'])]


def test_runs_in_folders_of_one_name_are_told_apart(tmp_path):
    assert run_names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert run_names([tmp_path / "a" / "out", tmp_path / "b" / "out"]) == ["a/out", "b/out"]


def test_runs_that_name_other_steps_are_compared(tmp_path):
    for name, steps in (("a", {"50": 0.5, "1000": 0.9}), ("b", {"7": 0.1, "50": 0.4, "200": 0.6})):
        summary = RunSummary({}, {})
        summary.content.cos_sim_at = steps
        summary.write(tmp_path / name, "completed")
    records = [read_run(tmp_path / name) for name in "ab"]
    rows = compared_rows([record.summary for record in records])
    found = {row[0].place: [figure.value for figure in row] for row in rows if row[0].place.startswith("cos_sim_at")}
    assert found == {
        "cos_sim_at.7": [None, 0.1],
        "cos_sim_at.50": [0.5, 0.4],
        "cos_sim_at.200": [None, 0.6],
        "cos_sim_at.1000": [0.9, None],
    }
    assert list(found) == ["cos_sim_at.7", "cos_sim_at.50", "cos_sim_at.200", "cos_sim_at.1000"]
    assert "CosSim at step 1000" in comparison_page(records)


@pytest.mark.parametrize(
    ("place", "values", "best"),
    [
        ("final.cos_sim", (0.9, 0.95), 1),
        ("evaluation.student_after.perplexity", (1.5, 1.2, 1.4), 1),
        ("evaluation.student_after.cross_entropy", (1.0, 0.985), None),
        ("evaluation.student_after.cross_entropy", (1.0, 0.97), 1),
        ("evaluation.student_after.exact_match", (0.5, 0.5), None),
        ("throughput.peak_memory_bytes", (None, 5, 4), 2),
        ("duration_seconds", (None, 3.0), None),
        ("evaluation.teacher.perplexity", (1.0, 2.0), None),
        ("final.loss", (1.0, 2.0), None),
    ],
)
def test_the_better_figure_is_marked_where_there_is_one(place, values, best):
    assert best_of([Figure(place, "", value) for value in values]) == best


@pytest.mark.parametrize(
    ("place", "values", "shown"),
    [
        ("final.cos_sim", (0.97, 0.96), "+0.01"),
        ("final.cos_sim", (0.97001, 0.97002), "−1 × 10⁻⁵"),
        ("final.cos_sim", (0.97, 0.97), "±0"),
        ("evaluation.student_after.exact_match", (0.685, 0.1), "+58.5 points"),
        ("throughput.peak_memory_bytes", (2_640_000_000, 3_410_000_000), "−0.77 GB"),
        ("duration_seconds", (200.0, 75.0), "+2 min 5 s"),
        ("throughput.tokens_per_second", (31_000.0, 10_000.0), "+21,000"),
        ("final.cka", (None, 0.5), ""),
    ],
)
def test_differences_are_told_with_sign_and_unit(place, values, shown):
    assert difference_text(*(Figure(place, "", value) for value in values)) == shown


def student_of(loss, collapsed=False, examples=200, tokens=None, **arguments):
    summary = Summary(
        arguments={"dataset_name": "data", **arguments}, held_out_examples=examples, held_out_tokens=tokens
    )
    summary.verdict.collapsed = collapsed
    if loss is not None:
        summary.evaluation.student_after = ModelFigures(cross_entropy=loss, perplexity=math.exp(loss), exact_match=None)
    return summary


@pytest.mark.parametrize(
    ("runs", "better", "told"),
    [
        ((student_of(0.5), student_of(0.4)), 1, "The better run has the lowest cross-entropy on the held-out answers."),
        ((student_of(0.5), student_of(0.495)), None, "cross-entropies within 2 % count as equal"),
        ((student_of(0.5), student_of(None)), None, "measured in fewer than two"),
        ((student_of(0.5), student_of(0.4, dataset_name="other")), None, "measured on different data"),
        ((student_of(0.5), student_of(0.4, examples=20)), None, "measured on different data"),
        ((student_of(0.5), student_of(0.4, collapsed=True)), None, "collapsed"),
        ((student_of(0.5, tokens=900), student_of(0.4, tokens=900)), 1, "lowest cross-entropy"),
        ((student_of(0.5), student_of(0.4, tokens=900)), 1, "lowest cross-entropy"),
        ((student_of(0.5, tokens=400), student_of(0.4, tokens=900)), None, "read the answers in other tokens"),
    ],
)
def test_the_better_run_is_the_one_with_the_better_student(tmp_path, runs, better, told):
    assert better_run(runs)[0] == better
    assert told in better_run(runs)[1]


def test_figures_of_a_token_are_not_compared_with_those_of_other_tokens(tmp_path):
    for name, loss, tokens in (("a", 0.5, 400), ("b", 0.25, 900)):
        summary = RunSummary({"dataset_name": "data"}, {})
        figures = {"cross_entropy": loss, "perplexity": math.exp(loss), "exact_match": loss}
        summary.add_evaluation("student_after", figures)
        summary.content.held_out_tokens = tokens
        summary.write(tmp_path / name, "completed")
    text = comparison_page([read_run(tmp_path / name) for name in "ab"])
    cells = re.findall(r'<td class="best">✓ <data[^>]*data-figure="evaluation.student_after.(\w+)">', text)
    assert cells == ["exact_match"]
    assert "in other tokens" in text
    assert "(−0.25)" not in text
    assert "(−25 points)" in text


def test_the_comparison_marks_the_better_run_and_its_figures(tmp_path):
    for name, loss in (("a", 0.5), ("b", 0.25)):
        summary = RunSummary({"dataset_name": "data"}, {})
        summary.add_evaluation("student_after", {"cross_entropy": loss, "perplexity": 1.5, "exact_match": None})
        summary.write(tmp_path / name, "completed")
    text = comparison_page([read_run(tmp_path / name) for name in "ab"])
    assert re.search(r"<strong>b</strong> No verdict <span class=\"best\">✓ the better run</span>", text)
    assert text.count("the better run</span>") == 1
    cells = re.findall(r'<td class="best">✓ <data[^>]*data-figure="evaluation.student_after.(\w+)">', text)
    assert cells == ["cross_entropy"]
    assert "(−0.25)" in text
