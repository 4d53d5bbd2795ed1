"""Trust: no file runs code unasked, and no secret leaves through a log, a summary, a card or an error."""

import html
import json
import os
import pickle
import re
import subprocess
import sys

import pytest
import torch
from helpers.models import STUDENT_SIZE, tiny_llama
from helpers.places import ROOT
from helpers.programs import QUICKSTART, SHORT, words
from helpers.trainers import make_trainer
from transformers import AutoTokenizer

import run_kava
from kava_trainer.config.launcher import resume_command
from kava_trainer.distillation.projector_files import load_projectors
from kava_trainer.quickstart import STUDENT_FOLDER
from kava_trainer.trainer.checkpoint import write_manifest
from kava_trainer.utils import redaction
from kava_trainer.utils.errors import BadRequest

CODE = "it does not hold tensors and plain values alone, and anything else could be code, which is never run"


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def write_code(path, marker, plain=False):
    """A file that carries code: as `torch.save` writes it, or a bare pickle."""
    if plain:
        path.write_bytes(pickle.dumps({"state": Payload(marker)}))
    else:
        torch.save({"state": Payload(marker), "tensor": torch.zeros(2)}, path)


@pytest.mark.parametrize("plain", [False, True])
def test_a_projector_file_that_carries_code_is_refused(tmp_path, plain):
    write_code(tmp_path / "projector.pth", tmp_path / "marker", plain)
    with pytest.raises(BadRequest) as caught:
        load_projectors(tmp_path / "projector.pth")
    assert str(caught.value) == f"{tmp_path / 'projector.pth'} is not a projector file written by KAVA: {CODE}"
    assert not (tmp_path / "marker").exists()


def test_the_payload_of_these_tests_is_live(tmp_path):
    write_code(tmp_path / "file.pth", tmp_path / "marker")
    torch.load(tmp_path / "file.pth", weights_only=False)
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "projector.pth", "pytorch_model.bin"]
)
def test_a_checkpoint_that_carries_code_is_refused(tmp_path, tokenizer, name):
    settings = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, tokenizer, **settings).train()
    checkpoint = tmp_path / "checkpoint-1"
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    write_code(checkpoint / name, tmp_path / "marker")
    with pytest.raises(BadRequest, match="cannot be resumed"):  # its manifest does not know the file
        make_trainer(tmp_path, tokenizer, **settings).train(resume_from_checkpoint=str(checkpoint))
    write_manifest(checkpoint, None)
    with pytest.raises(BadRequest) as caught:
        make_trainer(tmp_path, tokenizer, **settings).train(resume_from_checkpoint=str(checkpoint))
    assert CODE in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "marker").exists()


def error_of(capsys, folder, **changes):
    options = {**QUICKSTART, **SHORT, "max_length": 120, "output_dir": folder / "out", **changes}
    assert run_kava.main(words(options)) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("Error: "))
    return line


def test_a_model_folder_with_nothing_but_a_pickle_that_carries_code_is_refused(tmp_path, capsys):
    folder = tmp_path / "student"
    tiny_llama(STUDENT_SIZE, 2).save_pretrained(folder)
    AutoTokenizer.from_pretrained(STUDENT_FOLDER).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    write_code(folder / "pytorch_model.bin", tmp_path / "marker")
    error = error_of(capsys, tmp_path, student_model_name_or_path=folder)
    assert error.startswith(f"Error: The student '{folder}' cannot be loaded: ")
    assert not (tmp_path / "marker").exists()


REMOTE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def model_with_code(folder, marker):
    tiny_llama(STUDENT_SIZE, 2).save_pretrained(folder)
    AutoTokenizer.from_pretrained(STUDENT_FOLDER).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(REMOTE.format(marker=str(marker)))
    return folder


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_model_that_brings_code_is_refused_unless_trusted(tmp_path, capsys, monkeypatch, role):
    folder = model_with_code(tmp_path / "model", tmp_path / "marker")
    error = error_of(capsys, tmp_path, **{f"{role}_model_name_or_path": folder})
    assert "it brings code of its own, which only trust_remote_code true runs; set it if you trust the source" in error
    assert not (tmp_path / "marker").exists()


def test_a_model_that_brings_code_is_loaded_where_it_is_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = model_with_code(tmp_path / "model", tmp_path / "marker")
    options = {**QUICKSTART, **SHORT, "max_length": 120, "max_steps": 1, "output_dir": tmp_path / "out"}
    options |= {"student_model_name_or_path": folder, "trust_remote_code": "true"}
    assert run_kava.main(words(options)) == 0
    assert (tmp_path / "marker").exists()


