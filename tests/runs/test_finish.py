"""A finished student belongs to one run, and stays its own when the run is resumed."""

import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from helpers.programs import QUICKSTART, SHORT, summary_of, words
from safetensors.torch import load_file, save_file

import run_kava
from kava_trainer.cli import main
from kava_trainer.reports.run_reader import completed_summary, find_student
from kava_trainer.reports.summary import RunSummary
from kava_trainer.trainer.final_student import final_checksums
from kava_trainer.utils.errors import BadRequest

RUN = {**QUICKSTART, **SHORT, "max_steps": 2, "run_control": False, "evaluate_generation": False}


def change_weights(student):
    """Another student: one number is."""
    weights = load_file(student / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, student / "model.safetensors", {"format": "pt"})


def change_summary(folder, **changes):
    summary = {**summary_of(folder), **changes}
    (folder / "run_summary.json").write_text(json.dumps(summary))
    return completed_summary(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    assert run_kava.main(words({**RUN, "output_dir": folder})) == 0
    return folder


@pytest.fixture
def copied(run, tmp_path):
    """The run's folder somewhere else; what its summary names is where it was."""
    return shutil.copytree(run, tmp_path / "copied")


@pytest.fixture
def alone(copied):
    """The run's folder somewhere else, and it names itself."""
    change_summary(copied, arguments={**summary_of(copied)["arguments"], "final_dir": str(copied)})
    return copied


def test_the_summary_tells_what_was_finished(run):
    found = summary_of(run)["final_checksums"]
    assert found == final_checksums(run / "final_student", run / "final_projector.pth")
    assert list(found) == ["final_student/model.safetensors", "final_projector.pth"]


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("final_student/model.safetensors", lambda path: change_weights(path.parent), "is another one"),
        ("final_student/model.safetensors", lambda path: path.unlink(), "is missing"),
        ("final_projector.pth", lambda path: path.write_bytes(b"another"), "is another one"),
    ],
    ids=["weights", "no weights", "projector"],
)
def test_the_finals_of_another_run_are_neither_sent_nor_measured(alone, capsys, name, change, said):
    change(alone / name)
    for command in (["push", str(alone), "me/repo"], ["evaluate", str(alone)]):
        assert main(command) == 2
        told = capsys.readouterr().err
        assert f"What is there is not what the run in {alone} has finished: in {alone} {name} {said}." in told


def test_what_is_beside_the_weights_may_change(alone):
    for name in ("README.md", "generation_config.json", "model.fp16.safetensors"):
        (alone / "final_student" / name).write_text("mine")
    (alone / "final_projector.pth").unlink()
    assert find_student(alone, completed_summary(alone)) == alone / "final_student"


def test_of_two_places_the_one_with_the_runs_own_student_counts(run, copied):
    assert find_student(copied, completed_summary(copied)) == copied / "final_student"
    change_weights(copied / "final_student")
    assert find_student(copied, completed_summary(copied)) == run / "final_student"


def test_a_summary_from_before_there_were_checksums_takes_what_is_there(alone):
    summary = change_summary(alone, final_checksums=None)
    change_weights(alone / "final_student")
    assert find_student(alone, summary) == alone / "final_student"


def test_a_summary_that_lacks_arguments_has_their_defaults(alone):
    asked = summary_of(alone)["arguments"]
    summary = change_summary(alone, arguments={name: asked[name] for name in ("output_dir", "dataset_name")})
    assert (summary.arguments["use_peft"], summary.arguments["final_dir"]) == (False, None)
    assert find_student(alone, summary) == alone / "final_student"


def test_a_run_that_was_cut_short_has_no_student_even_where_an_earlier_one_left_its_own(alone):
    summary = replace(completed_summary(alone), status="interrupted")
    assert find_student(alone, summary) == alone / "final_student"  # as where its control was interrupted
    with pytest.raises(BadRequest, match="was interrupted at step 2, before its student was finished"):
        find_student(alone, replace(summary, final_checksums=None))
    (alone / "run_summary.json").write_text(json.dumps(asdict(summary)))
    with pytest.raises(BadRequest, match="at step 2, when its student was finished, but not all of it was measured"):
        completed_summary(alone)


def test_a_run_that_is_resumed_when_it_is_complete_leaves_what_was_changed_by_hand(tmp_path, capsys):
    out = tmp_path / "out"
    assert run_kava.main(words({**RUN, "output_dir": out})) == 0
    student, first = out / "final_student", summary_of(out)
    (student / "README.md").write_text("my own card")
    (student / "notes.txt").write_text("mine")
    (out / "final_projector.pth").unlink()
    capsys.readouterr()
    assert run_kava.main(words({**RUN, "output_dir": out, "resume_from_checkpoint": True})) == 0
    shown = capsys.readouterr().out
    assert f"Student: {student}, as it was saved before" in shown
    assert f"{student / 'README.md'} was changed by hand, so it is left as it is." in shown
    assert ((student / "README.md").read_text(), (student / "notes.txt").read_text()) == ("my own card", "mine")
    name = "final_student/model.safetensors"
    assert summary_of(out)["final_checksums"][name] == first["final_checksums"][name]
    assert summary_of(out)["final"] == first["final"]
    assert find_student(out, completed_summary(out)) == student
    assert not list(out.glob(".*"))


