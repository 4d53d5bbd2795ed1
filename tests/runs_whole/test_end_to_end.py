"""The program as a user runs it: the quickstart, every recipe, and the real models and data where they are at hand."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from helpers.pages import check_page
from helpers.places import ROOT, shared_path
from helpers.programs import QUICKSTART, RECIPES, SHORT, launch, summary_of, words
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import run_kava
from kava_trainer.distillation.projector_files import load_projectors


def test_the_quickstart_leaves_everything_it_promises(tmp_path):
    recipe = str(ROOT / "training_args" / "quickstart.json")
    options = {**SHORT, "max_steps": 4, "save_steps": 2, "logging_steps": 2, "output_dir": "out", "final_dir": "final"}
    options |= {"run_control": "false"}
    result = launch(recipe, *words(options), "--lr_scheduler_type", "constant", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for line in (
        "== Environment",
        "Teacher: quickstart",
        "Effective batch size: 32",
        "Dataset loaded: 8000 samples",
        "2 batches prepared",
        "Teacher: d_model=128",
        "Student: d_model=64",
        "Projector: 64 -> 128 (student to teacher)",
        "Aligned layers (student, teacher): (1, 1), (3, 4)",
        "Loss: Mercator (alpha=1.0, beta=0.01)",
        "Loss terms: mercator 30, lm 1",
        "== Verdict",
        "No success.",
    ):
        assert line in result.stdout
    assert re.search(
        r"^\[Step 0004\] Loss: \d+\.\d{4} \| CosSim: -?\d\.\d{4} (Adapting|Learning|Collapsed)$", result.stdout, re.M
    )
    assert result.stdout.isascii()
    out, final = tmp_path / "out", tmp_path / "final"
    names = {path.name for path in out.iterdir()}
    assert names == {
        *("checkpoint-2", "checkpoint-4", "proj_step_2.pth", "proj_step_4.pth", "run_summary.json"),
        *("log_history.json", "report.html", "report.png"),
    }
    assert f"Report: {Path('out') / 'report.html'}" in result.stdout
    check_page((out / "report.html").read_text(encoding="utf-8"), summary_of(out))
    assert {path.name for path in final.iterdir()} == {"final_student", "final_projector.pth"}
    student = AutoModelForCausalLM.from_pretrained(final / "final_student")
    tokenizer = AutoTokenizer.from_pretrained(final / "final_student")
    prompt = tokenizer("Question: What is 2+3?\nAnswer:", return_tensors="pt")
    assert student.generate(**prompt, max_new_tokens=4).shape[1] > prompt["input_ids"].shape[1]
    assert (final / "final_student" / "generation_config.json").exists()
    assert "| Steps | 4 |" in (final / "final_student" / "README.md").read_text()
    assert re.search(r"^Alignment: CosSim 0\.\d{4} \w+ \(centred -?\d", result.stdout, re.M)
    assert "base_model" not in (final / "final_student" / "README.md").read_text()
    assert load_projectors(final / "final_projector.pth")[0].config.input_size == 64


def test_the_summary_has_the_agreed_shape(tmp_path):
    recipe = str(ROOT / "training_args" / "quickstart.json")
    options = {**SHORT, "max_steps": 51, "per_device_train_batch_size": 4, "output_dir": tmp_path, "logging_steps": 30}
    options |= {"run_control": "false"}
    assert run_kava.main([recipe, *words(options)]) == 0
    summary = summary_of(tmp_path)
    assert list(summary) == [
        *("schema_version", "status", "started_at", "finished_at", "duration_seconds", "environment"),
        *("arguments", "command", "global_step", "cos_sim_at", "final", "alignment", "evaluation"),
        *("retention", "samples", "rollouts", "teacher_fidelity", "cut", "token_alignment", "other_token_alignments"),
        *("prompt_kind", "held_out_examples", "held_out_tokens", "student_parameters"),
        *("final_checksums", "verdict", "throughput", "problems", "checkpoints"),
    ]
    assert (summary["schema_version"], summary["status"], summary["global_step"]) == (1, "completed", 51)
    assert summary["cos_sim_at"]["50"] is not None
    assert summary["cos_sim_at"]["100"] is summary["cos_sim_at"]["200"] is None
    assert set(summary["final"]) == {
        *("loss", "mercator_loss", "cos_sim", "centred_cos_sim", "shuffled_cos_sim", "margin", "cka"),
        *("student_effective_rank", "target_effective_rank", "teacher_effective_rank", "pairs"),
    }
    assert all(value is not None for value in summary["final"].values())
    assert summary["final"]["margin"] == pytest.approx(
        summary["final"]["cos_sim"] - summary["final"]["shuffled_cos_sim"], abs=0.02
    )
    assert set(summary["evaluation"]) == {"teacher", "student_before", "student_after", "control_sft"}
    assert summary["evaluation"]["teacher"]["perplexity"] < 1.2
    assert summary["evaluation"]["student_after"]["perplexity"] < summary["evaluation"]["student_before"]["perplexity"]
    assert summary["evaluation"]["control_sft"] is None
    assert summary["verdict"]["success"] is False
    assert summary["verdict"]["collapsed"] is False
    assert summary["verdict"]["reasons"][0].startswith("CosSim is 0.")
    assert summary["throughput"]["tokens_per_second"] > 0
    assert summary["arguments"]["max_steps"] == 51
    assert summary["held_out_examples"] == 8
    assert 8 * 20 < summary["held_out_tokens"] < 8 * 120
    assert summary["checkpoints"] == [str(tmp_path / "checkpoint-51")]
    check_samples(summary)
    check_log_lines(json.loads((tmp_path / "log_history.json").read_text()), summary)
    assert summary["command"].startswith("python ")
    assert re.search(r"quickstart.json --max_train_samples 64 .*--run_control false$", summary["command"])


def check_samples(summary):
    """As many as there are held-out examples, at most ten, with an answer of each model that was measured."""
    assert len(summary["samples"]) == 8
    for sample in summary["samples"]:
        assert sample["prompt"].startswith("Question: ")
        assert "#### " in sample["reference"]
        for known in (sample["answers"], sample["matches"]):
            assert list(known) == ["teacher", "student_before", "student_after", "control_sft"]
            assert [who for who, value in known.items() if value is None] == ["control_sft"]
        assert sample["answers"]["teacher"][:3] == sample["reference"][:3]
    share = sum(sample["matches"]["teacher"] for sample in summary["samples"]) / 8
    assert share == summary["evaluation"]["teacher"]["exact_match"]


def check_log_lines(lines, summary):
    losses = [line for line in lines if "loss" in line]
    assert [line["step"] for line in losses] == [30, 50, 51]
    assert losses[1]["cos_sim"] == summary["cos_sim_at"]["50"]
    assert all(line["tokens_per_second"] > 0 for line in losses)
    assert losses[-1]["peak_memory_bytes"] <= summary["throughput"]["peak_memory_bytes"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_runs_on_the_quickstart_with_weights_that_are_whole_numbers(tmp_path, recipe, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = json.loads((ROOT / "training_args" / recipe).read_text())
    whole = {name: math.ceil(value) for name, value in content.items() if name.endswith("_weight")}
    assert whole
    Path(recipe).write_text(json.dumps({**content, **whole}))
    options = {**QUICKSTART, **SHORT, "max_steps": 2, "gradient_accumulation_steps": 2, "output_dir": tmp_path / "out"}
    if "student_num_layers" in content:  # of the embedded teacher's four
        options = {name: value for name, value in options.items() if not name.startswith("student_model")}
        options |= {"student_num_layers": 3}
    assert run_kava.main([f"./{recipe}", *words(options)]) == 0
    summary = summary_of(tmp_path / "out")
    assert {name: summary["arguments"][name] for name in whole} == whole
    assert summary["status"] == "completed"
    after = summary["evaluation"]["student_after"]
    assert (after["exact_match"] is not None) == content.get("evaluate_generation", False)
    assert after["retention_cross_entropy"] is not None


def test_the_seed_recipe_names_its_files_as_ever(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = str(ROOT / "training_args" / "seed_mercator_only.json")
    options = {**QUICKSTART, **SHORT, "gradient_accumulation_steps": 1, "save_steps": 2}
    assert run_kava.main([recipe, *words(options)]) == 0
    for name in (
        "checkpoints/seed_mercator_only/proj_step_2.pth",
        "final_projector.pth",
        "final_student/model.safetensors",
    ):
        assert (tmp_path / name).exists()


@pytest.mark.parametrize("quantization", ["4bit", pytest.param("8bit", marks=pytest.mark.slow)])
def test_the_quickstart_runs_with_a_quantised_teacher_and_tells_what_that_costs(tmp_path, quantization, capsys):
    pytest.importorskip("bitsandbytes")
    recipe = str(ROOT / "training_args" / "quickstart.json")
    options = {**SHORT, "teacher_quantization": quantization, "output_dir": tmp_path, "run_control": "false"}
    assert run_kava.main([recipe, *words(options)]) == 0
    summary = summary_of(tmp_path)
    assert summary["evaluation"]["teacher"]["perplexity"] < 2
    check_fidelity(summary["teacher_fidelity"], quantization)
    shown = capsys.readouterr().out
    assert "Unquantised teacher, to compare with: 3.4 MB on cpu for a moment" in shown
    name = {"4bit": "4-bit", "8bit": "8-bit"}[quantization]
    assert re.search(
        rf"^{name} teacher against float32 on \d+ held-out tokens: CosSim 0\.9\d+ at layer 1, 0\.9", shown, re.M
    )


def check_fidelity(measured, quantization):
    """The quickstart's teacher stays close to itself; closer in 8 bit."""
    assert measured["quantization"] == quantization
    assert measured["reference_dtype"] == "float32"
    assert list(measured["layers"]) == ["1", "4"]
    for row in measured["layers"].values():
        assert 0.95 < row["cos_sim"] < 1
        assert row["cos_sim_p01"] < row["cos_sim"]
        assert quantization == "4bit" or row["cos_sim"] > 0.999
    assert 1 <= measured["reference_perplexity"] < 1.1
    assert measured["perplexity"] / measured["reference_perplexity"] < 1.1
    assert measured["reason"] is None


