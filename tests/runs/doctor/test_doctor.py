"""`doctor`: what it passes trains, what a run refuses it refuses too, and each finding ends with what to change."""

import json
import re
import shutil
import sys
import time
from collections import namedtuple
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from helpers.bad_requests import BAD_REQUESTS
from helpers.data import write_dataset
from helpers.models import tiny_model
from helpers.places import ROOT
from helpers.programs import MEMORY, QUICKSTART, RECIPES, SHORT, words
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kava_trainer.cli import main
from kava_trainer.config.arguments import KavaTrainingArguments
from kava_trainer.config.launcher import start_command
from kava_trainer.quickstart import STUDENT_FOLDER, TEACHER_FOLDER
from kava_trainer.quickstart.problems import generate_problems
from kava_trainer.runs import advice, setup
from kava_trainer.runs.doctor import folders, machine
from kava_trainer.runs.doctor.data import marked_text
from kava_trainer.runs.doctor.findings import Checkup, what_and_change
from kava_trainer.utils.console import Console
from kava_trainer.utils.errors import BadRequest, Problem
from kava_trainer.utils.hub import in_time

Usage = namedtuple("Usage", "total used free")


class Told:
    """What doctor printed: the lines of its checks, and what to change."""

    def __init__(self, code, text):
        self.code, self.text = code, text
        lines, _, end = text.partition("\n== What to change\n")
        self.lines = lines.splitlines()
        self.changes = [line.split(" ", 1)[1] for line in end.splitlines() if re.match(r"\d+\. ", line)]
        self.end = end

    def of(self, level):
        return [line[12:] for line in self.lines if line.startswith(f"{level:<11} ")]


@pytest.fixture
def doctor(tmp_path, capsys):
    def examine(*argv, **changes):
        options = {**QUICKSTART, **SHORT, "max_length": 128, "output_dir": tmp_path / "out", **changes}
        capsys.readouterr()
        code = main(["doctor", *argv, *words({name: value for name, value in options.items() if value is not None})])
        return Told(code, capsys.readouterr().out)

    return examine


@pytest.fixture
def quick(monkeypatch):
    """Leaves the memory estimate out, which takes longer than all else."""
    for module in (setup, folders):
        monkeypatch.setattr(module, "estimate_memory", lambda arguments: MEMORY)


def everything_in(folder):
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def test_a_sound_request_passes_with_a_line_a_check_and_the_command_to_start(doctor, tmp_path):
    told = doctor(str(ROOT / "training_args" / "quickstart.json"), max_eval_samples=50, warmup_steps=1)
    assert told.code == 0
    assert not told.of("Problem") + told.of("Warning") + told.of("Not checked")
    assert {line.split(":")[0] for line in told.of("OK")} == {
        *("Arguments", "Packages", "Device", "Processes", "Trackers", "Tokenizers", "Teacher", "Student", "Data"),
        *("Alignment", "Trainer", "Memory", "Disk", "Output"),
    }
    for part in (
        "Teacher: quickstart, Qwen2ForCausalLM, 4 layers of width 128, 0.85 M parameters, float32, weights 3.4 MB.",
        "Data: 64 rows with question + answer; held out: 50.",
        "Data: of 64 training examples 0 are cut to 128 tokens, 0 dropped without an answer.",
        "Alignment: layers (1, 1), (3, 4) (student, teacher), projector 64 -> 128.",
        f"Output: {tmp_path / 'out'} is new.",
    ):
        assert part in told.of("OK")
    assert told.end.startswith("Nothing to change.\nStart with: python -m kava_trainer train ")
    assert told.text.isascii()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(recipe, marks=[] if "lora" in recipe or "seed" in recipe else pytest.mark.slow)
        for recipe in RECIPES
    ],
)
def test_what_trains_passes(doctor, recipe):  # test_every_recipe_runs_on_the_quickstart trains the same
    options = {"max_steps": 2, "gradient_accumulation_steps": 2, "max_length": None}
    path = ROOT / "training_args" / recipe
    if "student_num_layers" in json.loads(path.read_text()):  # of the embedded teacher's four, and no student is named
        options |= {"student_num_layers": 3, "student_model_name_or_path": "null"}
    told = doctor(str(path), **options)
    assert told.code == 0, told.text
    assert not told.of("Not checked")


