"""What a run with LoRA adapters leaves, and what it refuses to begin: whole runs of the program on the CPU."""

import json
import re
import shutil
import sys

import pytest
import torch
from helpers.models import STUDENT_SIZE, tiny_llama
from helpers.programs import QUICKSTART, SHORT, summary_of, words
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import run_kava
from kava_trainer.config.model_arguments import ModelArguments
from kava_trainer.config.parser import parse_arguments
from kava_trainer.models import student, teacher
from kava_trainer.models.lora import add_adapter
from kava_trainer.models.lora_files import adapter_weights, load_weights, save_weights
from kava_trainer.models.teacher import quantization_config
from kava_trainer.quickstart import STUDENT_FOLDER, TEACHER_FOLDER
from kava_trainer.trainer.checkpoint import broken_reason
from kava_trainer.trainer.trainer import KavaTrainer

TOKENS = torch.tensor([[5, 9, 12, 40, 3, 77, 130, 8, 21, 60]])
OPTIONS = {
    **QUICKSTART,
    **SHORT,
    "student_model_name_or_path": TEACHER_FOLDER,
    "use_peft": True,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 8,
    "max_eval_samples": 4,
    "max_length": 128,
    "save_steps": 2,
    "calibration_tokens": 2000,
}


@torch.no_grad()
def logits(model):
    training = model.training
    found = model.eval()(input_ids=TOKENS.to(model.device)).logits.float()
    model.train(training)
    return found


@pytest.fixture
def trained(monkeypatch):
    """The trained student's logits, before and after it was exported."""
    seen = {}

    def save_finals(self, *args):
        seen["before"] = logits(self.student)
        found = original(self, *args)
        seen["after"] = logits(self.student)
        with torch.no_grad():
            self.student.disable_adapters()
            seen["base"] = logits(self.student)
            self.student.enable_adapters()
        return found

    original = KavaTrainer.save_finals
    monkeypatch.setattr(KavaTrainer, "save_finals", save_finals)
    return seen


def distance(left, right):
    return ((left - right).norm() / right.norm()).item()


@pytest.mark.parametrize(
    ("bits", "merge", "tolerance"),
    [
        ("none", True, 1e-5),
        pytest.param("4bit", True, 0.02, marks=pytest.mark.slow),
        pytest.param("4bit", False, 0.02, marks=pytest.mark.slow),
        pytest.param("8bit", True, 0.05, marks=pytest.mark.slow),
    ],
)
def test_the_exported_student_is_the_trained_one(tmp_path, trained, bits, merge, tolerance):
    if bits != "none":
        pytest.importorskip("bitsandbytes")
    options = {**OPTIONS, "student_quantization": bits, "merge_adapter": merge, "output_dir": tmp_path / "out"}
    assert run_kava.main(words({**options, "evaluate_generation": bits == "none"})) == 0
    final = tmp_path / "out" / "final_student"
    assert torch.equal(trained["before"], trained["after"])
    assert distance(trained["base"], trained["after"]) > 3 * tolerance
    if merge:
        student = AutoModelForCausalLM.from_pretrained(final)
        assert not (final / "adapter_config.json").exists()
        assert "quantization_config" not in json.loads((final / "config.json").read_text())
    else:
        how = {"quantization_config": quantization_config(bits)} if bits != "none" else {}
        student = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(TEACHER_FOLDER, **how), final)
        assert (final / "adapter_model.safetensors").stat().st_size < 700_000
        assert not (final / "model.safetensors").exists()
        assert not list(final.glob("*.bin"))
    assert distance(logits(student), trained["after"]) <= tolerance
    assert len(AutoTokenizer.from_pretrained(final)) == len(AutoTokenizer.from_pretrained(STUDENT_FOLDER))
    assert (final / "generation_config.json").exists()
    summary = summary_of(tmp_path / "out")
    assert summary["status"] == "completed"
    assert summary["throughput"]["estimated_memory_bytes"] > 0


