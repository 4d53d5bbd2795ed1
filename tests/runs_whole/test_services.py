"""Trackers and the hub fail in every way, and the training goes on: told in one line, noted, everything local whole."""

import json
import re
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from helpers.programs import QUICKSTART, SHORT, words
from helpers.trainers import loss_lines, make_trainer
from huggingface_hub import HfApi, constants
from transformers import TrainerCallback
from transformers.integrations import integration_utils

import run_kava
from kava_trainer.reports import publish
from kava_trainer.trainer.callbacks import hub
from kava_trainer.trainer.checkpoint import broken_reason
from kava_trainer.trainer.trainer import KavaTrainer


class Tracker(TrainerCallback):
    """Fails at one event of one step, and counts what it is called for."""

    event, step = "on_log", 2

    def __init__(self):
        self.calls = []

    def _called(self, name, state):
        self.calls.append((name, state.global_step))
        if name == self.event and state.global_step >= self.step:
            raise ConnectionError("the service is gone\nand this line is not for the user")

    def on_train_begin(self, args, state, control, **kwargs):
        self._called("on_train_begin", state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self._called("on_log", state)

    def on_save(self, args, state, control, **kwargs):
        self._called("on_save", state)

    def on_train_end(self, args, state, control, **kwargs):
        self._called("on_train_end", state)


def tracked(monkeypatch, event, step):
    kind = type("Tracker", (Tracker,), {"event": event, "step": step})
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "trackio", kind)
    return kind