@pytest.mark.slow
@pytest.mark.exhaustive  # the short one above runs always
def test_the_whole_quickstart_with_a_quantised_teacher(tmp_path):
    recipe = str(ROOT / "training_args" / "quickstart.json")
    options = ["--teacher_quantization", "4bit", "--output_dir", "out"]
    short = ["--run_control", "false", "--evaluate_generation", "false"]
    result = launch(recipe, *options, *short, cwd=tmp_path, timeout=1800)
    assert result.returncode == 0, result.stderr
    summary = summary_of(tmp_path / "out")
    check_fidelity(summary["teacher_fidelity"], "4bit")
    assert summary["verdict"]["success"] is True
    assert summary["global_step"] == 600


def test_own_jsonl_and_a_student_of_teacher_layers(tmp_path):
    rows = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(40)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = AutoModelForCausalLM.from_pretrained(ROOT / "kava_trainer/quickstart/teacher").config
    config.num_hidden_layers, config.layer_types = 2, ["full_attention"] * 2
    config.save_pretrained(tmp_path / "config")
    options = {
        "teacher_model_name_or_path": "quickstart",
        "student_config_name": tmp_path / "config",
        "student_init": "teacher_layers",
        "dataset_name": tmp_path / "own.jsonl",
        "output_dir": tmp_path / "out",
        "layer_mapping": "all",
        "max_steps": 2,
        "use_cpu": True,
    }
    assert run_kava.main(words(options)) == 0
    assert summary_of(tmp_path / "out")["evaluation"]["student_before"]["perplexity"] > 1


