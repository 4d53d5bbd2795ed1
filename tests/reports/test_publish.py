"""A finished run and the hub: what arrives there, and that nothing local is harmed when it fails."""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout

import pytest
import torch
from helpers.fake_hub import OWNER, asked_hub
from helpers.places import ROOT
from helpers.programs import QUICKSTART, SHORT, words
from helpers.trainers import make_trainer
from huggingface_hub import HfApi, ModelCard, constants, snapshot_download
from huggingface_hub.utils import filter_repo_objects
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import run_kava
from kava_trainer import cli, load_projectors
from kava_trainer.config.parser import parse_arguments
from kava_trainer.quickstart import TEACHER_FOLDER
from kava_trainer.reports import publish
from kava_trainer.trainer.callbacks.hub import _STATE_FILES
from kava_trainer.utils.hub import hub_reason, show_bars

RUN = {**QUICKSTART, **SHORT, "max_steps": 1, "hub_token": "hf_planted", "projector_mlp_ratio": 0.5}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The output folder of a run whose commit the hub refused, with a report; what was shown is beside it."""
    folder, shown = tmp_path_factory.mktemp("finished") / "out", io.StringIO()
    options = {"push_to_hub": True, "hub_model_id": "me/run", "hub_private_repo": True, "hub_strategy": "end"}
    with pytest.MonkeyPatch.context() as patch, asked_hub(patch, folder.parent) as hub, redirect_stdout(shown):
        hub.failures["commit"] = 409
        patch.setenv("SECRET_KEY", "planted-secret")
        assert run_kava.main(words({**RUN, **options, "run_name": "planted-secret", "output_dir": folder})) == 0
    (folder.parent / "shown.txt").write_text(shown.getvalue())
    (folder / "report.html").write_text("<title>Report</title>")
    (folder / "report.png").write_bytes(b"\x89PNG picture")
    return folder


@pytest.fixture
def unharmed(finished):
    """The folder of `finished`, which has to be as it was in the end."""
    before = checksums(finished)
    yield finished
    assert checksums(finished) == before


def checksums(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def check_arrived(files, folder):
    """Everything of a run is in the repository, byte for byte, and no secret is."""
    student = folder / "final_student"
    local = {path.name: path.read_bytes() for path in student.iterdir() if path.name != "README.md"}
    for name in ("run_summary.json", "report.html", "report.png"):
        local |= {name: (folder / name).read_bytes()} if (folder / name).exists() else {}
    for name, content in local.items():
        assert files[name] == content, name
    beside = {"README.md", ".gitattributes", "recipe.json", "projector/config.json", "projector/projector.safetensors"}
    assert set(files) == {*local, *beside}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= set(files)
    for content in files.values():
        assert b"planted" not in content
    recipe = json.loads(files["recipe.json"])
    assert recipe["projector_mlp_ratio"] == 0.5
    assert json.loads(files["run_summary.json"])["status"] == "completed"


def push(*argv):
    return cli.main(["push", *map(str, argv)])


def test_a_run_arrives_at_its_end_and_loads_from_the_hub_in_three_lines(tmp_path, hub, capsys, monkeypatch):
    out = tmp_path / "out"
    options = {**RUN, "output_dir": out, "push_to_hub": True, "hub_model_id": "kava", "hub_private_repo": True}
    assert run_kava.main(words({**options, "hub_revision": "v1", "hub_strategy": "end"})) == 0
    name = f"{OWNER}/kava"
    repository = hub.repositories[name]
    assert repository.private
    assert (set(repository.branches), repository.messages) == ({"main", "v1"}, ["initial commit", "Distilled student"])
    assert set(repository.files("main")) == {".gitattributes"}
    check_arrived(repository.files("v1"), out)
    assert hub.tokens == {"hf_planted", None}  # the card is validated without one
    shown = capsys.readouterr().out
    assert re.search(rf"^Sending \d+ files, \d\.\d MB, to {name}$", shown, re.M)
    assert f"Pushed to {name}" in shown
    assert "hf_planted" not in shown

    card = ModelCard(repository.files("v1")["README.md"].decode())
    assert {result.metric_type for result in card.data.eval_results} == {"perplexity"}
    code = card.text.split("```python\n")[1].split("```")[0]
    assert 'revision="v1"' in code
    loaded = {}
    exec(code, loaded)
    capsys.readouterr()
    assert loaded["prompt"].startswith("Question: ")
    assert "The student has 0.18 million parameters." in card.text
    kept = AutoModelForCausalLM.from_pretrained(out / "final_student")
    for ours, theirs in zip(kept.parameters(), loaded["model"].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert len(loaded["tokenizer"]) == len(AutoTokenizer.from_pretrained(out / "final_student"))
    projectors = load_projectors(snapshot_download(name, revision="v1", allow_patterns="projector/*") + "/projector")
    (tmp_path / "recipe.json").write_bytes(repository.files("v1")["recipe.json"])
    assert parse_arguments([str(tmp_path / "recipe.json")]).training.max_steps == 1
    states = torch.randn(3, projectors[0].config.input_size)
    trained = load_projectors(out / "final_projector.pth").eval()
    assert torch.equal(projectors.eval()[0](states), trained[0](states))


def test_a_run_is_pushed_after_the_fact_and_again(unharmed, hub, capsys):
    assert push(unharmed, "me/after", "--private") == 0
    assert hub.repositories["me/after"].private
    check_arrived(hub.repositories["me/after"].files(), unharmed)
    card = hub.repositories["me/after"].files()["README.md"].decode()
    assert '.from_pretrained("me/after")' in card
    assert "](report.png)" in card
    assert "from_pretrained" in (unharmed / "final_student" / "README.md").read_text()
    shown = capsys.readouterr().out
    assert shown.endswith(f"Pushed to me/after (private): {hub.address}/me/after\n")
    assert "is there already" not in shown
    assert push(unharmed, "me/after", "--revision", "second/try") == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "me/after is there already: files of the same names are replaced in it."
    assert shown[-1] == f"Pushed to me/after: {hub.address}/me/after/tree/second%2Ftry"
    assert 'revision="second/try"' in hub.repositories["me/after"].files("second/try")["README.md"].decode()
    assert [name for name, _ in hub.asked].count("upload") == 3  # the large files of the first push are there already


def test_a_name_without_an_owner_is_that_of_the_tokens_user(unharmed, hub, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    for said in (False, True):
        assert push(unharmed, "kava") == 0
        check_arrived(hub.repositories[f"{OWNER}/kava"].files(), unharmed)
        shown = capsys.readouterr().out
        assert f"to {OWNER}/kava\n" in shown
        assert shown.endswith(f"Pushed to {OWNER}/kava: {hub.address}/{OWNER}/kava\n")
        assert (f"{OWNER}/kava is there already" in shown) is said


def test_what_an_earlier_push_left_does_not_stay_where_it_would_be_loaded(unharmed, hub):
    HfApi().create_repo("me/old")
    old = {
        "adapter_config.json": b"{}", "adapter_model.safetensors": b"old", "model-00001-of-00002.safetensors": b"old",
        "projector/other.safetensors": b"old", "LICENSE": b"mine", "last-checkpoint/model.safetensors": b"kept",
    }  # fmt: skip
    hub.repositories["me/old"].commit("main", old, "by hand")
    assert push(unharmed, "me/old") == 0
    files = hub.repositories["me/old"].files()
    assert {"LICENSE", "last-checkpoint/model.safetensors"} < set(files)
    assert not {name for name in old if old[name] == b"old" or name == "adapter_config.json"} & set(files)


def test_a_card_that_was_changed_by_hand_is_sent_as_it_is(finished, tmp_path, hub, capsys):
    shutil.copytree(finished, tmp_path / "out")
    card = tmp_path / "out" / "final_student" / "README.md"
    card.write_text(card.read_text().replace("## Cost", "## My own words"))
    assert push(tmp_path / "out", "me/changed") == 0
    assert hub.repositories["me/changed"].files()["README.md"] == card.read_bytes()
    assert f"{card} was changed by hand, so it is sent as it is." in capsys.readouterr().out


def test_a_secret_of_this_machine_is_not_sent_with_files_of_another(finished, tmp_path, hub, monkeypatch):
    shutil.copytree(finished, tmp_path / "out")
    summary = tmp_path / "out" / "run_summary.json"
    summary.write_text(summary.read_text().replace('"run_name": "***"', '"run_name": "known-here-only"'))
    assert "known-here-only" in summary.read_text()
    monkeypatch.setenv("HF_TOKEN", "known-here-only")
    assert push(tmp_path / "out", "me/clean") == 0
    assert b"known-here-only" not in b"".join(hub.received)
    assert json.loads(hub.repositories["me/clean"].files()["run_summary.json"])["arguments"]["run_name"] == "***"


def test_an_adapter_arrives_as_one_and_its_finals_are_found_elsewhere(tmp_path, hub, monkeypatch):
    out, final = tmp_path / "out", tmp_path / "final"
    options = {**RUN, "student_model_name_or_path": TEACHER_FOLDER, "use_peft": True, "merge_adapter": False}
    assert run_kava.main(words({**options, "output_dir": out, "final_dir": final, "lora_r": 2})) == 0
    assert push(out, "me/adapter") == 0
    files = hub.repositories["me/adapter"].files()
    assert {"adapter_config.json", "adapter_model.safetensors", "projector/config.json", "recipe.json"} < set(files)
    assert "model.safetensors" not in files
    card = ModelCard.load("me/adapter")
    assert (card.data.library_name, card.data.base_model) == ("peft", None)  # its base is a local folder
    assert "lora" in card.data.tags
    base = AutoModelForCausalLM.from_pretrained(TEACHER_FOLDER)
    ids = torch.arange(5)[None]
    here = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(TEACHER_FOLDER), final / "final_student")
    assert torch.equal(PeftModel.from_pretrained(base, "me/adapter")(ids).logits, here(ids).logits)


STAGES = [
    ("create", 401, "the token is missing or not accepted, HTTP 401"),
    ("create", "hang", "the hub has not answered within 0.5 seconds"),
    ("validate", 400, "it does not take the metadata of README.md: As asked"),
    ("branch", 403, "the token may not write there, HTTP 403"),
    ("tree", 500, "the hub itself failed, HTTP 500"),
    ("preupload", 401, "the token is missing or not accepted, HTTP 401"),
    ("preupload", "hang", "the hub has not answered within 0.5 seconds"),
    ("batch", 403, "the token may not write there, HTTP 403"),
    ("upload", 500, "the hub itself failed, HTTP 500"),
    ("upload", "hang", "the hub has not answered within 0.5 seconds"),
    ("commit", 409, "something else was changing there at the same time, HTTP 409"),
    ("commit", 500, "the hub itself failed, HTTP 500"),
    ("commit", "hang", "the hub has not answered within 0.5 seconds"),
]


def patience(monkeypatch, seconds):
    monkeypatch.setattr(publish, "STUDENT_SECONDS", seconds)
    monkeypatch.setattr(publish, "ANSWER_SECONDS", seconds)


@pytest.mark.parametrize(("stage", "failure", "reason"), STAGES, ids=lambda value: str(value).replace(" ", "-")[:12])
def test_a_push_that_fails_says_why_and_how_to_try_again(unharmed, hub, capsys, monkeypatch, stage, failure, reason):
    patience(monkeypatch, 0.5 if failure == "hang" else 600)
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    hub.failures[stage] = failure
    assert push(unharmed, "me/fails", "--revision", "v1") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"Error: The student could not be sent to me/fails ({reason}")
    again = f"python -m kava_trainer push {unharmed} me/fails --revision v1"
    assert error.endswith(f"It is whole in {unharmed / 'final_student'}; push it again with: {again}")
    assert "hf_planted" not in error
    if "me/fails" in hub.repositories:
        assert set(hub.repositories["me/fails"].files()) == {".gitattributes"}
    hub.failures.clear()
    hub.released.set()
    patience(monkeypatch, 600)
    assert push(*again.split()[4:]) == 0
    check_arrived(hub.repositories["me/fails"].files("v1"), unharmed)


def test_a_run_whose_commit_conflicts_is_complete_and_names_the_command(unharmed, hub):
    shown = (unharmed.parent / "shown.txt").read_text()
    command = f"python -m kava_trainer push {unharmed} me/run --private"
    assert re.search(r"^Warning: The student could not be sent to me/run \(something else .* HTTP 409\)\.", shown, re.M)
    assert command in shown
    assert "planted" not in shown
    summary = json.loads((unharmed / "run_summary.json").read_text())
    assert (summary["status"], [problem["kind"] for problem in summary["problems"]]) == ("completed", ["hub"])
    assert push(*command.split()[4:]) == 0
    assert hub.repositories["me/run"].private


@pytest.mark.slow
def test_a_process_ends_though_the_hub_holds_its_upload(unharmed, hub):
    hub.failures["upload"] = "hang"
    code = (
        "import sys; from kava_trainer import cli; from kava_trainer.reports import publish; "
        "publish.STUDENT_SECONDS = 1; sys.exit(cli.main(sys.argv[1:]))"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    result = subprocess.run(
        [sys.executable, "-c", code, "push", unharmed, "me/held"],
        capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT,
    )  # fmt: skip
    assert result.returncode == 1
    assert "(the hub has not answered within 1 seconds)" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_signal_ends_a_push_at_once(unharmed, hub, capsys, monkeypatch):
    class Answering(dict):
        def get(self, name, default=None):
            if name == "upload":
                os.kill(os.getpid(), 2)
                return "hang"
            return default

    hub.failures = Answering()
    assert push(unharmed, "me/held") == 130
    again = f"python -m kava_trainer push {unharmed} me/held"
    assert capsys.readouterr().err.splitlines()[-1] == f"Interrupted. Push again with: {again}"


BAD = {
    "no folder": (lambda folder: shutil.rmtree(folder), "There is no folder"),
    "no summary": (lambda folder: (folder / "run_summary.json").unlink(), "has no run_summary.json"),
    "no json": (lambda folder: (folder / "run_summary.json").write_text("{"), "run_summary.json cannot be read"),
    "no student": (lambda folder: shutil.rmtree(folder / "final_student"), "There is no finished student in"),
    "interrupted": (
        lambda folder: change_status(folder, "interrupted"),
        "was interrupted at step 1, when its student was finished, but not all of it was measured. Go on with its own "
        "command and --resume_from_checkpoint true.",
    ),
}


def change_status(folder, status):
    summary = folder / "run_summary.json"
    summary.write_text(json.dumps({**json.loads(summary.read_text()), "status": status}))


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_pushed_is_a_bad_request(finished, tmp_path, hub, capsys, case):
    spoil, said = BAD[case]
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    summary = json.loads((out / "run_summary.json").read_text())
    summary["arguments"]["final_dir"] = str(out)
    (out / "run_summary.json").write_text(json.dumps(summary))
    spoil(out)
    assert push(out, "me/bad") == 2
    assert said in capsys.readouterr().err
    assert hub.asked == []


@pytest.mark.parametrize("name", ["a/b/c", "me/my model", "x--y/z"])
def test_a_wrong_name_is_a_bad_request(unharmed, hub, capsys, name):
    assert push(unharmed, name) == 2
    assert f"{name!r} cannot be the name of a repository; write owner/name" in capsys.readouterr().err


def test_a_public_repository_is_not_taken_for_a_private_one(unharmed, hub, capsys):
    HfApi().create_repo("me/public")
    assert push(unharmed, "me/public", "--private") == 2
    assert "me/public is there already and public." in capsys.readouterr().err
    assert push(unharmed, "me/public") == 0
    asked = {"push_to_hub": True, "hub_model_id": "me/public", "hub_private_repo": True, "output_dir": unharmed / "no"}
    assert run_kava.main(words({**RUN, **asked})) == 2
    assert "me/public is there already and public." in capsys.readouterr().err


def test_offline_is_said_in_one_line(unharmed, hub, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert push(unharmed, "me/offline") == 1
    assert "HF_HUB_OFFLINE" in capsys.readouterr().err
    assert hub.asked == []


def test_the_bars_of_the_hub_are_as_they_were(monkeypatch):
    for disabled in (True, False):
        show_bars(not disabled)
        for shown in (True, False):
            with publish._bars(shown):
                assert publish.are_progress_bars_disabled() is not shown
            assert publish.are_progress_bars_disabled() is disabled


def test_checkpoints_are_sent_without_bars_among_the_status_lines(tmp_path, tokenizer, hub, capsys):
    show_bars(True)
    settings = {"save_strategy": "steps", "save_steps": 1, "hub_strategy": "checkpoint", "hub_model_id": "me/steps"}
    trainer = make_trainer(tmp_path, tokenizer, push_to_hub=True, hub_token="hf_planted", max_steps=1, **settings)
    trainer.train()
    assert trainer.problems == []
    assert "last-checkpoint/optimizer.pt" in hub.repositories["me/steps"].files()
    assert "%" not in capsys.readouterr().err
    assert show_bars(False)


def test_a_sharded_checkpoint_gives_the_student_alone_to_each_save():
    student = ["config.json", "model.safetensors", "tokenizer.json"]
    state = ["optimizer_0/.metadata", "optimizer_0/__0_0.distcp", "pytorch_model_fsdp_0/__1_0.distcp", "scheduler.pt"]
    assert list(filter_repo_objects([*student, *state], ignore_patterns=_STATE_FILES)) == student


def test_reasons_are_those_of_the_cause():
    error = RuntimeError("Error while uploading 'model.safetensors' to the Hub.")
    error.__cause__ = ConnectionError("no network")
    assert hub_reason(error) == "no network"
    assert hub_reason(json.JSONDecodeError("Expecting value", "", 0)) == "its answer was not what a hub answers"


@pytest.mark.parametrize("blocking", [True, False])
def test_a_trainer_sends_its_student_and_nothing_else(tmp_path, tokenizer, hub, blocking):
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "hub_token": "hf_planted"}
    trainer = make_trainer(tmp_path / "out", tokenizer, hub_model_id="me/sent", hub_private_repo=True, **settings)
    trainer.train()
    trainer.student.model_tags = ["mine", "asked"]
    sent = trainer.push_to_hub("My words", blocking=blocking, tags="asked")
    commit = sent if blocking else sent.result()
    repository = hub.repositories["me/sent"]
    assert commit.commit_message == repository.messages[-1] == "My words"
    assert repository.private
    files = repository.files()
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(files)
    assert not [name for name in files if name.startswith("checkpoint") or name.endswith((".bin", ".pth", ".pt"))]
    card = ModelCard(files["README.md"].decode()).data
    assert card.library_name == "transformers"
    assert [tag for tag in card.tags if tag in ("mine", "asked")] == ["asked", "mine"]
    loaded = AutoModelForCausalLM.from_pretrained("me/sent")
    for name, weight in trainer.student.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