SECRETS = {
    "HF_TOKEN": "hf_plantedInTheEnvironment",
    "WANDB_API_KEY": "0123456789abcdefplanted0123456789abcdef0",
    "MY_SECRET_TOKEN": "planted-by-the-user-9f8e7d",
}
HUB_TOKEN = "hf_plantedOnTheCommandLine"


def assert_no_secret(folder, *texts):
    content = "".join(texts).encode() + b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    for secret in [*SECRETS.values(), HUB_TOKEN]:
        assert secret.encode() not in content


def with_secrets(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def test_a_run_that_succeeds_leaves_no_secret_anywhere(tmp_path, capfd, monkeypatch):
    with_secrets(monkeypatch)
    options = {**QUICKSTART, **SHORT, "hub_token": HUB_TOKEN, "output_dir": tmp_path, "save_steps": 1}
    assert run_kava.main(words(options)) == 0
    shown = capfd.readouterr()
    assert (tmp_path / "final_student" / "README.md").exists()
    assert "<HUB_TOKEN>" in (tmp_path / "run_summary.json").read_text()
    assert_no_secret(tmp_path, shown.out, shown.err)


def test_a_bad_request_shows_no_secret(tmp_path, capfd, monkeypatch):
    with_secrets(monkeypatch)
    secrets = [*SECRETS.values(), HUB_TOKEN]
    options = {**QUICKSTART, **SHORT, "hub_token": HUB_TOKEN, "output_dir": tmp_path / "out"}
    assert run_kava.main(words({**options, "push_to_hub": "true"})) == 2
    for secret in secrets:  # as a name that is not there, which messages repeat
        assert run_kava.main(words({**options, "student_model_name_or_path": f"/gone/{secret}"})) == 2
    shown = capfd.readouterr()
    assert shown.err.count("student_model_name_or_path names the folder /gone/***, which does not exist") == len(
        secrets
    )
    assert_no_secret(tmp_path, shown.out, shown.err)


BREAKS = """
import os, runpy, sys
from kava_trainer.trainer.checkpoint import write_manifest
from kava_trainer.trainer.trainer import KavaTrainer

def training_step(self, *_):
    raise AssertionError(f"Illegal header value {os.environ['HF_TOKEN']} {os.environ['MY_SECRET_TOKEN']} "
                         f"{os.environ['WANDB_API_KEY']} {self.args.hub_token}")

KavaTrainer.training_step = training_step
runpy.run_path("run_kava.py", run_name="__main__")
"""


@pytest.mark.slow
def test_a_traceback_shows_no_secret(tmp_path):
    options = {**QUICKSTART, **SHORT, "hub_token": HUB_TOKEN, "output_dir": tmp_path}
    result = subprocess.run(
        [sys.executable, "-c", BREAKS, *words(options)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **SECRETS, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert "AssertionError: Illegal header value *** *** *** ***" in result.stderr
    assert json.loads((tmp_path / "run_summary.json").read_text())["status"] == "failed"
    assert_no_secret(tmp_path, result.stdout, result.stderr)


@pytest.mark.parametrize("given", [["--hub_token", HUB_TOKEN], [f"--hub-token={HUB_TOKEN}"]])
def test_the_printed_command_has_a_placeholder_for_the_token(given, tmp_path):
    shown = resume_command(["args.json", *given, "--max_steps", "3"], tmp_path / "checkpoint-1")
    assert HUB_TOKEN not in shown
    assert re.search(r"args\.json '?--hub.token[ =]'?<HUB_TOKEN>' --max_steps 3 --resume_from_checkpoint", shown)


def test_settings_and_paths_are_no_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-and-longer")
    monkeypatch.setenv("MONKEY", "a monkey business")
    monkeypatch.setenv("AWS_TOKEN_FILE", str(tmp_path))
    monkeypatch.setenv("SHORT_TOKEN", "true")
    monkeypatch.setenv("MAX_TOKENS", "10000000000")
    text = f"false-and-longer a monkey business {tmp_path} true 10000000000"
    assert redaction.without_secrets(text) == text
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted-key")
    monkeypatch.setenv("DB_PASSWORD", "sk-planted-key-that-is-longer")
    assert redaction.without_secrets("sk-planted-key-that-is-longer, sk-planted-key") == "***, ***"
    monkeypatch.setenv("DB_PASSWORD", secret := 'planted "\\<&>\u00e9')
    for shown in (secret, json.dumps(secret), json.dumps(secret, ensure_ascii=False), html.escape(secret)):
        assert redaction.without_secrets(shown).strip('"') == "***"