def test_a_second_run_reads_the_teacher_cache_of_the_first(tmp_path, capsys):
    recipe = str(ROOT / "training_args" / "quickstart.json")
    options = {**SHORT, "run_control": "false", "teacher_cache_dir": tmp_path / "cache", "kd_weight": 0.5}
    lines = []
    for name, changes in (("online", {}), ("first", {}), ("second", {"per_device_train_batch_size": 16})):
        settings = {**options, "output_dir": tmp_path / name, "logging_steps": 1, **changes}
        if name == "online":
            del settings["teacher_cache_dir"]
        assert run_kava.main([recipe, *words(settings), "--gradient_accumulation_steps", str(32 // changes.get(
            "per_device_train_batch_size", 32))]) == 0  # fmt: skip
        shown = capsys.readouterr().out
        lines.append(re.findall(r"^\[Step 000\d\] Loss: (\S+) \| CosSim: (\S+)", shown, re.M))
        written = re.findall(r"^(\d+) of (\d+) examples are to be written to", shown, re.M)
        assert written == {"online": [], "first": [("72", "72")], "second": [("0", "72")]}[name]
        assert ("its weights are freed" in shown) == (name != "online")
        assert re.search(r"^Memory estimate for training: \d\.\d\d GB \(teacher \S+ MB, student", shown, re.M)
        throughput = summary_of(tmp_path / name)["throughput"]
        assert throughput["student_seconds"] > 0
        assert throughput["estimated_memory_bytes"] > 10**6
        assert (
            throughput["peak_memory_bytes"] > throughput["estimated_memory_bytes"] / 2
        )  # tests before it had their own
    assert len(lines[0]) == 3
    for cached in lines[1:]:
        for online, own in zip(lines[0], cached, strict=True):
            assert [float(x) for x in own] == pytest.approx([float(x) for x in online], rel=0.01)


