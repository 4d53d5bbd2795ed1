"""Trackers: every logged name is documented, the whole request is their configuration, and the end reaches them too.

TensorBoard comes with the `test` extra. Trackio and Weights & Biases come with `tracking`; their test is a slow one.
"""

import io
import json
import os
import re
import sqlite3
import struct
import subprocess
import sys
from contextlib import redirect_stdout
from functools import reduce
from itertools import product
from pathlib import Path

import pytest
from helpers.models import tiny_lora_llama
from helpers.places import ROOT
from helpers.programs import SHORT, summary_of, words
from helpers.trainers import make_trainer
from transformers.integrations import TensorBoardCallback, integration_utils

import run_kava
from kava_trainer.config.arguments import KavaTrainingArguments
from kava_trainer.config.launcher import hide_tokens
from kava_trainer.reports.summary import Evaluations, ModelFigures, Summary, Verdict
from kava_trainer.runs import finish, start
from kava_trainer.runs.tracking import RunTracking

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

TOKEN = "hf_plantedintheargumentsoftherun"
"""Longer than what is taken for a setting, and nowhere but in `hub_token`."""

EVERY_TERM = {
    **SHORT,
    "mse_weight": 0.1,
    "relative_mse_weight": 0.1,
    "lm_tokens": "all",
    "kd_weight": 0.1,
    "on_policy_fraction": 0.5,
    "on_policy_max_new_tokens": 8,
    "projector_direction": "teacher_to_student",
    "projector_anchor": "reconstruction",
    "include_num_input_tokens_seen": "true",
    "logging_steps": 1,
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "max_length": 128,
    "max_train_samples": 32,
    "per_device_train_batch_size": 8,
    "run_control": "true",
    "hub_token": TOKEN,
}