ELSEWHERE = {"unknown tracker": "report_to tensorbord cannot be used"}
"""What doctor says where the run says less."""


LONG = {case for case in BAD_REQUESTS if case.startswith("damaged")}
"""They train a run first; a damaged checkpoint is in the test of an earlier run too."""


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case in LONG else []) for case in BAD_REQUESTS]
)
@pytest.mark.usefixtures("quick")
def test_what_a_run_refuses_is_refused_and_nothing_is_written(doctor, tmp_path, case):
    make_changes, message = BAD_REQUESTS[case]
    changes = make_changes(tmp_path)
    before = everything_in(tmp_path)
    told = doctor(**changes)
    assert told.code == 2
    problems = told.of("Problem")
    assert re.search(ELSEWHERE.get(case, message), "\n".join([*problems, *told.changes])), told.text
    assert len(problems) == len([change for change in told.changes if "(not needed to train)" not in change])
    assert "Start with" not in told.end
    assert everything_in(tmp_path) == before


ADVICE = {
    "missing teacher": "Arguments: Write the path of one that is there, or an id on the hub.",
    "unknown columns": "Data: Rename yours to one of these.",
    "unknown split": "Data: Set dataset_train_split to one of train, test.",
    "other tokenizer": "Tokenizers: Write on_policy_fraction 0, or name a student of the teacher's family.",
    "small vocabulary": "Alignment: Give the student a vocab_size of at least 497.",
    "corrupted teacher": "Teacher: Download or copy it again.",
    "too many pairs": "Alignment: Write uniform:3 or less.",
    "checkpoint": "Output: Write true for the newest.",
    "unknown tracker": "Trackers: Install what it needs, or write another.",
    "student is a file": "Disk: Move it or set final_dir.",
    "output is a file": "Disk: Choose another folder.",
    "eval without data": "Data: Write no.",
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("case", ADVICE)
def test_a_problem_ends_with_what_to_change(doctor, tmp_path, case):
    told = doctor(**BAD_REQUESTS[case][0](tmp_path))
    assert any(re.fullmatch(ADVICE[case], change) for change in told.changes), told.changes


@pytest.mark.parametrize(
    ("problem", "what", "advice"),
    [
        (("max_length is 1;", "write 2. Or less."), "max_length is 1.", "Write 2. Or less."),
        (
            ("A is wrong. B too; it is so.", "Name another; or C."),
            "A is wrong. B too; it is so.",
            "Name another; or C.",
        ),
        (("It reads 64 tokens at most.",), "It reads 64 tokens at most.", "what is named above."),
    ],
)
def test_a_problem_is_what_is_wrong_and_what_to_change(problem, what, advice):
    assert str(Problem(None, *problem)) == " ".join(problem)
    assert what_and_change(Problem(None, *problem)) == (what, advice)


def test_several_problems_are_found_at_once(doctor, tmp_path):
    data = write_dataset(tmp_path, '{"x": "a"}\n' * 3)
    told = doctor(dataset_name=data, layer_mapping="[[3, 9]]", report_to="tensorbord")
    assert [line.split(":")[0] for line in told.of("Problem")] == ["Trackers", "Data", "Alignment"]
    assert {line.split(":")[0] for line in told.of("Not checked")} == {"Memory", "Start", "Output"}
    assert len(told.changes) == 3


def test_wrong_arguments_are_listed_and_the_machine_is_looked_at_all_the_same(doctor):
    told = doctor("--max_stps=3", projector_dropout=2.0)
    assert told.code == 2
    assert told.changes == ["Arguments: Did you mean 'max_steps'?", "Arguments: Write a number from 0 to below 1."]
    assert told.of("OK")[0].startswith("Packages: Python 3.")


@pytest.mark.usefixtures("quick")
def test_a_version_that_is_too_old_is_a_warning(doctor, monkeypatch):
    monkeypatch.setattr(machine, "requires", lambda name: ["torch>=99", "nothing-of-the-kind>=1", 'x; extra == "y"'])
    told = doctor()
    assert told.code == 0
    assert told.of("Warning")[0] == f"Packages: torch is {version('torch')}, and KAVA wants >=99."
    assert told.changes[:2] == [
        'Packages (not needed to train): Run pip install "torch>=99".',
        'Packages (not needed to train): Run pip install "nothing-of-the-kind>=1".',
    ]
    assert "Start with: " in told.end


@pytest.fixture
def one_check(capsys):
    """Does one check by itself, for what this machine does not have."""

    def run(work, *arguments):
        checkup = Checkup(Console(plain=True))
        checkup.check("It", lambda: work(checkup, *arguments))
        checkup.conclude("go")
        return Told(0 if checkup.passed else 2, capsys.readouterr().out)

    return run


def test_a_device_without_bfloat16_is_a_warning(one_check, monkeypatch):
    monkeypatch.setattr(machine, "device_name", lambda device: "Some GPU")
    monkeypatch.setattr(machine, "describe_memory", lambda device: "8 GiB")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    model = SimpleNamespace(teacher_dtype="auto", student_dtype="bfloat16")
    told = one_check(
        machine.check_device,
        SimpleNamespace(model=model, training=SimpleNamespace(device=torch.device("cuda"), mixed_precision="no")),
    )
    assert told.of("OK") == [
        "It: Some GPU, memory 8 GiB; it does not compute in bfloat16; bf16 is false, so each model computes in the "
        "type of its weights, named below."
    ]
    assert told.changes == ["It (not needed to train): Write float32 for student_dtype."]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "bf16 is false, so each model computes in the type of its weights, named below"),
        ({"bf16": True}, "forward passes compute in bfloat16"),
    ],
)
def test_the_device_is_told_with_what_the_run_computes_in(one_check, changes, said):
    training = KavaTrainingArguments(output_dir="x", use_cpu=True, **changes)
    model = SimpleNamespace(teacher_dtype="auto", student_dtype="float32")
    told = one_check(machine.check_device, SimpleNamespace(model=model, training=training))
    assert told.of("OK")[0].endswith(f"; {said}.")