def test_a_broken_or_stale_cache_ends_the_run_before_training(tmp_path, capsys):
    recipe = str(ROOT / "training_args" / "quickstart.json")
    options = {**SHORT, "run_control": "false", "output_dir": tmp_path / "out", "teacher_cache_dir": tmp_path / "cache"}
    options["evaluate_generation"] = "false"
    assert run_kava.main([recipe, *words(options)]) == 0
    capsys.readouterr()
    other = {**options, "output_dir": tmp_path / "other", "teacher_dtype": "bfloat16"}
    assert run_kava.main([recipe, *words(other)]) == 2
    assert "dtype is float32 there and bfloat16 here. Name another folder" in capsys.readouterr().err
    (shard,) = (tmp_path / "cache").glob("states-*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 255
    shard.write_bytes(content)
    assert run_kava.main([recipe, *words(options)]) == 2
    captured = capsys.readouterr()
    assert f"The teacher cache's file {shard} is broken" in captured.err
    assert "== Training" not in captured.out


def test_resuming_goes_on_and_starting_over_with_true_starts_afresh(tmp_path, capsys):
    recipe = str(ROOT / "training_args" / "quickstart.json")
    options = {**SHORT, "output_dir": tmp_path, "save_steps": 2, "resume_from_checkpoint": "true"}
    options["run_control"] = "false"
    assert run_kava.main([recipe, *words(options)]) == 0
    assert "No checkpoint to resume from yet" in capsys.readouterr().out
    first = summary_of(tmp_path)
    assert run_kava.main([recipe, *words({**options, "max_steps": 5})]) == 0
    assert f"Resuming from {tmp_path / 'checkpoint-3'}" in capsys.readouterr().out
    assert run_kava.main([recipe, *words({**options, "max_steps": 5})]) == 0
    assert "nothing is left to train" in capsys.readouterr().out
    last = summary_of(tmp_path)
    assert last["global_step"] == 5
    assert last["started_at"] == first["started_at"]
    assert last["duration_seconds"] > first["throughput"]["student_seconds"]
    assert "resume_from_checkpoint" not in last["command"]
    spent = [summary["throughput"] for summary in (first, last)]
    for name in ("teacher_seconds", "student_seconds"):
        assert spent[1][name] > spent[0][name] > 0


@pytest.mark.slow
def test_the_seed_recipe_ends_collapsed_and_says_so(tmp_path, capsys):
    recipe = str(ROOT / "training_args" / "seed_mercator_only.json")
    options = {**QUICKSTART, "output_dir": tmp_path, "final_dir": tmp_path, "generation_max_new_tokens": 32}
    options |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 300}
    options |= {"max_train_samples": 2400, "max_eval_samples": 50, "per_device_eval_batch_size": 50}
    assert run_kava.main([recipe, *words(options)]) == 0
    shown, summary = capsys.readouterr().out, summary_of(tmp_path)
    assert summary["final"]["cos_sim"] > 0.95
    assert summary["verdict"]["collapsed"] is True
    assert summary["verdict"]["success"] is False
    assert "agrees with the target of another token" in summary["verdict"]["reasons"][0]
    assert any("never supervised" in reason for reason in summary["verdict"]["reasons"])
    assert re.search(r"^Alignment: CosSim 0\.9\d{3} Collapsed", shown, re.M)
    assert "Nothing holds the projector" in shown