def run(folder, **options):
    recipe = str(ROOT / "training_args" / "quickstart.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "tell_memory", lambda *_: None)  # half of the time of such a short run
        return run_kava.main([recipe, *words({**EVERY_TERM, "output_dir": folder, **options})])


class Events:
    """What TensorBoard's own reader finds under a folder."""

    def __init__(self, folder):
        size = {"scalars": 0, "tensors": 0, "images": 0}
        self.folders = sorted({path.parent for path in Path(folder).glob("**/events.out.tfevents.*")})
        readers = [event_accumulator.EventAccumulator(str(path), size_guidance=size) for path in self.folders]
        self._read = [reader.Reload() for reader in readers]

    def names(self):
        return {name for events in self._read for name in events.Tags()["scalars"]}

    def images(self):
        return {name for events in self._read for name in events.Tags()["images"]}

    def points(self, name):
        found = [events for events in self._read if name in events.Tags()["scalars"]]
        return [(point.step, point.value) for events in found for point in events.Scalars(name)]

    def texts(self, name):
        tag = f"{name}/text_summary"
        found = [events for events in self._read if tag in events.Tags()["tensors"]]
        return [p.tensor_proto.string_val[0].decode() for events in found for p in events.Tensors(tag)]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A run with every term, then the same command once more, which finds nothing left to train."""
    folder, before = tmp_path_factory.mktemp("tracked") / "out", Path.cwd()
    folder.mkdir()
    os.chdir(folder.parent)
    try:
        assert run(folder, report_to="tensorboard") == 0
        first, summary = Events(folder / "runs"), summary_of(folder)
        quick = {"run_control": "false", "evaluate_generation": "false"}
        assert run(folder, report_to="tensorboard", resume_from_checkpoint="true", **quick) == 0
    finally:
        os.chdir(before)
    return folder, first, summary


def documented():
    """Every name of `docs/metrics.md`, with the placeholders filled in from its own tables."""
    cells = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8"), re.M)
    rows = re.split(r"^\| `<(\w+)>` \|.*$", (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8"), flags=re.M)
    values = {
        name: re.findall(r"^\| `(\w+)` \|", text, re.M) for name, text in zip(rows[1::2], rows[2::2], strict=True)
    }
    values["n"] = ["0", "1"]
    names = set()
    for pattern in (cell for cell in cells if "/" in cell):
        holes = re.findall(r"<(\w+)>", pattern)
        for chosen in product(*(values[hole] for hole in holes)):
            names.add(reduce(lambda name, value: re.sub(r"<\w+>", value, name, count=1), chosen, pattern))
    return names


def test_the_logged_names_are_those_of_the_table(tracked):
    folder, first, _ = tracked
    logged = Events(folder / "runs").names()
    assert logged - documented() == set()
    at_the_start_alone = {name for name in documented() if re.fullmatch(r"eval/\w+_gradient_share", name)}
    other_targets = {name for name in documented() if re.search(r"/(probe_)?(attention|relations)_", name)}
    several = {name for name in documented() if re.search(r"/(teacher\d+_cos_sim|\w+_routing_entropy)$", name)}
    assert documented() - logged == at_the_start_alone | other_targets | several  # for such a short training
    assert len(documented()) > 100
    assert first.names() <= logged


def test_the_figures_of_the_models_stand_where_they_were_measured(tracked):
    _, first, summary = tracked
    steps = {"teacher": 0, "student_before": 0, "student_after": 3, "control_sft": 3}
    for who, step in steps.items():
        for name, value in summary["evaluation"][who].items():
            assert first.points(f"eval/{who}_{name}") == [(step, pytest.approx(value, rel=1e-4))]
    assert first.points("eval/success") == [(3, 0.0)]
    assert [step for step, _ in first.points("train/loss")] == [1, 2, 3]


def test_the_configuration_is_the_whole_request_once_and_holds_no_token(tracked):
    folder, first, summary = tracked
    (text,) = first.texts("args")
    config = json.loads(text)
    assert config == summary["arguments"]
    assert (config["teacher_model_name_or_path"], config["dataset_name"]) == ("quickstart", "quickstart")
    assert (config["kd_weight"], config["hub_token"]) == (0.1, "<HUB_TOKEN>")
    assert re.fullmatch(r"out-\d{8}-\d{6}", config["run_name"])
    (model,) = first.texts("model_config")
    assert json.loads(model)["hidden_size"] == 64
    assert not any(TOKEN.encode() in path.read_bytes() for path in folder.glob("**/events.*"))


def test_the_report_and_the_verdict_are_attached(tracked):
    folder, first, summary = tracked
    assert first.images() == {"report"}
    assert first.texts("report") == [str(folder / "report.html")]
    (verdict,) = first.texts("verdict")
    assert verdict.startswith("No success.\n- ")
    assert all(reason in verdict for reason in summary["verdict"]["reasons"])


def test_the_control_has_curves_of_its_own(tracked):
    folder, first, _ = tracked
    assert len(first.folders) == 1
    control = Events(folder / "control" / "runs")
    assert [step for step, _ in control.points("train/loss")] == [1, 2, 3]
    assert "train/mercator_loss" not in control.names()
    assert "eval/success" not in control.names()


def test_nothing_is_written_beside_the_output_folder(tracked):
    folder, _, _ = tracked
    assert {path.name for path in folder.parent.iterdir()} == {"out"}


def test_a_resumed_run_keeps_its_name(tracked):
    folder, _, summary = tracked
    assert summary_of(folder)["arguments"]["resume_from_checkpoint"] == "true"
    assert summary_of(folder)["arguments"]["run_name"] == summary["arguments"]["run_name"]


@pytest.fixture(scope="module")
def awkward(tmp_path_factory):
    """A run whose trackers share one folder, and whose report has a picture that is none; what it printed."""
    folder = tmp_path_factory.mktemp("awkward")
    (folder / "out").mkdir()
    (folder / "out" / "report.png").write_bytes(b"no picture")
    options = {"max_steps": 1, "eval_strategy": "no", "evaluate_generation": "false"}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as shown:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "board"))
        patch.setattr(finish, "report_on", lambda *_: None)  # it would make a good picture
        assert run(folder / "out", report_to="tensorboard", **options) == 0
    return folder, shown.getvalue()


def test_a_common_folder_of_tensorboard_does_not_mix_the_controls_curves_in(awkward):
    folder, _ = awkward
    assert not list((folder / "out").glob("**/events.*"))
    events = Events(folder / "board")
    assert [path.name for path in events.folders] == ["board", "control"]
    assert len(events.points("train/loss")) == 2


def test_a_tracker_that_fails_at_the_end_is_told_and_stands_in_the_summary(awkward):
    folder, shown = awkward
    told = re.findall(r"^Warning: Reporting to tensorboard failed at step 1 \((.*)\); it is", shown, re.M)
    assert len(told) == 1
    assert "cannot identify image file" in told[0]
    summary = summary_of(folder / "out")
    kinds = [problem["kind"] for problem in summary["problems"]]
    assert (summary["status"], kinds.count("tracker"), {*kinds} - {"rollout_limit"}) == ("completed", 1, {"tracker"})


def test_an_evaluation_before_any_training_goes_to_the_output_folder(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(tmp_path / "out", tokenizer, report_to="tensorboard")
    trainer.evaluate()
    assert "eval/loss" in Events(tmp_path / "out" / "runs").names()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_trackers_see_the_plain_student(tmp_path, tokenizer, monkeypatch):
    seen = []

    class Looking(TensorBoardCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            super().on_train_end(args, state, control, **kwargs)
            seen.append(model)

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Looking)
    trainer = make_trainer(tmp_path, tokenizer, model=tiny_lora_llama, report_to="tensorboard")
    trainer.train()
    (config,) = Events(tmp_path / "runs").texts("model_config")
    assert json.loads(config)["hidden_size"] == 32
    assert seen == [trainer.student]
    assert trainer.problems == []


def test_several_trackers_are_named_with_commas(tmp_path):
    args = KavaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="tensorboard, trackio")
    assert args.report_to == ["tensorboard", "trackio"]


def test_without_trackers_nobody_is_told_anything(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, report_to="none")
    trainer.callback_handler.on_log = lambda *_: pytest.fail("something was logged")
    teacher = ModelFigures(perplexity=2.0, exact_match=None)
    tracking = RunTracking(trainer, Summary(evaluation=Evaluations(teacher=teacher), verdict=Verdict(success=True)))
    tracking.tell()
    tracking.attach_report(tmp_path)
    tracking.close(True)


def test_a_tracker_that_was_removed_is_left_alone(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, report_to="tensorboard")
    (tracker,) = trainer.trackers
    trainer.remove_callback(type(tracker.callback))
    RunTracking(trainer, Summary(verdict=Verdict(success=True))).attach_report(tmp_path)
    assert not list(tmp_path.glob("**/events.*"))


def test_tokens_of_the_command_line_are_not_what_trackers_find(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_kava.py", "args.json", "--hub_token", TOKEN, f"--hub-token={TOKEN}"])
    hide_tokens()
    assert sys.argv == ["run_kava.py", "args.json", "--hub_token", "<HUB_TOKEN>", "--hub-token=<HUB_TOKEN>"]


def records(path):
    """The records of a run that Weights & Biases keeps offline: a LevelDB log behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole record, or its last part
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def by_name(items):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


SERVICES = """
import os, sys, run_kava
code = run_kava.main(sys.argv[1:])
import wandb
assert wandb.run is None, "the run is still open"
sys.exit(code)
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A run with all three trackers in a process of its own, and its folder."""
    pytest.importorskip("trackio")
    pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("served")
    options = {**EVERY_TERM, "output_dir": folder / "out", "report_to": "tensorboard,trackio,wandb"}
    places = {"TRACKIO_DIR": folder / "trackio", "WANDB_DIR": folder, "WANDB_MODE": "offline", "WANDB_LOG_MODEL": "end"}
    command = [sys.executable, "-c", SERVICES, str(ROOT / "training_args" / "quickstart.json"), *words(options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **{name: str(place) for name, place in places.items()}}
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert result.returncode == 0, result.stderr
    return folder, result


def expected(folder):
    """The names of all lines, as TensorBoard got them, but for the totals, which these trackers take for no lines."""
    totals = {"runtime", "loss", "samples_per_second", "steps_per_second"}
    left_out = {f"train/train_{name}" for name in totals} | {"train/total_flos"}
    return (Events(folder / "out" / "runs").names() | {"train/global_step"}) - left_out


@pytest.mark.slow
def test_trackio_has_one_run_with_everything(served):
    folder, _ = served
    database = sqlite3.connect(folder / "trackio" / "huggingface.db")
    summary = summary_of(folder / "out")
    lines = [json.loads(line) for (line,) in database.execute("select metrics from metrics order by id")]
    assert {name for line in lines for name in line} == expected(folder) | {"verdict"}
    assert {name for (name,) in database.execute("select run_name from metrics")} == {summary["arguments"]["run_name"]}
    ((config,),) = database.execute("select config from configs").fetchall()
    config = json.loads(config)
    assert {name: config[name] for name in summary["arguments"] if name != "use_cache"} == {
        name: value for name, value in summary["arguments"].items() if name != "use_cache"
    }
    assert config["model/num_parameters"] == 181056
    ((files,),) = database.execute("select manifest from artifact_versions").fetchall()
    assert {file["path"] for file in json.loads(files)} == {"report.html", "report.png"}
    assert {problem["kind"] for problem in summary["problems"]} <= {"rollout_limit"}


@pytest.mark.slow
def test_wandb_has_one_run_with_everything_and_it_is_finished(served):
    folder, _ = served
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    found = {}
    for record in records(path):
        found.setdefault(record.WhichOneof("record_type"), []).append(record)
    lines = [by_name(record.history.item) for record in found["history"]]
    names = {name for line in lines for name in line if not name.startswith("_")}
    assert {name for name in names if not name.startswith("report/")} == expected(folder)
    summary = summary_of(folder / "out")
    assert found["run"][0].run.display_name == summary["arguments"]["run_name"]
    config = {}
    for record in found["config"]:
        config |= by_name(record.config.update)
    assert {name: config[name] for name in summary["arguments"]} == summary["arguments"]
    totals = {}
    for record in found["summary"]:
        totals |= by_name(record.summary.update)
    assert totals["verdict"].startswith("No success.")
    assert totals["train_loss"] > 0
    assert not [name for name in totals if "pair" in name]
    files = {"report": set(), "model": set()}
    for artifact in (record.artifact for record in found["artifact"]):
        files[artifact.type] |= {entry.path for entry in artifact.manifest.contents}
    assert files["report"] == {"report.html", "report.png"}
    assert {"config.json", "model.safetensors"} <= files["model"]
    assert list(path.parent.glob("files/media/html/report_*.html"))
    assert found["exit"][0].exit.exit_code == 0


@pytest.mark.slow
def test_no_tracker_has_the_token_and_none_complains(served):
    folder, result = served
    assert not [path for path in folder.glob("**/*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    shown = result.stdout + result.stderr
    assert "Reporting to" not in shown
    complaints = re.findall(r"^wandb: (?:WARNING|ERROR) (.*)", shown, re.M)
    assert complaints == ["URL not available in offline run"]  # for `WANDB_LOG_MODEL` Trainer asks for it