@pytest.mark.estimate
def test_an_adapter_names_its_base_and_no_secret_and_loads_without_a_name(tmp_path, trained, monkeypatch, capsys):
    base = tmp_path / "models" / "base"
    shutil.copytree(TEACHER_FOLDER, base)
    monkeypatch.chdir(tmp_path)
    options = {**OPTIONS, "student_model_name_or_path": "models/base", "merge_adapter": False, "output_dir": "out"}
    assert run_kava.main(words({**options, "hub_token": "hf_planted"})) == 0
    shown = capsys.readouterr().out
    assert "Student: models/base (pretrained, LoRA)" in shown
    assert "LoRA: rank 16, 0.16 M parameters are trained" in shown
    assert re.search(r"^Memory estimate for training: .*, adapter \d", shown, re.M)
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert broken_reason(checkpoint) is None
    assert not (checkpoint / "model.safetensors").exists()
    assert all("lora_" in name for name in load_file(checkpoint / "adapter_model.safetensors"))
    final = tmp_path / "out" / "final_student"
    config = json.loads((final / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert config["target_modules"] == sorted(config["target_modules"])
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (16, 32, "CAUSAL_LM")
    monkeypatch.chdir("/")
    assert distance(logits(AutoModelForCausalLM.from_pretrained(final)), trained["after"]) < 1e-6
    for path in (path for path in (tmp_path / "out").rglob("*") if path.is_file()):
        assert b"hf_planted" not in path.read_bytes(), path
    card = (final / "README.md").read_text()
    assert re.search(r"^library_name: peft$", card, re.M)
    assert re.search(r"^- lora$", card, re.M)
    assert 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("models/base"), "final_student")' in card
    assert "A LoRA adapter of rank 16 was trained on the frozen student; this is the adapter alone." in card


@pytest.mark.slow
def test_everything_works_together_with_adapters(tmp_path, capsys):
    more = {
        "kd_weight": 0.5, "teacher_cache_dir": tmp_path / "cache", "gradient_checkpointing": True, "run_control": True,
        "layer_mapping": "uniform:2", "evaluate_generation": True, "eval_strategy": "steps", "eval_steps": 2,
        "optim": "adamw_torch_8bit", "student_dtype": "bfloat16", "lora_modules_to_save": "norm",
        "lora_target_modules": "q_proj,v_proj,down_proj", "projector_direction": "teacher_to_student",
        "projector_anchor": "reconstruction",
    }  # fmt: skip
    assert run_kava.main(words({**OPTIONS, **more, "output_dir": tmp_path / "out"})) == 0
    summary = summary_of(tmp_path / "out")
    assert summary["evaluation"]["control_sft"]["exact_match"] is not None
    assert summary["problems"] == []
    assert all((tmp_path / "out" / "control" / "checkpoint-2").glob("adapter_model.safetensors"))
    assert "cannot read packed examples" not in capsys.readouterr().out


def tiny_gpt2():
    """Its layers hold their weights transposed, and have biases."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


STUDENTS = {
    "head of its own": (lambda: tiny_llama(STUDENT_SIZE, 2), ["q_proj"], ["lm_head", "norm"]),
    "embeddings and head": (lambda: tiny_llama(STUDENT_SIZE, 2, tie=False), ["embed_tokens", "lm_head", "v_proj"], []),
    "transposed": (tiny_gpt2, "all-linear", []),
}


@pytest.mark.parametrize("case", STUDENTS)
def test_a_merged_student_computes_what_the_adapters_do(tmp_path, case):
    make, targets, saved = STUDENTS[case]
    student = make()
    changes = {"lora_target_modules": targets, "lora_modules_to_save": saved, "lora_dropout": 0.0}
    add_adapter(student, ModelArguments("teacher", student_model_name_or_path="s", use_peft=True, **changes))
    base, generator = logits(student), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in adapter_weights(student).values():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    save_weights(student, tmp_path, merge_adapter=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert merged.state_dict().keys() == make().state_dict().keys()
    torch.testing.assert_close(logits(merged), logits(student), rtol=1e-4, atol=1e-5)
    assert distance(logits(merged), base) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("merge", [True, False])
def test_a_student_that_was_saved_in_4_bit_is_adapted_as_it_is(tmp_path, trained, merge):
    pytest.importorskip("bitsandbytes")
    how = {"quantization_config": quantization_config("4bit"), "device_map": {"": "cpu"}}
    AutoModelForCausalLM.from_pretrained(TEACHER_FOLDER, **how).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(STUDENT_FOLDER).save_pretrained(tmp_path / "base")
    options = {**OPTIONS, "student_model_name_or_path": tmp_path / "base", "merge_adapter": merge}
    assert run_kava.main(words({**options, "output_dir": tmp_path / "out"})) == 0
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final_student")
    assert getattr(student, "is_quantized", False) == (not merge)
    assert distance(logits(student), trained["after"]) <= 0.02


def quantised_student(folder, method="bitsandbytes"):
    shutil.copytree(TEACHER_FOLDER, folder / "quantised")
    config = json.loads((folder / "quantised" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "load_in_4bit": True, "bits": 4}
    (folder / "quantised" / "config.json").write_text(json.dumps(config))
    return folder / "quantised"


BAD_REQUESTS = {
    "quantised without adapters": (
        lambda f: {"use_peft": False, "student_quantization": "4bit"},
        "student_quantization 4bit leaves weights that cannot be trained themselves; write use_peft true",
    ),
    "a quantised checkpoint without adapters": (
        lambda f: {"use_peft": False, "student_model_name_or_path": quantised_student(f)},
        "holds weights quantised by bitsandbytes, which cannot be trained themselves; write use_peft true",
    ),
    "quantised twice": (
        lambda f: {"student_quantization": "4bit", "student_model_name_or_path": quantised_student(f)},
        "is quantised by bitsandbytes already; write student_quantization none",
    ),
    "merged into what nobody can dequantise": (
        lambda f: {"student_model_name_or_path": quantised_student(f, "gptq")},
        "quantised by gptq; write merge_adapter false",
    ),
    "quantised teacher layers": (
        lambda f: {"student_init": "teacher_layers", "student_quantization": "4bit"},
        "student_quantization 4bit is for a student with weights of its own, .* layers of the teacher; write none",
    ),
    "quantised random weights": (
        lambda f: {"student_model_name_or_path": "quickstart", "student_quantization": "8bit"},
        "student_quantization 8bit is for .* random weights; write none",
    ),
    "an adapter on random weights": (
        lambda f: {"student_model_name_or_path": "quickstart", "merge_adapter": False},
        "merge_adapter is false, but the student starts from random weights, .*; write merge_adapter true",
    ),
    "an adapter on teacher layers": (
        lambda f: {"student_init": "teacher_layers", "merge_adapter": False},
        "starts from layers of the teacher, which nobody could load again .* write merge_adapter true",
    ),
    "LoRA arguments alone": (
        lambda f: {"use_peft": False, "lora_r": 8, "lora_target_modules": "q_proj"},
        "lora_r, lora_target_modules are given, but use_peft is false; write use_peft true",
    ),
    "one LoRA argument alone": (lambda f: {"use_peft": False, "merge_adapter": False}, "merge_adapter is given, but"),
    "no such modules": (
        lambda f: {"lora_target_modules": "query,value"},
        "names query, value, which the student, a .*, does not have. It has down_proj, .*, q_proj, up_proj, v_proj",
    ),
    "no such module to save": (lambda f: {"lora_modules_to_save": "head"}, "lora_modules_to_save names head, which"),
    "no modules": (lambda f: {"lora_target_modules": ","}, r"lora_target_modules is \[\]; write all-linear alone, or"),
    "all and some": (lambda f: {"lora_target_modules": "all-linear,q_proj"}, "write all-linear alone, or the modules'"),
    "rank 0": (lambda f: {"lora_r": 0}, "lora_r is 0; write a whole number from 1 to 16384"),
    "alpha 0": (lambda f: {"lora_alpha": 0}, "lora_alpha is 0; write 1 or more"),
    "dropout 1": (lambda f: {"lora_dropout": 1.0}, "lora_dropout is 1.0; write a number from 0 to below 1"),
    "rank in words": (lambda f: {"lora_r": "many"}, 'lora_r is "many"; write a whole number'),
    "bits": (lambda f: {"student_quantization": "2bit"}, "student_quantization is .*write one of none, 8bit, 4bit"),
}


@pytest.mark.estimate
@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_bad_request_ends_before_weights_are_loaded(tmp_path, capsys, monkeypatch, case):
    def load(*args, **kwargs):
        pytest.fail("weights were loaded")

    monkeypatch.setattr(student, "load_causal_lm", load)
    monkeypatch.setattr(teacher, "load_causal_lm", load)
    make_changes, message = BAD_REQUESTS[case]
    options = {**OPTIONS, "output_dir": tmp_path / "out", **make_changes(tmp_path)}
    assert run_kava.main(words(options)) == 2
    error = capsys.readouterr().err
    assert re.search(rf"^Error: .*({message})", error, re.M), error
    assert len([line for line in error.splitlines() if line.startswith("Error: ")]) == 1
    assert not list(tmp_path.glob("out/*"))


def test_bitsandbytes_is_named_for_the_student(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert run_kava.main(words({**OPTIONS, "student_quantization": "4bit", "output_dir": tmp_path})) == 2
    assert "student_quantization 4bit needs bitsandbytes" in capsys.readouterr().err


def test_lists_come_from_json_and_the_command_line(tmp_path):
    base = {"teacher_model_name_or_path": "quickstart", "student_model_name_or_path": str(TEACHER_FOLDER)}
    base |= {"dataset_name": "quickstart", "use_peft": True, "use_cpu": True, "output_dir": str(tmp_path)}
    for value in (["q_proj", "v_proj"], "q_proj,v_proj", "q_proj, v_proj"):
        (tmp_path / "args.json").write_text(json.dumps({**base, "lora_target_modules": value}))
        assert parse_arguments([str(tmp_path / "args.json")]).model.lora_target_modules == ["q_proj", "v_proj"]
    argv = [str(tmp_path / "args.json"), "--lora_target_modules"]
    assert parse_arguments([*argv, "k_proj", "o_proj"]).model.lora_target_modules == ["k_proj", "o_proj"]
    assert parse_arguments([*argv, "k_proj,o_proj"]).model.lora_target_modules == ["k_proj", "o_proj"]
    assert parse_arguments([*argv, "all-linear"]).model.lora_target_modules == "all-linear"
    both = parse_arguments([*argv, "k_proj", "--lora_modules_to_save", "lm_head", "--no_merge_adapter"]).model
    assert (both.lora_modules_to_save, both.merge_adapter) == (["lm_head"], False)


def two_kinds(seed):
    """A model in bfloat16 but for its norms."""
    model = tiny_llama(STUDENT_SIZE, 2, seed=seed).bfloat16()
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed))
    return model


@pytest.mark.parametrize("make", [two_kinds, lambda seed: tiny_llama(STUDENT_SIZE, 2, seed=seed, tie=False)])
def test_saved_weights_are_loaded_bit_by_bit_and_no_random_number_is_drawn(tmp_path, make):
    saved, other = make(1), make(2)
    save_weights(saved, tmp_path)
    torch.manual_seed(5)
    load_weights(tmp_path, other)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    for (name, weight), (_, own) in zip(saved.named_parameters(), other.named_parameters(), strict=True):
        assert weight.dtype == own.dtype, name
        assert torch.equal(weight, own), name


def test_weights_that_are_not_in_the_file_are_named(tmp_path):
    model = tiny_llama(STUDENT_SIZE, 2)
    save_weights(model, tmp_path)
    kept = {
        name: weight for name, weight in load_file(tmp_path / "model.safetensors").items() if "layers.1" not in name
    }
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    told = r"model.layers.1.input_layernorm.weight and 8 more of the student's weights are not in it"
    with pytest.raises(ValueError, match=told):
        load_weights(tmp_path, model)
