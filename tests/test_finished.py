"""A finished student belongs to one run, and stays its own when the run is resumed."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_end_to_end import QUICKSTART, SHORT, summary_of, words

import run_kava
from kava_trainer.cli import main
from kava_trainer.errors import BadRequest
from kava_trainer.finished import completed_summary, find_student, weights_digest
from kava_trainer.summary import RunSummary

RUN = {**QUICKSTART, **SHORT, "max_steps": 2, "run_control": False, "evaluate_generation": False}


def change_weights(student):
    """Another student: one number is."""
    weights = load_file(student / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, student / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    assert run_kava.main(words({**RUN, "output_dir": folder})) == 0
    return folder


@pytest.fixture
def copied(run, tmp_path):
    """The run's folder somewhere else; what its summary names is where it was."""
    return shutil.copytree(run, tmp_path / "copied")


def test_the_summary_tells_which_weights_were_finished(run):
    student = run / "final_student"
    assert summary_of(run)["student_digest"] == weights_digest(student)
    assert len(weights_digest(student)) == 64


def test_a_digest_is_that_of_weights_alone(copied):
    student = copied / "final_student"
    before = weights_digest(student)
    (student / "README.md").write_text("mine")
    (student / "generation_config.json").write_text("{}")
    assert weights_digest(student) == before
    change_weights(student)
    assert weights_digest(student) != before


def test_the_student_of_another_run_is_neither_sent_nor_measured(copied, capsys):
    change_weights(copied / "final_student")
    summary = summary_of(copied)
    summary["arguments"]["final_dir"] = str(copied)
    (copied / "run_summary.json").write_text(json.dumps(summary))
    for command in (["push", str(copied), "me/repo"], ["evaluate", str(copied)]):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert f"The student in {copied / 'final_student'} is not the one that the run in {copied} has finished" in said


def test_of_two_places_the_one_with_the_runs_own_student_counts(run, copied):
    assert find_student(copied, completed_summary(copied)) == copied / "final_student"
    change_weights(copied / "final_student")
    assert find_student(copied, completed_summary(copied)) == run / "final_student"


def test_a_summary_from_before_there_was_a_digest_takes_what_is_there(copied):
    summary = summary_of(copied)
    del summary["student_digest"]
    (copied / "run_summary.json").write_text(json.dumps(summary))
    change_weights(copied / "final_student")
    assert find_student(copied, completed_summary(copied)) == copied / "final_student"


def test_a_run_that_was_cut_short_has_no_student_even_where_an_earlier_one_left_its_own(copied):
    summary = {**summary_of(copied), "status": "interrupted", "student_digest": None}
    (copied / "run_summary.json").write_text(json.dumps(summary))
    with pytest.raises(BadRequest, match="was interrupted at step 2, so it has no finished student"):
        find_student(copied, summary)


def test_a_run_that_is_resumed_when_it_is_complete_leaves_what_was_changed_by_hand(tmp_path, capsys):
    out = tmp_path / "out"
    assert run_kava.main(words({**RUN, "output_dir": out})) == 0
    student, first = out / "final_student", summary_of(out)
    (student / "README.md").write_text("my own card")
    (student / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert run_kava.main(words({**RUN, "output_dir": out, "resume_from_checkpoint": True})) == 0
    shown = capsys.readouterr().out
    assert f"Student: {student}, as it was saved before" in shown
    assert f"{student / 'README.md'} was changed by hand, so it is left as it is." in shown
    assert ((student / "README.md").read_text(), (student / "notes.txt").read_text()) == ("my own card", "mine")
    assert summary_of(out)["student_digest"] == first["student_digest"]
    assert summary_of(out)["final"] == first["final"]


@pytest.mark.parametrize("lost", ["weights", "projector", "folder"])
def test_what_is_not_as_it_was_saved_is_saved_anew(tmp_path, lost):
    out = tmp_path / "out"
    assert run_kava.main(words({**RUN, "output_dir": out})) == 0
    student, projector = out / "final_student", out / "final_projector.pth"
    digest, weights = weights_digest(student), load_file(student / "model.safetensors")
    {
        "weights": lambda: change_weights(student),
        "projector": projector.unlink,
        "folder": lambda: shutil.rmtree(student),
    }[lost]()
    assert run_kava.main(words({**RUN, "output_dir": out, "resume_from_checkpoint": True})) == 0
    assert summary_of(out)["student_digest"] == weights_digest(student) == digest
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_file(student / "model.safetensors").items())
    assert projector.is_file()


def spoil(place, value):
    """The content of a summary with one entry changed, or left out where the value is None."""
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
        ("verdict.success", "yes"),
        ("verdict.reasons", "none"),
        ("problems", ["one"]),
        ("checkpoints", [1]),
        ("student_digest", 5),
    ],
)
@pytest.mark.parametrize("command", ["push", "report", "evaluate"])
def test_a_summary_that_was_damaged_is_a_bad_request_that_names_the_entry(tmp_path, capsys, command, place, value):
    (tmp_path / "run_summary.json").write_text(json.dumps(spoil(place, value)))
    assert main([command, str(tmp_path), *(["me/repo"] if command == "push" else [])]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'run_summary.json'} is not as it was written: look at {place.split('.')[0]}." in said