def test_nothing_is_told_twice(one_check):
    def refused(checkup):
        raise BadRequest("It is broken.")

    told = one_check(refused)
    assert told.of("Problem") == ["It: It is broken."]
    assert told.changes == ["It: what is named above."]


@pytest.mark.usefixtures("quick")
def test_few_held_out_examples_are_a_warning_with_what_gives_more(doctor, tmp_path):
    rows = [json.dumps({name: row[name] for name in ("question", "answer")}) for row in generate_problems(200)]
    (tmp_path / "split").mkdir()
    for name, count in (("data", 200), ("split/train", 200), ("split/test", 20)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows[:count]))
    advice = {
        "quickstart": "Raise max_eval_samples, which is 8, to 50 or more, or leave it out.",
        tmp_path / "data.jsonl": "Give 1000 rows or more, for without a test split 5 % of them are held out; or give a "
        "test file of your own, beside train.jsonl as test.jsonl in a folder that dataset_name names.",
        tmp_path / "split": "Put 50 examples or more into the split to evaluate on, which has 20.",
    }
    for name, change in advice.items():
        told = doctor(dataset_name=name, max_eval_samples=8 if name == "quickstart" else None)
        assert any(re.match(r"Data: Only \d+ examples are held out, fewer", line) for line in told.of("Warning"))
        assert told.changes == [f"Data (not needed to train): {change}"]