@pytest.mark.slow
def test_a_real_teacher_on_the_real_gsm8k(tmp_path, capsys):
    teacher, data = shared_path("models", "stories260k"), shared_path("data", "gsm8k", "train.jsonl")
    config = AutoModelForCausalLM.from_pretrained(teacher).config
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 32, 86, 2
    config.num_attention_heads, config.num_key_value_heads = 4, 2
    config.save_pretrained(tmp_path / "config")
    options = {
        "teacher_model_name_or_path": teacher,
        "student_config_name": tmp_path / "config",
        "dataset_name": data,
        "output_dir": tmp_path / "out",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "max_steps": 200,
        "max_eval_samples": 20,
        "evaluate_generation": True,
        "generation_max_new_tokens": 32,
        "use_cpu": True,
    }
    assert run_kava.main(words(options)) == 0
    assert "Dataset loaded: 7473 samples" in capsys.readouterr().out
    summary = summary_of(tmp_path / "out")
    assert summary["cos_sim_at"]["200"] > summary["cos_sim_at"]["50"]
    assert summary["evaluation"]["student_after"]["perplexity"] < summary["evaluation"]["student_before"]["perplexity"]
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final_student")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "final_student")
    prompt = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
    assert student.generate(**prompt, max_new_tokens=8).shape[1] > prompt["input_ids"].shape[1]


def cut_to(config, layers):
    config.layer_types, config.num_hidden_layers = config.layer_types[:layers], layers
    config.max_window_layers = layers
    return config


@pytest.mark.slow
@pytest.mark.parametrize(
    ("teacher_layers", "student_layers", "most_bytes"),
    [(3, 2, 12 * 2**30), pytest.param(28, 24, 24 * 2**30, marks=pytest.mark.exhaustive)],
)
def test_two_steps_at_the_real_shapes(tmp_path, teacher_layers, student_layers, most_bytes):
    """Real widths and vocabulary; in every run of CI with few of the layers, which are all alike."""
    models, data = shared_path("models"), shared_path("data", "gsm8k", "train.jsonl")
    teacher = tmp_path / "teacher"
    torch.manual_seed(0)
    config = cut_to(AutoConfig.from_pretrained(models / "qwen2.5-1.5b-instruct"), teacher_layers)
    cut_to(AutoConfig.from_pretrained(models / "qwen2.5-0.5b"), student_layers).save_pretrained(tmp_path / "student")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(teacher)
    del model
    AutoTokenizer.from_pretrained(models / "qwen2.5-tokenizer").save_pretrained(teacher)
    load_dataset("json", data_files=str(data), split="train[:68]").to_json(tmp_path / "some.jsonl")
    # Without AVX-512 a product of bfloat16 matrices takes up to a hundred times as long.
    dtype = "float32" if torch.backends.cpu.get_cpu_capability() == "AVX2" else "bfloat16"
    options = {
        "teacher_model_name_or_path": teacher,
        "teacher_dtype": dtype,
        "student_config_name": tmp_path / "student",
        "student_dtype": dtype,
        "dataset_name": tmp_path / "some.jsonl",
        "output_dir": tmp_path / "out",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "max_eval_samples": 2,
        "calibration_tokens": 1024,
        "retention_dataset_name": "none",
        "save_strategy": "no",
        "use_cpu": True,
    }
    result = launch(*words(options), timeout=1500)
    assert result.returncode == 0, result.stderr
    for line in ("Teacher: d_model=1536", "Student: d_model=896", "Projector: 896 -> 1536", "no better than chance"):
        assert line in result.stdout
    summary = summary_of(tmp_path / "out")
    assert math.isfinite(summary["final"]["loss"])
    assert summary["throughput"]["peak_memory_bytes"] < most_bytes
