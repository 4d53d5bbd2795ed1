"""The report on disk: every figure is the summary's, nothing a run wrote is taken for HTML, any ending has a page."""

import json
import math
import re
import sys
import time
import types
from dataclasses import asdict

import matplotlib
import pytest
import torch
from helpers.pages import Page, check_page
from helpers.summaries import EVIL, FEW, history_of, make_summary
from helpers.trainers import make_trainer

from kava_trainer import cli
from kava_trainer.reports import plots
from kava_trainer.reports.charts import MOST_POINTS, charts_of, number_text, points, thin_out
from kava_trainer.reports.comparison import (
    comparison_page,
)
from kava_trainer.reports.page import report_page, shortened, write_report
from kava_trainer.reports.run_reader import read_run, record_of
from kava_trainer.reports.summary import ModelFigures, RunSummary, Summary, Verdict
from kava_trainer.reports.tables import figure_text, headline_figures, verdict_of
from kava_trainer.runs.finish import report_on
from kava_trainer.trainer import throughput
from kava_trainer.trainer.checkpoint import write_manifest
from kava_trainer.trainer.run_state import save_progress
from kava_trainer.utils.console import Console


@pytest.fixture
def summary():
    return make_summary(FEW)


@pytest.fixture
def folder(summary, tmp_path):
    summary.write(tmp_path / "run", "completed")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The page of a run with every curve, and what its summary holds."""
    summary, folder = make_summary(), tmp_path_factory.mktemp("whole")
    summary.write(folder, "completed")
    return report_page(read_run(folder)), json.loads(summary.to_json())


def make_checkpoint(output_dir, step, history, run=None):
    """A checkpoint that is whole, of what a report reads."""
    folder = output_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    state = {"global_step": step, "log_history": history}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    for name in ("optimizer.pt", "scheduler.pt", "projector.pth"):
        (folder / name).write_bytes(b"0123456789")
    problems = [{"step": 2, "kind": "nan", "action": "skipped the optimizer step"}]
    run_time = {"started_at": "2026-01-02T03:04:05+00:00", "seconds": 75.04}
    save_progress(folder, 0, 1, {"problems": problems, "run_time": run_time})
    write_manifest(folder, run)
    return folder


def test_every_figure_on_the_page_is_the_summary_s(whole):
    page = check_page(*whole)
    assert page.texts["h2"][0] == "Success"
    assert {"All went well.", EVIL} <= set(page.texts["li"])
    assert len([1 for tag, _ in page.tags if tag == "article"]) == 10
    shown = " ".join(page.texts["pre"])
    for text in (f"{EVIL} 9", f"{EVIL} of student_after", f"python run_kava.py {EVIL}"):
        assert text in shown
    assert page.texts["span"].count("✓ right") == page.texts["span"].count("✗ wrong") == 20
    assert page.texts["td"].count(EVIL) == 3  # a problem, the environment, an argument


def test_what_a_run_wrote_is_never_taken_for_html_or_for_a_request(whole):
    text = whole[0]
    tags = Page(text).tags
    assert "<script" not in text.lower()
    assert text.count("&lt;script&gt;") > 30
    assert not [tag for tag, _ in tags if tag in ("script", "img", "iframe", "a", "object", "base")]
    assert {name for tag, attributes in tags for name in attributes} & {"src", "onload", "onclick"} == set()
    links = [attributes["href"] for tag, attributes in tags if "href" in attributes]
    assert {link for link in links if not link.startswith("#")} == {"data:,"}
    assert not re.search(r"url\((?!#)|@import", text)
    policy = next(attributes["content"] for tag, attributes in tags if attributes.get("http-equiv"))
    assert policy.startswith("default-src 'none'")


def test_the_plots_take_their_colours_from_the_page_and_say_what_they_show(whole):
    text = whole[0]
    page = Page(text)
    pictures = re.findall(r"<svg viewBox.*?</svg>", text, re.S)
    assert not [colour for picture in pictures for colour in re.findall(r"#[0-9a-f]{6}", picture)]
    variables = set(re.findall(r"var\((--\w+)\)", " ".join(pictures)))
    for scheme in re.findall(r":root \{.*?\}", text, re.S):
        assert variables <= set(re.findall(r"(--[\w-]+):", scheme))
    titles = [chart.title for chart in charts_of(history_of())[0]]
    words = [attributes["aria-label"] for tag, attributes in page.tags if tag == "figure"]
    assert len(words) == len(titles) + 3 == 13
    assert "CosSim: training from 0.245 at step 10 to 0.97 at step 60; held out from 0.1 at step 0 to 0.6" in words[3]
    assert words[0].startswith("Cross-entropy, nats: lower is better. Teacher 0.01235, Student before 0.02469, ")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_a_figure_that_was_not_measured_is_never_0_and_has_no_row(tmp_path):
    summary = RunSummary({}, {})
    summary.write(tmp_path, "completed")
    text = report_page(read_run(tmp_path))
    page = check_page(text, json.loads(summary.to_json()))
    assert {place for place, _, _ in page.figures} == {"global_step", "duration_seconds"}
    assert not {"not measured"} & {*page.texts.get("td", []), *page.texts.get("span", []), *page.texts.get("text", [])}
    assert not [1 for tag, _ in page.tags if tag == "figure"]  # neither curves nor bars
    assert "Not measured in this run: CosSim, Margin, Loss terms, raw," in text
    assert "Not measured: Teacher, Student before, Student after, Control." in text
    assert "Not measured: Loss, Mercator term, CosSim," in text
    assert page.texts["h2"][0] == "No verdict"


def test_models_and_figures_that_were_not_measured_leave_no_gap(tmp_path):
    summary = RunSummary({}, {})
    summary.add_evaluation("student_after", {"cross_entropy": 0.5, "perplexity": 1.65, "exact_match": None})
    problems = [{"prompt": f"{n}?", "reference": "1"} for n in range(2)]
    summary.add_answers("student_after", problems, ["1", ""], str.__eq__)
    summary.write(tmp_path, "completed")
    page = check_page(report_page(read_run(tmp_path)), json.loads(summary.to_json()))
    assert {"Answer perplexity", "Cross-entropy (nats)"} <= set(page.texts["th"])
    assert not {"Exact match", "Teacher", "Control"} & set(page.texts["th"])
    figures = [attributes["aria-label"] for tag, attributes in page.tags if tag == "figure"]
    assert figures == ["Cross-entropy, nats: lower is better. Student after 0.5."]
    assert [text for text in page.texts["p"] if text in ("Teacher", "Student after")] == ["Student after"] * 2
    assert "(an empty answer)" in page.texts["pre"]


@pytest.mark.parametrize(("count", "open_ones"), [(10, 3), (4, 3), (3, 3), (1, 1)])
def test_three_problems_are_open_and_the_others_folded(tmp_path, count, open_ones):
    summary = RunSummary({}, {})
    problems = [{"prompt": f"{n}?", "reference": "1"} for n in range(count)]
    summary.add_answers("student_after", problems, ["1"] * count, str.__eq__)
    summary.write(tmp_path, "completed")
    page = Page(report_page(read_run(tmp_path)))
    depth, found = 0, []
    for tag, _ in Page.with_ends(report_page(read_run(tmp_path))):
        depth += {"details": 1, "/details": -1}.get(tag, 0)
        found += [depth] if tag == "article" else []
    assert found == [0] * open_ones + [1] * (count - open_ones)
    folded = [f"{count - open_ones} more"] if count > open_ones else []
    assert [text for text in page.texts["summary"] if text.endswith("more")] == folded


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("x" * 400, ("x" * 400, None)),
        ("x" * 401, ("x" * 400, "x" * 401)),
        ("1\n" * 7 + "8", ("1\n" * 7 + "8", None)),
        ("1\n" * 30, ("\n".join("1" * 8), "1\n" * 30)),
        ("", ("", None)),
    ],
)
def test_a_long_text_is_shown_by_its_beginning(text, shown):
    assert shortened(text) == shown


def test_the_garbage_of_an_untrained_student_does_not_fill_the_page(tmp_path):
    summary = make_summary(FEW)
    for sample in summary.content.samples:
        sample.prompt, sample.answers = "p" * 9000, dict.fromkeys(sample.answers, "<&\n" * 5000)
    summary.write(tmp_path, "completed")
    text = report_page(read_run(tmp_path))
    page, depth, shown = Page(text), 0, 0
    for tag, data in Page.with_ends(text):
        depth += {"details": 1, "/details": -1}.get(tag, 0)
        shown += len(data) if tag == "" and depth == 0 else 0
    assert shown < 20_000
    assert "<&\n" * 5000 in page.raw  # whole, where it is folded
    assert page.texts["summary"].count("All 9,000 characters") == 10


def test_the_verdict_stands_in_parts(tmp_path, summary):
    parts = {
        "Why": ["Because."],
        "Against the control": ["As good."],
        "Caveats": ["Few."],
        "What to try next": ["More."],
    }
    reasons = ["Because.", "Few.", "As good."]
    summary.content.verdict = Verdict(True, False, reasons, ["Few."], ["As good."], ["More."])
    summary.write(tmp_path, "completed")
    record = read_run(tmp_path)
    assert record.summary.verdict.reasons == reasons
    assert verdict_of(record).parts() == parts
    page = Page(report_page(record))
    assert [text for text in page.texts["h3"] if text in parts] == list(parts)
    assert page.texts["li"][:4] == ["Because.", "As good.", "Few.", "More."]


def test_the_reasons_of_an_older_summary_are_taken_apart():
    reasons = [
        "CosSim is 0.9, below 0.95.",
        "Only 8 examples are held out, ...",
        "KAVA did not beat the control at ...",
    ]
    older = Summary.from_dict({"verdict": {"success": False, "collapsed": False, "reasons": reasons}})
    found = older.verdict.in_parts()
    assert (found.why(), found.caveats, found.control) == (reasons[:1], reasons[1:2], reasons[2:])


def test_each_tile_has_a_unit_and_a_sentence(whole):
    page = Page(whole[0])
    tiles = headline_figures(Summary.from_dict(whole[1]))
    assert len(tiles) == page.texts["dt"].count("CosSim") + 5 == 6
    for tile in tiles:
        assert tile.meaning.endswith(".")
        assert tile.meaning in page.texts["dd"]
        assert tile.unit in page.texts["small"] or tile.name == "duration_seconds"  # whose text has its own


def test_the_sentence_on_the_control_is_whole_in_the_picture():
    control, others = "word " * 60, ["long " * 100] * 4
    lines = plots._told([control], others)
    assert " ".join(lines).count("word") == 60
    assert len(lines) == plots._LINES
    assert sum(line.endswith(" ...") for line in lines) == 1
    assert plots._told([control], []) == plots._told([control], [])[:2]
    assert " ".join(plots._told([control * 5], others)).count("word") == 300


def test_a_collapse_is_what_the_page_says_first(summary, tmp_path):
    summary.content.verdict = Verdict(success=False, collapsed=True, reasons=["CosSim means nothing."])
    summary.write(tmp_path, "completed")
    record = read_run(tmp_path)
    assert (verdict_of(record).word, verdict_of(record).kind) == ("Collapsed – no success", "bad")
    page = Page(report_page(record))
    assert page.texts["h2"][0] == "Collapsed – no success"
    assert page.texts["title"] == [f"{tmp_path.name}: Collapsed – no success - KAVA report"]


@pytest.mark.parametrize(
    ("status", "word", "kind"), [("interrupted", "Interrupted", "open"), ("failed", "Failed", "bad")]
)
def test_a_run_that_did_not_complete_has_a_page_that_says_so(tmp_path, status, word, kind):
    summary = RunSummary({}, {})
    summary.add_training(FEW, 60)
    summary.write(tmp_path, status)
    record = read_run(tmp_path)
    assert (verdict_of(record).word, verdict_of(record).kind) == (word, kind)
    assert "after step 60" in verdict_of(record).reasons[0]
    page = check_page(report_page(record), json.loads(summary.to_json()))
    assert page.texts["h2"][0] == word
    summary.log_history = [*FEW, {"step": 60, "probe_collapsed": 1.0}]
    summary.write(tmp_path, status)
    assert verdict_of(read_run(tmp_path)).word == f"Collapsed – {word.lower()}"


def test_a_killed_run_is_read_from_its_newest_sound_checkpoint(tmp_path):
    run = {"learning_rate": 0.5, "teacher_model_name_or_path": "the/teacher", "data": "a digest", "world_size": 1}
    lines = [{"step": 30, "loss": math.nan}, {"step": 40, "loss": 2.5, "peak_memory_bytes": 600_000_040}]
    make_checkpoint(tmp_path, 40, lines, run)
    (make_checkpoint(tmp_path, 60, FEW) / "trainer_state.json").write_text("cut off")
    record = read_run(tmp_path)
    assert record.summary.status == "cut_off"
    assert record.summary.global_step == 40
    assert record.summary.final.loss == 2.5
    assert record.log_history[0] == {"step": 30, "loss": None}
    assert record.summary.arguments == {"learning_rate": 0.5, "teacher_model_name_or_path": "the/teacher"}
    assert record.summary.throughput.peak_memory_bytes == 600_000_040
    assert record.summary.problems[0]["kind"] == "nan"
    page = check_page(report_page(record), asdict(record.summary))
    assert page.texts["h2"][0] == "Cut off"
    assert "The run was cut off, or is still running" in page.texts["li"][0]
    assert "whatever came after step 40 is lost" in page.texts["li"][0]


def test_a_run_that_was_resumed_and_then_killed_is_not_shown_by_its_old_summary(summary, folder):
    make_checkpoint(folder, 60, FEW)
    assert read_run(folder).summary.status == "completed"
    make_checkpoint(folder, 80, [*FEW, {"step": 80, "loss": 1.0}], {"learning_rate": 2.0})
    record = read_run(folder)
    assert (record.summary.status, record.summary.global_step) == ("cut_off", 80)
    assert record.note.endswith("It had been resumed after step 60.")
    assert record.summary.evaluation.student_after is None
    assert record.summary.evaluation.teacher == summary.content.evaluation.teacher
    assert record.summary.final.margin is None
    assert [sample.answers["student_after"] for sample in record.summary.samples] == [None] * 10


def test_what_an_older_summary_lacks_is_not_measured_and_what_is_not_known_is_left_out():
    teacher = {"perplexity": 2.0, "exact_match": None}
    found = {"cos_sim_at": {"7": 0.5}, "final": {"loss": 1, "more": 2}, "evaluation": {"teacher": teacher}, "more": 3}
    summary = Summary.from_dict(found)
    assert summary.cos_sim_at == {"50": None, "100": None, "200": None, "7": 0.5}
    assert (summary.final.loss, summary.final.cka, summary.final_checksums) == (1, None, None)
    assert summary.evaluation.measured() == {"teacher": ModelFigures(**teacher)}
    assert list(asdict(summary)) == list(json.loads(RunSummary({}, {}).to_json()))


def test_a_summary_without_log_lines_has_the_curves_of_a_checkpoint_or_none(folder):
    (folder / "log_history.json").unlink()
    assert read_run(folder).log_history == []
    assert "so there are no curves" in report_page(read_run(folder))
    make_checkpoint(folder, 60, FEW)
    assert read_run(folder).log_history == FEW
    assert read_run(folder).note.endswith("the curves are those of checkpoint-60.")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.02, "0.02"), (518.3456, "518.3"), (5.489e-06, "5.489 × 10⁻⁶"), (-5e-05, "-5 × 10⁻⁵")],
)
def test_tiny_numbers_are_written_for_people(value, text):
    assert number_text(value) == text
    assert figure_text("cross_entropy", value) == text


def test_the_command_builds_reports_and_the_comparison(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, rate in (("a", 1e-3), ("b", 5e-2)):
        summary = make_summary(FEW, learning_rate=rate)
        summary.content.final.cka = rate
        summary.write(tmp_path / name / "out", "completed")
    assert cli.main(["report", "a/out", str(tmp_path / "b" / "out")]) == 0
    shown = capsys.readouterr().out
    assert (
        shown
        == f"Report: a/out/report.html\nReport: {tmp_path}/b/out/report.html\nComparison: {tmp_path}/comparison.html\n"
    )
    for name in ("a", "b"):
        page = (tmp_path / name / "out" / "report.html").read_text(encoding="utf-8")
        check_page(page, json.loads((tmp_path / name / "out" / "run_summary.json").read_text()))
        picture = (tmp_path / name / "out" / "report.png").read_bytes()
        assert picture[:8] == b"\x89PNG\r\n\x1a\n"
        assert [int.from_bytes(picture[at : at + 4], "big") for at in (16, 20)] == [1600, 900]
    compared = Page((tmp_path / "comparison.html").read_text(encoding="utf-8"))
    assert compared.texts["th"].count("a/out") == compared.texts["th"].count("b/out") == 2
    assert [json.loads(exact) for place, exact, _ in compared.figures if place == "final.cka"] == [1e-3, 5e-2]
    assert {"0.001", "0.05"} <= set(compared.texts["td"])
    words = [attributes["aria-label"] for tag, attributes in compared.tags if tag == "figure"]
    curve = "from 0.2 at step 10 to 0.7 at step 60"
    assert words == [f"CosSim, training: a/out {curve}; b/out {curve}."]
    assert cli.main(["report", "a/out", "b/out"]) == 0  # its own page is replaced
    (tmp_path / "mine.html").write_text("<title>mine</title>")
    for folder in ("a", "b"):
        (tmp_path / folder / "out" / "report.html").unlink()
    capsys.readouterr()
    assert cli.main(["report", "a/out", "b/out", "--output", "mine.html"]) == 2
    assert "--output mine.html is there already, and this command did not write it" in capsys.readouterr().err
    assert (tmp_path / "mine.html").read_text() == "<title>mine</title>"
    assert not (tmp_path / "a" / "out" / "report.html").exists()


def test_a_run_that_measured_less_is_compared_as_not_measured(folder, tmp_path):
    RunSummary({}, {}).write(tmp_path / "empty", "failed")
    page = Page(comparison_page([read_run(folder), read_run(tmp_path / "empty")]))
    margins = [(exact, shown) for place, exact, shown in page.figures if place == "final.margin"]
    assert margins == [("0.7654321", "0.7654"), (None, "not measured")]
    assert any("empty not measured" in attributes["aria-label"] for tag, attributes in page.tags if tag == "figure")


def write_summary_with(tmp_path, change):
    RunSummary({}, {}).write(tmp_path, "completed")
    path = tmp_path / "run_summary.json"
    path.write_text(change(path.read_text()))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda folder: None, "is not a folder; name the output_dir of a run"),
        (lambda folder: folder.mkdir(), "holds neither run_summary.json nor a checkpoint that is whole"),
        (lambda folder: write_summary_with(folder, lambda text: text[:40]), "run_summary.json cannot be read"),
        (lambda folder: write_summary_with(folder, lambda text: "[]"), "run_summary.json is no summary of a run"),
        (
            lambda folder: write_summary_with(folder, lambda text: text.replace('version": 1', 'version": 2')),
            "has schema_version 2, but this version of KAVA reads 1; use the version that wrote it",
        ),
        (
            lambda folder: write_summary_with(folder, lambda text: text.replace('"problems": []', '"problems": 3')),
            "is not as it was written: look at problems",
        ),
    ],
)
def test_a_folder_without_a_run_is_refused_before_anything_is_written(folder, tmp_path, capsys, make, told):
    make(tmp_path / "bad")
    assert cli.main(["report", str(folder), str(tmp_path / "bad"), str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert f"{tmp_path / 'none'} is not a folder" in error
    assert not (folder / "report.html").exists()


def test_a_folder_named_twice_and_a_place_that_cannot_be_written_are_refused(folder, tmp_path, capsys):
    assert cli.main(["report", str(folder), str(folder / ".." / "run")]) == 2
    assert "is named more than once" in capsys.readouterr().err
    (folder / "report.html").mkdir()
    assert cli.main(["report", str(folder)]) == 2
    assert "cannot be written: Is a directory" in capsys.readouterr().err


def test_a_report_whose_packages_do_not_work_is_a_warning(summary, tmp_path, capsys, monkeypatch):
    summary.write(tmp_path, "completed")
    monkeypatch.setitem(sys.modules, "kava_trainer.reports.page", None)
    assert report_on(Console(plain=True), str(tmp_path), summary) is None
    shown = capsys.readouterr().out
    assert (
        f"Warning: The report could not be written to {tmp_path}: import of kava_trainer.reports.page halted" in shown
    )
    assert f"python -m kava_trainer report {tmp_path}" in shown


def test_a_report_that_cannot_be_written_is_a_warning(summary, tmp_path, capsys):
    summary.write(tmp_path, "completed")
    (tmp_path / "report.html").mkdir()
    assert report_on(Console(plain=True), str(tmp_path), summary) is None
    shown = capsys.readouterr().out
    assert f"Warning: The report could not be written to {tmp_path}: " in shown
    assert "Is a directory" in shown
    assert not list(tmp_path.glob(".*"))


def test_a_secret_is_in_neither_page_nor_log_lines_and_matplotlib_stays_as_it_is(tmp_path, monkeypatch):
    summary = RunSummary({}, {})
    monkeypatch.setenv("WANDB_API_KEY", "planted-secret")
    summary.content.problems.append({"step": 1, "kind": "hub", "action": "no planted-secret here"})
    summary.log_history = [*summary.log_history, {"step": 60, "note": "planted-secret"}]
    summary.write(tmp_path, "completed")
    before = dict(matplotlib.rcParams)
    write_report(record_of(tmp_path, summary))
    assert dict(matplotlib.rcParams) == before
    for path in tmp_path.iterdir():
        assert b"planted-secret" not in path.read_bytes()
    assert "no *** here" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_long_run_has_a_page_of_the_same_size_with_its_extremes():
    found = [(step, math.sin(step / 500)) for step in range(50_000)]
    found[20_001], found[33_333] = (20_001, 9.0), (33_333, -9.0)
    thin = thin_out(found)
    assert len(thin) <= MOST_POINTS + 2
    assert {found[0], found[-1], (20_001, 9.0), (33_333, -9.0)} <= set(thin)
    assert thin == sorted(thin)
    assert thin_out(found[:1000]) == found[:1000]


def test_what_is_no_finite_number_is_no_point():
    lines = [{"step": 1, "x": math.nan}, {"step": 2, "x": None}, {"step": 3, "x": 1}, {"step": 3, "y": 2.0}, {"x": 5.0}]
    assert points(lines, ("x", "y")) == [(3, 2.0)]


def test_each_training_line_tells_the_tokens_since_the_last_one(tmp_path, tokenizer, monkeypatch):
    ticks = iter(range(0, 100, 2))
    clock = {"monotonic": lambda: float(next(ticks)), "perf_counter": time.perf_counter}
    monkeypatch.setattr(throughput, "time", types.SimpleNamespace(**clock))
    trainer = make_trainer(tmp_path, tokenizer, max_steps=5, logging_steps=2, eval_strategy="steps", eval_steps=3)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4, 5]
    tokens = [2 * line["tokens_per_second"] for line in lines]
    assert sum(tokens) == pytest.approx(int(trainer.clock.tokens))
    assert all(count > 0 for count in tokens)
    peaks = [line["peak_memory_bytes"] for line in lines]
    assert peaks == sorted(peaks)
    assert peaks[0] > torch.ones(1).nbytes


def test_pairs_of_layers_and_the_course_of_the_alignment_are_on_the_page(tmp_path):
    summary = make_summary()
    pairs = [
        {"student_layer": 1, "teacher_layer": 2, "margin": 0.46, "cos_sim": 0.9, "collapsed": False},
        {"student_layer": 12, "teacher_layer": 14, "margin": -0.002, "cos_sim": 0.607, "collapsed": True},
    ]
    summary.add_final({"eval_margin": 0.229, "eval_cos_sim": 0.7535}, pairs)
    summary.write(tmp_path, "completed")
    text = report_page(read_run(tmp_path))
    page = check_page(text, json.loads((tmp_path / "run_summary.json").read_text()))
    for shown in ("1 -&gt; 2", "12 -&gt; 14", "-0.0020", "Before the first step", "At its best"):
        assert shown in text
    assert any("the lowest is -0.0020, of layers 12 -> 14, and 1 of them collapsed." in own for own in page.texts["dd"])
    assert Summary.from_dict(json.loads(summary.to_json())).final.pairs == summary.content.final.pairs
    assert Summary.from_dict(json.loads(summary.to_json())).alignment == summary.content.alignment
    assert (summary.content.alignment.start.step, summary.content.alignment.best.step) == (0, 30)