@pytest.mark.usefixtures("quick")
def test_the_embedded_teacher_is_asked_what_it_knows(doctor, tmp_path):
    known = [{"question": row["question"], "answer": row["answer"]} for row in generate_problems(1100, seed=1)]
    foreign = [
        {"prompt": f"Where is house {n}?", "completion": "Quite far away, behind the woods."} for n in range(1100)
    ]
    for name, rows in (("known", known), ("foreign", foreign)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    told = doctor(dataset_name=tmp_path / "known.jsonl", max_eval_samples=None, warmup_steps=0)
    assert not told.of("Warning")
    assert any(re.match(r"Teacher: better than chance on the first \d+ answers \(", line) for line in told.of("OK"))
    told = doctor(dataset_name=tmp_path / "foreign.jsonl", max_eval_samples=None, warmup_steps=0)
    assert told.code == 0
    (warning,) = told.of("Warning")
    assert re.match(
        r"Teacher: no better than chance on the first \d+ answers \(cross-entropy \d+\.\d\d nats, chance 6\.\d\d\): it "
        r"knows the quickstart's arithmetic problems and nothing else\.$",
        warning,
    )
    advice = "Name a teacher_model_name_or_path that knows your data."
    assert told.changes == [f"Teacher (not needed to train): {advice}"]


@pytest.mark.usefixtures("quick")
def test_no_length_of_the_training_is_made_up(doctor, tmp_path):
    rows = [{"question": f"{n}?", "answer": ""} for n in range(1100)] + [{"question": "1?", "answer": "1"}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    about_it = [
        [line for line in doctor(dataset_name=tmp_path / "data.jsonl", **changes).of("Warning") if "Trainer:" in line]
        for changes in ({"max_steps": None, "warmup_steps": 10}, {"max_steps": 3, "warmup_steps": 10})
    ]
    assert [len(lines) for lines in about_it] == [0, 1]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"max_steps": 3, "warmup_steps": 3}, 3),
        # 64 examples, 2 in a micro-batch, 16 micro-batches in a step: 2 steps an epoch
        ({"max_steps": None, "num_train_epochs": 2, "warmup_steps": 4}, 4),
        ({"max_steps": None, "num_train_epochs": 2, "warmup_steps": 3}, None),
        ({"max_steps": 3, "warmup_steps": 0.1}, None),
    ],
)
def test_a_training_that_ends_before_its_warm_up_is_a_warning(doctor, changes, steps):
    told = doctor(max_eval_samples=50, gradient_accumulation_steps=16, **changes)
    assert told.code == 0
    assert told.of("Warning") == (
        []
        if steps is None
        else [
            f"Trainer: warmup_steps comes to {steps} and the whole training to {steps} (optimizer steps), so the "
            "learning rates reach their full values only when it ends, or never."
        ]
    )


@pytest.mark.usefixtures("quick")
def test_rows_without_an_answer_are_named_by_file_and_line(doctor, tmp_path):
    rows = [{"question": f"{n} + 1?", "answer": "" if n in (3, 5) else f"{n + 1}"} for n in range(30)]
    data = write_dataset(tmp_path, "\n\n".join(map(json.dumps, rows)))
    told = doctor(dataset_name=data, max_eval_samples=None)
    found = re.findall(r"(\d+) (?:training|held-out) examples? ha\w+ an empty answer: (.*) of (\S+)\.", told.text)
    assert sorted(number for _, places, _ in found for number in re.findall(r"\d+", places)) == ["11", "7"]
    assert {file for _, _, file in found} == {str(data)}
    assert "Data (not needed to train): Write an answer there, or leave these rows out." in told.changes
    told = doctor(dataset_name=write_dataset(tmp_path, '{"question": "a", "answer": ""}\n' * 40))
    assert told.code == 2
    assert re.search(r"No example has an answer: it is empty in lines (\d+, ){5}\.\.\. of \S+.jsonl\.", told.text)


