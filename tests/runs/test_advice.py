"""What is advised can be followed: no advice undoes another, and none is given twice."""

import re

import pytest
import torch
from helpers.models import tiny_llama
from helpers.programs import QUICKSTART, words

from kava_trainer.config import checks, launcher, optimizer_names
from kava_trainer.config.arguments import KavaTrainingArguments
from kava_trainer.config.parser import parse_arguments
from kava_trainer.runs import advice
from kava_trainer.runs.advice import held_out_of_a_small_stream, memory_shortage, precision_problems, rounding_problem
from kava_trainer.runs.doctor.findings import NAMED_ABOVE, Checkup
from kava_trainer.utils.console import Console
from kava_trainer.utils.errors import BadRequest, Problem

CPU, GPU = torch.device("cpu"), torch.device("cuda")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "auto": torch.float32}


@pytest.fixture(params=["AVX2", "AVX512"])
def processor(request, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
    monkeypatch.setattr(checks, "is_torch_bf16_gpu_available", lambda: False)
    monkeypatch.setattr(checks.cuda, "is_available", lambda: False)
    return request.param


def asked_for(tmp_path, **options):
    return parse_arguments(words({**QUICKSTART, "output_dir": tmp_path, **options}))


def problems_with(tmp_path, options):
    """What is said of a request, first by its arguments, then by what its models are."""
    try:
        arguments = asked_for(tmp_path, **options)
    except BadRequest as error:
        return error.problems
    teacher, student = (tiny_llama(32, 1).to(DTYPES[getattr(arguments.model, f"{role}_dtype")]) for role in
                        ("teacher", "student"))  # fmt: skip
    return precision_problems(arguments, teacher, student, {student.dtype})


@pytest.mark.parametrize("first", [True, False], ids=["first remedy", "last remedy"])
@pytest.mark.parametrize(
    "options",
    [
        {"bf16": "true"},
        {"bf16_full_eval": "true"},
        {"bf16": "true", "use_cpu": "true"},
        {"bf16": "true", "student_dtype": "bfloat16"},
        {"student_dtype": "bfloat16"},
        {"student_dtype": "bfloat16", "teacher_dtype": "bfloat16", "use_cpu": "true"},
    ],
)
def test_whoever_follows_the_advice_on_a_cpu_arrives(tmp_path, processor, options, first):
    written, options = {}, dict(options)
    for _ in range(5):
        problems = problems_with(tmp_path, options)
        assert len({problem.remedy for problem in problems}) == len(problems)
        if not problems:
            return
        for problem in problems:
            parts = re.split(r",? or ", problem.remedy.removesuffix(" where the memory suffices, or train on a GPU."))
            chosen = parts[0] if first else parts[-1]
            for name, value in re.findall(r"(\w+) (true|false|none|float32|bfloat16|adamw_torch_8bit)\b", chosen):
                assert written.get(name, value) == value, f"{name} was to be {written[name]} and now {value}"
                written[name] = options[name] = value
            if "bf16_stochastic_round" in chosen:
                options["optim_args"] = "bf16_stochastic_round=True,block_size=64"
    raise AssertionError(f"no end of advice: {problems}")


def test_one_remedy_for_slow_and_for_rounded_weights(tmp_path, processor):
    problems = problems_with(tmp_path, {"student_dtype": "bfloat16"})
    assert len(problems) == 1
    assert ("AVX-512" in problems[0].what) is (processor == "AVX2")


@pytest.mark.parametrize(("device", "said"), [(CPU, "float32."), (GPU, "float32 with bf16 true.")])
def test_bf16_is_advised_on_a_gpu_alone(device, said):
    assert rounding_problem("adamw_torch", None, [torch.bfloat16], device).remedy.endswith(f"student_dtype {said}")


def test_an_optimizer_that_is_not_installed_is_not_the_first_advice(monkeypatch):
    monkeypatch.setattr(optimizer_names, "is_torchao_available", lambda: False)
    remedy = rounding_problem("adamw_torch", None, [torch.bfloat16], CPU).remedy
    assert remedy.startswith("Write student_dtype float32; or install torchao, and write optim adamw_torch_8bit")


@pytest.mark.parametrize(
    ("options", "advised", "left_out"),
    [
        ({}, ["Lower per_device_train_batch_size (and", "set gradient_checkpointing", "name a teacher_cache_dir"], []),
        ({"per_device_train_batch_size": 1}, ["Lower max_length (now 512)"], ["per_device_train_batch_size"]),
        ({"gradient_checkpointing": "true"}, [], ["gradient_checkpointing"]),
        ({"teacher_cache_dir": "cache"}, [], ["teacher_cache_dir"]),
        ({"optim": "paged_adamw_8bit"}, [], ["optim"]),
    ],
)
def test_memory_that_is_short_is_advised_by_what_was_not_done_yet(tmp_path, monkeypatch, options, advised, left_out):
    monkeypatch.setattr(advice, "free_memory_bytes", lambda device: 2_638_000_000)
    problem = memory_shortage(2_640_000_000, asked_for(tmp_path, use_cpu="true", **options))
    assert problem.what == "That is more than the 2.638 GB that are free."
    assert all(part in problem.remedy for part in advised)
    assert not any(part in problem.remedy for part in left_out)
    assert memory_shortage(2_638_000_000, asked_for(tmp_path, use_cpu="true")) is None


def test_four_bits_are_not_advised_where_they_are_advised_against(tmp_path, monkeypatch, processor):
    monkeypatch.setattr(advice, "free_memory_bytes", lambda device: 1)
    remedy = memory_shortage(2, asked_for(tmp_path, use_cpu="true")).remedy
    assert ("4bit" in remedy) is (processor == "AVX512")


SPREAD, FOUR_BITS = "write teacher_sharding fsdp", "choose teacher_quantization 4bit"


@pytest.mark.parametrize(
    ("processes", "options", "advised"),
    [
        (1, {}, FOUR_BITS),
        (2, {}, SPREAD),
        (2, {"teacher_sharding": "fsdp"}, f"{FOUR_BITS} and teacher_sharding none"),
        (2, {"teacher_quantization": "8bit"}, FOUR_BITS),
    ],
)
def test_a_teacher_that_is_too_large_is_spread_before_it_is_rounded(tmp_path, monkeypatch, processes, options, advised):
    monkeypatch.setattr(launcher, "SHARDING_DEVICES", {"cpu"})
    monkeypatch.setattr(advice, "is_slow_at_half_precision", lambda device: False)
    monkeypatch.setattr(KavaTrainingArguments, "world_size", processes, raising=False)
    remedy = memory_shortage(10**15, asked_for(tmp_path, use_cpu="true", **options)).remedy
    assert [part for part in (SPREAD, FOUR_BITS) if part in remedy] == [advised.split(" and ")[0]]
    assert f"{advised}," in remedy


def test_doctor_s_advice_is_numbered_once(capsys):
    checkup = Checkup(Console(plain=True))
    checkup.check("Data", lambda: checkup.warn("The training data is long.", "Raise max_length."))
    checkup.check("Student", lambda: checkup.warn("The student reads more.", "Raise max_length."))
    checkup.check("Student", lambda: checkup.warn("It is slow.", "Write float32."))
    checkup.check("Hub", lambda: checkup.refuse([Problem(None, "It is not there."), Problem(None, "Nor that.")]))
    checkup.check("Disk", lambda: checkup.refuse([Problem(None, "It is full.")]))
    checkup.check("Teacher", lambda: checkup.refuse([Problem(None, "It is 16 bits.", "write float32.")]))
    checkup.conclude("go")
    changes = capsys.readouterr().out.split("== What to change\n")[1].splitlines()
    assert changes == [
        f"1. Hub: {NAMED_ABOVE}",
        f"2. Disk: {NAMED_ABOVE}",
        "3. Teacher, Student: Write float32.",
        "4. Data, Student (not needed to train): Raise max_length.",
    ]


@pytest.mark.parametrize(
    ("held_out", "skipped", "checked", "told"),
    [(200, 200, 100, True), (50, 50, 190, True), (50, 50, 200, False), (200, 0, 100, False), (500, 500, 1000, False)],
)
def test_a_small_stream_that_loses_many_rows_to_those_held_out_is_told(held_out, skipped, checked, told):
    said = held_out_of_a_small_stream(held_out, skipped, checked)
    assert (said is not None) == told
    if said is not None:
        assert said.startswith(f"Of the {skipped + checked} rows of the stream the first {skipped} are held out")