def test_a_run_that_begins_where_another_one_was_says_so(alone, capsys):
    warning = f"{alone} holds an earlier run (checkpoint-2), which this one replaces piece by piece."
    assert run_kava.main(words({**RUN, "output_dir": alone, "resume_from_checkpoint": True})) == 0
    assert warning not in capsys.readouterr().out
    assert run_kava.main(words({**RUN, "output_dir": alone})) == 0
    assert warning in capsys.readouterr().out


@pytest.mark.parametrize("lost", ["weights", pytest.param("folder", marks=pytest.mark.slow)])
def test_what_is_not_as_it_was_saved_is_saved_anew(tmp_path, lost):
    out = tmp_path / "out"
    assert run_kava.main(words({**RUN, "output_dir": out})) == 0
    student, first = out / "final_student", load_file(out / "final_student" / "model.safetensors")
    {"weights": change_weights, "folder": shutil.rmtree}[lost](student)
    assert run_kava.main(words({**RUN, "output_dir": out, "resume_from_checkpoint": True})) == 0
    again = load_file(student / "model.safetensors")
    assert all(torch.equal(tensor, first[name]) for name, tensor in again.items())
    assert find_student(out, completed_summary(out)) == student


@pytest.mark.parametrize(
    ("changes", "step"),
    [
        pytest.param({"resume_from_checkpoint": "checkpoint-1", "max_steps": 1}, 1, marks=pytest.mark.slow),
        ({"resume_from_checkpoint": True, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}, 1),
    ],
    ids=["an earlier step", "the best step"],
)
def test_the_student_that_is_saved_is_the_one_that_was_measured(tmp_path, changes, step):
    """Also where the folder holds a sound student of the same run, from another of its steps."""
    out = tmp_path / "out"
    options = {**RUN, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    options |= {
        "learning_rate": 0.5,
        "projector_dropout": 0.1,
        "gradient_accumulation_steps": 16,
        "greater_is_better": True,
        "metric_for_best_model": "eval_loss",
    }  # step 1 has the larger one
    assert run_kava.main(words({**options, "output_dir": out})) == 0
    place = changes["resume_from_checkpoint"]
    changes = {**changes, "resume_from_checkpoint": place if place is True else out / place}
    assert run_kava.main(words({**options, "output_dir": out, **changes})) == 0
    saved, measured = (
        load_file(folder / "model.safetensors") for folder in (out / "final_student", out / f"checkpoint-{step}")
    )
    assert all(torch.equal(tensor, measured[name]) for name, tensor in saved.items())
    assert find_student(out, completed_summary(out)) == out / "final_student"


def spoil(place, value):
    """The content of a summary with one entry changed."""
    content = json.loads(RunSummary({"final_dir": "x", "output_dir": "x"}, {}).to_json())
    content |= {"status": "completed", "finished_at": "2026-01-01T00:00:00+00:00"}
    *path, last = place.split(".")
    entry = content
    for name in path:
        entry = entry[name]
    entry[last] = value
    return content


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("status", 5),
        ("global_step", "10"),
        ("duration_seconds", "long"),
        ("arguments", []),
        ("environment", "here"),
        ("evaluation", None),
        ("evaluation.teacher", "good"),
        ("evaluation.teacher", {"perplexity": 2.0}),
        ("evaluation.teacher", {"perplexity": "low", "exact_match": None}),
        ("final.cos_sim", "0.9"),
        ("cos_sim_at.50", [0.9]),
        ("throughput.tokens_per_second", "fast"),
        ("samples", {}),
        ("samples", [{"prompt": "2 + 2"}]),
        ("rollouts", {}),
        ("rollouts", [{"prompt": "2 + 2", "first": "5"}]),
        ("verdict.success", "yes"),
        ("verdict.reasons", "none"),
        ("problems", ["one"]),
        ("problems", [{}]),
        ("arguments.final_dir", 5),
        ("arguments.use_peft", "yes"),
        ("global_step", True),
        ("checkpoints", [1]),
        ("final_checksums", {"final_student/model.safetensors": 5}),
    ],
)
@pytest.mark.parametrize("command", ["push", "report", "evaluate"])
def test_a_summary_that_was_damaged_is_a_bad_request_that_names_the_entry(tmp_path, capsys, command, place, value):
    (tmp_path / "run_summary.json").write_text(json.dumps(spoil(place, value)))
    assert main([command, str(tmp_path), *(["me/repo"] if command == "push" else [])]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'run_summary.json'} is not as it was written: look at {place.split('.')[0]}." in said


@pytest.mark.parametrize("text", ["[" * 200_000, '{"schema_version": 1, "command": "\\udcff"}', "\xff"])
@pytest.mark.parametrize("command", ["push", "report", "evaluate"])
def test_a_summary_that_is_no_json_or_no_text_is_a_bad_request(tmp_path, capsys, command, text):
    (tmp_path / "run_summary.json").write_text(text, encoding="latin-1")
    assert main([command, str(tmp_path), *(["me/repo"] if command == "push" else [])]) == 2
    assert str(tmp_path / "run_summary.json") in capsys.readouterr().err