def test_a_process_that_sees_several_gpus_is_told_how_to_start(one_check, monkeypatch):
    monkeypatch.setattr(KavaTrainingArguments, "n_gpu", property(lambda self: 4))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    training = KavaTrainingArguments(output_dir="x", use_cpu=True)
    told = one_check(machine.check_parallelism, SimpleNamespace(training=training))
    assert told.code == 0
    assert "4, each with the whole student (DDP)" in told.of("OK")[0]
    assert "effective batch 128 (2 examples x 16 micro-batches x 4 processes)" in told.of("OK")[0]
    start = "Start one process for each with accelerate launch --num_processes 4, or choose one with"
    assert told.changes == [f"It (not needed to train): {start} CUDA_VISIBLE_DEVICES=0."]
    assert start_command(["a.json", "--hub_token", "x"], 4) == (
        "accelerate launch --num_processes 4 -m kava_trainer train a.json --hub_token '<HUB_TOKEN>'"
    )


def test_a_default_of_accelerate_is_told(tmp_path, monkeypatch):
    file = tmp_path / "default_config.yaml"
    file.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_processes: 2\nuse_cpu: false\n"
    )
    monkeypatch.setattr(machine, "default_config_file", str(file))
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(file))
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert machine._accelerate_default() == (
        f" accelerate launch would read {file}: 2 processes, MULTI_GPU, mixed_precision no."
    )


@pytest.mark.usefixtures("quick")
def test_bitsandbytes_is_tried_out(doctor, monkeypatch):
    pytest.importorskip("bitsandbytes")
    assert "Quantisation: teacher 4bit, by bitsandbytes" in doctor(teacher_quantization="4bit").text

    def broken(*_):
        raise RuntimeError("no kernel image is available\nfor this device")

    monkeypatch.setattr(machine, "_try_layer", broken)
    told = doctor(teacher_quantization="8bit")
    assert told.code == 2
    (problem,) = told.of("Problem")
    assert "teacher_quantization 8bit does not work on this device (no kernel image is available)." in problem
    assert told.changes[0] == "Quantisation: Install a bitsandbytes that supports it, or write none."


@pytest.mark.usefixtures("quick")
def test_bitsandbytes_that_is_missing_is_refused(doctor, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    told = doctor(teacher_quantization="4bit")
    assert told.code == 2
    assert told.changes[0] == "Quantisation: Install it or write none."


HUB = {"push_to_hub": True, "hub_model_id": "me/kava", "hub_token": "hf_planted_token"}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("answer", "changes", "code", "advice"),
    [
        (lambda self: {"name": "me", "orgs": []}, {}, 0, None),
        (
            lambda self: {"name": "you", "orgs": [{"name": "us"}]},
            {},
            0,
            "Write a hub_model_id that begins with you/ or us/",
        ),
        (
            lambda self: time.sleep(30),
            {},
            2,
            "Hub: Write push_to_hub false, and send the student afterwards: python -m",
        ),
        (None, {"hub_model_id": "a b/c"}, 2, "Write it as owner/name"),
    ],
)
def test_the_hub_is_asked_whose_token_it_is_and_the_token_is_not_shown(
    doctor, monkeypatch, answer, changes, code, advice
):
    monkeypatch.setattr(HfApi, "whoami", answer)
    monkeypatch.setattr(machine, "in_time", lambda work, seconds: in_time(work, 0.2))
    told = doctor(**{**HUB, **changes})
    assert told.code == code
    assert "hf_planted" not in told.text
    own = [change for change in told.changes if change.startswith("Hub")]
    assert (not own) if advice is None else (advice in own[0]), told.text