@pytest.mark.parametrize(
    ("event", "step"), [("on_train_begin", 0), ("on_log", 2), ("on_save", 2), ("on_train_end", 4)], ids=str
)
def test_a_tracker_that_fails_is_told_once_and_left_out(tmp_path, tokenizer, capsys, monkeypatch, event, step):
    kind = tracked(monkeypatch, event, step)
    settings = {"report_to": "trackio", "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path, tokenizer, **settings)
    (tracker,) = (callback for callback in trainer.callback_handler.callbacks if isinstance(callback, kind))
    trainer.train()
    assert len({line["step"] for line in loss_lines(trainer)}) == 4
    assert broken_reason(tmp_path / "checkpoint-4") is None
    assert tracker.calls[-1] == (event, step)
    told = f"Warning: Reporting to trackio failed at step {step} (the service is gone); it is left out from here on."
    shown = capsys.readouterr().out
    assert shown.count("Reporting to") == 1
    assert told in shown.splitlines()
    action = "left trackio out from here on: the service is gone"
    assert trainer.problems == [{"step": step, "kind": "tracker", "action": action}]


def test_a_sound_tracker_hears_everything_and_can_be_removed_by_its_class(tmp_path, tokenizer, monkeypatch):
    kind = tracked(monkeypatch, None, 0)
    trainer = make_trainer(tmp_path, tokenizer, report_to="trackio")
    (tracker,) = (callback for callback in trainer.callback_handler.callbacks if type(callback) is kind)
    trainer.train()
    assert {name for name, _ in tracker.calls} == {"on_train_begin", "on_log", "on_train_end"}
    trainer.remove_callback(kind)
    assert tracker not in trainer.callback_handler.callbacks
    assert trainer.problems == []


def test_callbacks_of_the_user_are_not_guarded(tmp_path, tokenizer, monkeypatch):
    kind = tracked(monkeypatch, "on_log", 1)
    trainer = make_trainer(tmp_path, tokenizer, report_to="trackio")
    trainer.remove_callback(kind)
    trainer.add_callback(kind)
    with pytest.raises(ConnectionError):
        trainer.train()


@contextmanager
def server(answer, when_asked=lambda: None):
    """A hub at 127.0.0.1 that answers every request with one status, or never; its address and what it was asked."""
    asked, release = [], threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(self.path)
            when_asked()
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if answer is None:
                release.wait(60)
                return
            self.send_response(answer)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD = do_POST

        def log_message(self, *_):
            pass

    hub_server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub_server.daemon_threads = True
    threading.Thread(target=hub_server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{hub_server.server_port}", asked
    finally:
        release.set()
        hub_server.shutdown()
        hub_server.server_close()


def online(monkeypatch, address):
    """Let the hub's client ask this address, without the pauses between its attempts."""
    impatient = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    monkeypatch.setattr("huggingface_hub.utils._http.time", impatient)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(KavaTrainer, "init_hf_repo", lambda self, **kwargs: setattr(self, "hub_model_id", "me/student"))


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def pushing_trainer(folder, tokenizer, **changes):
    settings = {
        "save_strategy": "steps",
        "save_steps": 1,
        "push_to_hub": True,
        "hub_token": "hf_planted",
        "max_steps": 3,
    }
    return make_trainer(folder, tokenizer, hub_strategy="checkpoint", **{**settings, **changes})


def check_pushes(trainer, folder, shown, reason):
    """Training ended, every checkpoint is whole, and the failures are told in one line and noted."""
    assert trainer.state.global_step == 3
    assert all(broken_reason(folder / f"checkpoint-{step}") is None for step in (1, 2, 3))
    lines = [line for line in shown.splitlines() if "was not sent to the hub" in line]
    assert len(lines) == 1
    assert re.match(
        rf"Warning: checkpoint-1 was not sent to the hub \({reason}\)\. It is whole in \S+checkpoint-1\.$", lines[0]
    )
    assert trainer.problems
    assert {problem["kind"] for problem in trainer.problems} == {"hub"}
    assert trainer.problems[0]["step"] == 1
    assert re.match(rf"did not send checkpoint-1: {reason}$", trainer.problems[0]["action"])


STATUSES = {
    401: "the token is missing or not accepted, HTTP 401",
    403: "the token may not write there, HTTP 403",
    500: "the hub itself failed, HTTP 500",
    507: "no space is left there, HTTP 507",
}


@pytest.mark.parametrize("status", STATUSES)
def test_a_hub_that_refuses_checkpoints_does_not_end_the_training(tmp_path, tokenizer, capsys, monkeypatch, status):
    with server(status) as (address, asked):
        online(monkeypatch, address)
        trainer = pushing_trainer(tmp_path, tokenizer, hub_always_push=True)
        trainer.train()
    assert asked
    shown = capsys.readouterr()
    check_pushes(trainer, tmp_path, shown.out, STATUSES[status])
    assert "Retrying" not in shown.err
    assert len(trainer.problems) == 3


@pytest.mark.parametrize(
    ("address", "reason"),
    [(lambda: f"http://127.0.0.1:{closed_port()}", ".*refused.*"), (lambda: "http://no.such.host.invalid", ".+")],
    ids=["refused", "no name"],
)
def test_a_hub_that_cannot_be_reached_does_not_end_the_training(
    tmp_path, tokenizer, capsys, monkeypatch, address, reason
):
    online(monkeypatch, address())
    trainer = pushing_trainer(tmp_path, tokenizer)
    trainer.train()
    check_pushes(trainer, tmp_path, capsys.readouterr().out, reason)


def test_a_hub_that_never_answers_delays_the_end_only_so_long(tmp_path, tokenizer, capsys, monkeypatch):
    monkeypatch.setattr(hub, "CHECKPOINT_SECONDS", 0.5)
    with server(None) as (address, asked):
        online(monkeypatch, address)
        trainer = pushing_trainer(tmp_path, tokenizer)
        trainer.train()
        assert len(asked) == 1  # the later ones do not pile up
    shown = capsys.readouterr().out
    assert "Waiting for the hub, 0.5 seconds at most." in shown
    check_pushes(trainer, tmp_path, shown, "the hub has not taken it within 0.5 seconds")


def test_a_hub_that_does_not_answer_before_the_training_is_a_bad_request(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hub, "ANSWER_SECONDS", 0.3)
    with server(None) as (address, _):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        # transformers keeps its client, and the first test that needed one may have made it for another address.
        monkeypatch.setattr("transformers.trainer.hf_api", lambda: HfApi(endpoint=address), raising=False)
        options = {**QUICKSTART, **SHORT, "output_dir": tmp_path, "push_to_hub": "true", "hub_token": "hf_planted"}
        assert run_kava.main(words(options)) == 2
    assert "Error: push_to_hub true needs the hub, which cannot be reached (the hub has not answered within 0.3 " in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (None, r"cannot be reached \(.+\)\. Or write push_to_hub false"),
        (401, r"did not make the run's repository \(the token is missing or not accepted, HTTP 401\)\. Log in with hf "
         "auth login, or set HF_TOKEN. Or write push_to_hub false"),
    ],
    ids=str,
)  # fmt: skip
def test_a_hub_that_makes_no_repository_is_named_before_the_training(tmp_path, capsys, monkeypatch, status, said):
    make_repository = KavaTrainer.init_hf_repo
    with server(status or 200) as (address, _):
        online(monkeypatch, address if status else f"http://127.0.0.1:{closed_port()}")
        monkeypatch.setattr(KavaTrainer, "init_hf_repo", make_repository)
        monkeypatch.setattr("transformers.trainer.hf_api", lambda: HfApi(endpoint=constants.ENDPOINT), raising=False)
        options = {**QUICKSTART, **SHORT, "output_dir": tmp_path / "out", "push_to_hub": "true"}
        assert run_kava.main(words({**options, "hub_model_id": "me/kava", "hub_token": "hf_planted"})) == 2
    error = capsys.readouterr().err
    assert re.search(rf"^Error: push_to_hub true needs the hub, which {said}, and send the student afterwards: ", error)
    assert error.rstrip().endswith(f"python -m kava_trainer push {tmp_path / 'out'} me/kava")
    assert not (tmp_path / "out").exists()