@pytest.mark.usefixtures("quick")
def test_weights_that_are_missing_or_of_other_shapes_are_refused(doctor, tmp_path):
    gone = tiny_model(tmp_path / "gone", model_safetensors=None)
    told = doctor(student_model_name_or_path=gone, max_length=120)
    assert told.changes[0] == "Student: Name a folder that holds a model's weights too."
    other = tiny_model(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    told = doctor(student_model_name_or_path=other, max_length=120)
    assert told.code == 2
    assert re.search(r"model.safetensors holds \S+ as \(\d+, \d+\), where its config wants", told.of("Problem")[0])


@pytest.mark.usefixtures("quick")
def test_listed_weights_that_are_missing_are_named(doctor, tmp_path):
    folder = tiny_model(tmp_path / "student", model_safetensors=None)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    told = doctor(student_model_name_or_path=folder, max_length=120)
    assert "of its 1 files of weights one.safetensors is missing." in told.of("Problem")[0]


@pytest.mark.usefixtures("quick")
def test_many_cut_examples_are_a_warning(doctor):
    told = doctor(max_length=40)
    assert told.code == 0
    assert any(line.startswith("Data: of 64 training examples 6") for line in told.of("Warning"))
    assert "Raise max_length (and lower per_device_train_batch_size), if whole answers matter." in told.changes[0]


@pytest.mark.usefixtures("quick")
def test_too_little_memory_is_a_warning_with_what_to_lower(doctor, monkeypatch):
    for module in (advice, folders):
        monkeypatch.setattr(module, "free_memory_bytes", lambda device: 1000)
    told = doctor()
    assert told.code == 0
    assert any(
        change.startswith("Memory (not needed to train): Lower per_device_train_batch_size") for change in told.changes
    )


@pytest.mark.usefixtures("quick")
def test_too_little_disk_is_refused(doctor, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 10**6, 10**6))
    told = doctor()
    assert told.code == 2
    assert told.changes[0].startswith("Disk: Make room there, name an output_dir on a larger disk")


@pytest.mark.usefixtures("quick")
def test_a_stream_is_looked_at_without_reading_it_all(doctor):
    told = doctor(streaming=True)
    assert told.code == 0, told.text
    assert any(line.startswith("Data: a stream of rows with question + answer; held out: 8.") for line in told.of("OK"))


def chat_pair(folder, template):
    """Arguments that name the embedded pair with a chat template."""
    for role, source in (("teacher", TEACHER_FOLDER), ("student", STUDENT_FOLDER)):
        shutil.copytree(source, folder / role)
        (folder / role / "chat_template.jinja").write_text(template)
    return {
        "teacher_model_name_or_path": folder / "teacher",
        "student_model_name_or_path": None,
        "student_config_name": folder / "student",
        "student_init": "random",
    }