def test_a_wrong_name_on_the_hub_is_a_bad_request(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    options = {**QUICKSTART, **SHORT, "output_dir": tmp_path / "out", "push_to_hub": "true", "hub_model_id": "a/b/c"}
    assert run_kava.main(words(options)) == 2
    assert "hub_model_id is 'a/b/c'; write it as owner/name" in capsys.readouterr().err


def test_checkpoints_are_whole_and_pushed_in_order_before_anything_is_sent(tmp_path, tokenizer, monkeypatch):
    sent = []

    def upload(self, folder_path, **kwargs):
        time.sleep(0.05)
        sent.append((folder_path.name, broken_reason(folder_path) is None))

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    monkeypatch.setattr(KavaTrainer, "init_hf_repo", lambda self, **kwargs: setattr(self, "hub_model_id", "me/student"))
    pushing_trainer(tmp_path, tokenizer, hub_always_push=True).train()
    assert sent == [(f"checkpoint-{step}", True) for step in (1, 2, 3)]


def test_a_run_whose_hub_fails_at_the_end_is_complete_on_disk(tmp_path, capsys, monkeypatch):
    seen = []

    def look():
        seen.append(json.loads((tmp_path / "run_summary.json").read_text())["status"])

    monkeypatch.setattr(publish, "STUDENT_SECONDS", 0.3)
    with server(None, look) as (address, _):
        online(monkeypatch, address)
        options = {**QUICKSTART, **SHORT, "output_dir": tmp_path, "push_to_hub": "true", "hub_strategy": "end"}
        assert run_kava.main(words({**options, "hub_token": "hf_planted", "max_steps": 1})) == 0
    assert set(seen) == {"completed"}
    shown = capsys.readouterr().out
    assert "could not be sent to me/student (the hub has not answered within 0.3 seconds). It is whole in" in shown
    assert f"push it again with: python -m kava_trainer push {tmp_path} me/student" in shown
    problems = json.loads((tmp_path / "run_summary.json").read_text())["problems"]
    assert [problem["kind"] for problem in problems] == ["hub"]
    assert (tmp_path / "final_student" / "model.safetensors").exists()