def write_chats(path, *odd, column=None):
    """60 conversations of two questions, after those that are odd, with a column beside them."""
    talks = [
        [
            {"role": "user", "content": f"{n}+1?"},
            {"role": "assistant", "content": f"{n + 1}."},
            {"role": "user", "content": "and 1?"},
            {"role": "assistant", "content": f"{n + 2}!"},
        ]
        for n in range(60)
    ]
    rows = [{"messages": talk, **(column or {})} for talk in [*odd, *talks]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


CHAT_TEMPLATE = (
    "{{ strftime_now('%Y') }}\n{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("streaming", [None, True])
def test_the_first_conversation_is_shown_with_what_is_learned(doctor, tmp_path, streaming):
    odd = [{"role": "user", "content": "x", "name": "Ann"}, {"role": "assistant", "content": "y"}]
    told = doctor(
        **chat_pair(tmp_path, CHAT_TEMPLATE),
        dataset_name=write_chats(tmp_path / "chats.jsonl", odd, column={"source": "s"}),
        assistant_turns="all",
        streaming=streaming,
        max_train_samples=None,
        max_eval_samples=None if streaming is None else 5,
    )
    assert told.code == 0, told.text
    assert "Data: nothing reads the column source." in told.of("OK")
    assert "Data: the chat template writes today's date, for which 26 Jul 2024 stands on any day." in told.of("OK")
    assert any(
        "leaves out what the data holds: name of user messages. Line 1 of" in line for line in told.of("Warning")
    )
    shown = told.text.partition("tokens; the ")[2].splitlines()
    assert shown[0].endswith("in [[ ]] are learned:")
    assert shown[1] == "    2024"
    if streaming:
        assert shown[2:4] == ["    <user>x<|endoftext|>", "    <assistant>[[y<|endoftext|>]]"]
    else:
        assert re.fullmatch(r" +<user>\d+\+1\?<\|endoftext\|>", shown[2])
        assert re.fullmatch(r" +<assistant>\[\[\d+\.<\|endoftext\|>\]\]", shown[3])
        assert re.fullmatch(r" +<assistant>\[\[\d+!<\|endoftext\|>\]\]", shown[5])
    assert told.text.isascii()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("changes", [{}, {"streaming": True, "max_eval_samples": 5}])
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_row_that_the_template_refuses_is_named_by_doctor_too(doctor, tmp_path, changes, place):
    path = write_chats(tmp_path / "chats.jsonl")
    line = '{"messages": [{"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}]}\n'
    path.write_text(line + path.read_text() if place == "first" else path.read_text() + line)
    limits = {"max_train_samples": None, "max_eval_samples": None, **changes}
    told = doctor(**chat_pair(tmp_path, CHAT_TEMPLATE), dataset_name=path, **limits)
    assert told.code == 2
    number = 1 if place == "first" else 61
    assert told.of("Problem") == [
        f"Data: The data cannot be used: in line {number} of {path}, the chat template refuses the conversation (no "
        "system)."
    ]
    assert told.changes[0] == "Data: Change it, or leave it out."


@pytest.mark.usefixtures("quick")
def test_a_chat_template_and_turns_that_nothing_uses_are_told(doctor, tmp_path):
    told = doctor(**chat_pair(tmp_path, CHAT_TEMPLATE), assistant_turns="all")
    assert told.code == 0, told.text
    assert any(line.startswith("Data: The teacher's chat template is not used") for line in told.of("Warning"))
    assert "Data: assistant_turns has no effect on data that is no chat." in told.of("Warning")


@pytest.mark.usefixtures("quick")
def test_signs_that_a_terminal_would_obey_are_written_out(doctor, tmp_path):
    rows = [{"prompt": "a\x1b[2J\tb\n", "completion": f"\x0c{n}"} for n in range(60)]
    path = write_dataset(tmp_path, "".join(json.dumps(row) + "\n" for row in rows))
    told = doctor(dataset_name=path)
    assert "\n    a\\x1b[2J\\tb\n    [[\\x0c" in told.text


def test_a_long_example_is_shown_in_parts(tokenizer):
    ids = tokenizer("word " * 400)["input_ids"]
    text = marked_text(ids, [-100] * 350 + ids[350:], tokenizer)
    assert len(text) < 1000
    assert text.startswith("word word")
    assert re.search(
        r" \.\.\. \(\d+ more characters\) \.\.\. .*\[\[.*\.\.\. \(\d+ more characters\) \.\.\. .*\]\]$", text
    )
    turns = marked_text(ids, [ids[0], -100] * (len(ids) // 2) + [-100] * (len(ids) % 2), tokenizer)
    assert f"... ({2 * (len(ids) // 2) - 12} more parts) ..." in turns
    assert turns.count("[[") == 6


@pytest.mark.usefixtures("quick")
def test_the_teacher_cache_and_the_output_of_an_earlier_run_are_compared(doctor, tmp_path, capsys):
    options = {**QUICKSTART, **SHORT, "max_length": 128, "max_steps": 1, "save_steps": 1}
    options |= {"output_dir": tmp_path / "out", "teacher_cache_dir": tmp_path / "cache"}
    told = doctor(**options)
    assert told.code == 0, told.text
    assert "0.0 MB are there already" in told.text
    assert main(["train", *words(options)]) == 0
    before = everything_in(tmp_path)
    told = doctor(**options)
    assert told.code == 0, told.text
    assert re.search(r"Teacher cache: about (\S+ MB) in \S+ for \d+ tokens; \S+ MB are there already\.", told.text)
    assert "Output (not needed to train): Name another output_dir to keep what it left, or write" in "\n".join(
        told.changes
    )
    told = doctor(**{**options, "resume_from_checkpoint": "true", "learning_rate": 1e-3})
    assert told.code == 0, told.text
    assert f"Output: the run goes on from {tmp_path / 'out' / 'checkpoint-1'}." in told.of("OK")
    assert any("learning_rate was 5e-05, is 0.001" in line for line in told.of("Warning"))
    for changes, part in (
        ({"teacher_dtype": "bfloat16"}, "Teacher cache: Name another folder, or delete that one."),
        ({"layer_mapping": "uniform:2"}, "Output: Name another output_dir, or delete that folder's checkpoints."),
        ({"seed": 7, "resume_from_checkpoint": "true"}, "Output: Resume with the arguments, models, data"),
    ):
        told = doctor(**{**options, **changes})
        assert told.code == 2
        assert part in "\n".join(told.changes)
    optimizer = tmp_path / "out" / "checkpoint-1" / "optimizer.pt"
    optimizer.write_bytes(b"short")
    told = doctor(**{**options, "resume_from_checkpoint": tmp_path / "out" / "checkpoint-1"})
    assert "cannot be resumed: optimizer.pt has 5 bytes in place of" in told.of("Problem")[0]
    optimizer.write_bytes(before[str(optimizer)])
    (shard,) = (tmp_path / "cache").glob("states-*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 255
    shard.write_bytes(content)
    assert f"The teacher cache's file {shard} is broken" in doctor(**options).text
    shard.write_bytes(before[str(shard)])
    assert everything_in(tmp_path) == before


@pytest.mark.usefixtures("quick")
def test_a_cache_that_the_disk_does_not_hold_is_refused(doctor, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 0))
    told = doctor(teacher_cache_dir=tmp_path / "cache", save_strategy="no")
    assert told.code == 2
    (change,) = (change for change in told.changes if change.startswith("Teacher cache"))
    assert (
        change == "Teacher cache: Name a folder on a larger disk, write teacher_cache_dtype int8, or map fewer layers."
    )


def test_emoji_stand_on_a_terminal_only(one_check, monkeypatch, capsys):
    checkup = Checkup(Console(plain=True))
    checkup._console.emoji = True
    checkup.check("It", lambda: checkup.ok("well."))
    assert capsys.readouterr().out == "✅ OK          It: well.\n"


def test_what_a_students_generation_config_would_lose_is_told(doctor, quick, tmp_path):
    student = shutil.copytree(TEACHER_FOLDER, tmp_path / "student")
    file = student / "generation_config.json"
    plain = json.loads(file.read_text())
    file.write_text(json.dumps(plain | {"do_sample": False, "temperature": 0.9, "top_p": 0.6}))
    told = doctor(student_model_name_or_path=student)
    assert told.code == 0
    assert any(
        "sets temperature, top_p without do_sample, which cannot be saved" in line for line in told.of("Warning")
    )
    file.write_text(json.dumps(plain | {"num_return_sequences": 3}))
    told = doctor(student_model_name_or_path=student)
    assert told.code == 2
    assert any("num_return_sequences" in line for line in told.of("Problem"))


def test_an_adapter_and_what_is_missing_of_a_model_are_told(doctor, quick, tmp_path):
    adapter, lacking = tmp_path / "adapter", shutil.copytree(TEACHER_FOLDER, tmp_path / "lacking")
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(TEACHER_FOLDER), config).save_pretrained(adapter)
    told = doctor(teacher_model_name_or_path=adapter, student_model_name_or_path=adapter)
    assert told.code == 0
    assert sum("with the adapter beside" in line for line in told.of("OK")) == 2
    weights = load_file(lacking / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "layers.3" not in name}
    save_file(kept, lacking / "model.safetensors", {"format": "pt"})
    told = doctor(student_model_name_or_path=lacking)
    assert told.code == 2
    assert any("of its weights are missing, and would be random" in line for line in told.of("Problem"))


@pytest.mark.parametrize("kind", [RuntimeError, TypeError, KeyError, NotImplementedError])
def test_no_estimate_ends_no_doctor(doctor, monkeypatch, kind):
    def estimate(arguments):
        raise kind("data-dependent")

    monkeypatch.setattr(folders, "estimate_memory", estimate)
    told = doctor()
    assert told.code == 0
    assert any("no estimate: the passes of these models cannot be played through" in line for line in told.of("OK"))
