"""Requests that cannot be done, each with what is said of it."""

import json
import shutil
from functools import cache
from tempfile import TemporaryDirectory

import torch
from transformers import AutoTokenizer, LlamaConfig, T5Config

import run_kava
from helpers.data import write_dataset
from helpers.models import STUDENT_SIZE, tiny_llama
from helpers.programs import QUICKSTART, SHORT, words
from kava_trainer.distillation.projector import ElasticBottleneck, ProjectorConfig
from kava_trainer.distillation.projector_files import save_projectors
from kava_trainer.quickstart import STUDENT_FOLDER, TEACHER_FOLDER
from kava_trainer.trainer.checkpoint import write_manifest


def other_tokenizer(folder):
    tokenizer = AutoTokenizer.from_pretrained(STUDENT_FOLDER)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    tiny_llama(32, 1).config.save_pretrained(folder / "other")
    tokenizer.save_pretrained(folder / "other")
    (folder / "other" / "tokenizer.json").write_text(json.dumps(content))
    return folder / "other"


def config_of(folder, **changes):
    sizes = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    LlamaConfig(**{**sizes, **heads, **changes}).save_pretrained(folder / "config")
    return folder / "config"


def t5_config(folder):
    T5Config(vocab_size=512, d_model=32, num_layers=1).save_pretrained(folder / "config")
    return folder / "config"


def corrupted_teacher(folder):
    copy = folder / "broken"
    copy.mkdir()
    for file in TEACHER_FOLDER.iterdir():
        (copy / file.name).write_bytes(file.read_bytes()[: 1000 if file.suffix == ".safetensors" else None])
    return copy


def foreign_checkpoint(folder):
    checkpoint = folder / "checkpoint-1"
    tiny_llama(STUDENT_SIZE, 2).save_pretrained(checkpoint)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 1}))
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.save({}, checkpoint / name)
    save_projectors(torch.nn.ModuleList([ElasticBottleneck(ProjectorConfig(7, 5))]), checkpoint / "projector.pth")
    write_manifest(checkpoint, None)
    return checkpoint


def student(path):
    return {"student_model_name_or_path": None, "student_config_name": path}


@cache
def _trained():
    """The output folder of a run that is made once; it goes when the process does."""
    folder = TemporaryDirectory()
    options = {**QUICKSTART, **SHORT, "max_steps": 1, "save_steps": 1, "max_length": 128, "output_dir": folder.name}
    assert run_kava.main(words(options)) == 0
    return folder


def damaged_checkpoint(folder, name):
    shutil.copytree(_trained().name, folder, dirs_exist_ok=True)
    checkpoint = folder / "checkpoint-1"
    (checkpoint / name).write_bytes((checkpoint / name).read_bytes()[:100])
    return checkpoint


BAD_REQUESTS = {
    "missing teacher": (
        lambda f: {"teacher_model_name_or_path": f / "gone"},
        "teacher_model_name_or_path names the folder .*gone, which does not exist",
    ),
    "hub teacher offline": (lambda f: {"teacher_model_name_or_path": "nobody/nothing"}, "'nobody/nothing' cannot be"),
    "corrupted teacher": (
        lambda f: {"teacher_model_name_or_path": corrupted_teacher(f)},
        "teacher '.*' cannot be loaded",
    ),
    "missing student": (
        lambda f: student(f / "gone"),
        "student_config_name names the folder .*gone, which does not exist",
    ),
    "missing data": (lambda f: {"dataset_name": f / "gone.jsonl"}, "gone.jsonl, which does not exist"),
    "empty data": (lambda f: {"dataset_name": write_dataset(f, "")}, "is empty"),
    "broken data": (
        lambda f: {"dataset_name": write_dataset(f, '{"text": "a"}\n{"te\n')},
        "cannot be loaded: line 2 is",
    ),
    "unknown columns": (lambda f: {"dataset_name": write_dataset(f, '{"x": "a"}\n' * 3)}, "has the columns x"),
    "unknown split": (lambda f: {"dataset_train_split": "dev"}, "has no split 'dev'"),
    "other tokenizer": (
        lambda f: {"student_model_name_or_path": other_tokenizer(f), "on_policy_fraction": 0.5},
        "on_policy_fraction is 0.5, but the tokenizers of teacher and student differ",
    ),
    "small vocabulary": (lambda f: student(config_of(f, vocab_size=300)), "embeddings for 300 tokens only"),
    "short context": (lambda f: student(config_of(f, max_position_embeddings=64)), "the student reads 64 tokens"),
    "mapping": (lambda f: {"layer_mapping": "[[3, 9]]"}, r"names the pair \[3, 9\]"),
    "two widths without projector": (
        lambda f: {"projector_direction": "none"},
        "the teacher's are 128 wide and the student's 64",
    ),
    "anchor without projector": (
        lambda f: {"projector_direction": "none", "projector_anchor": "pca"},
        "projector_direction none has none; its target cannot collapse",
    ),
    "inherited by nobody": (
        lambda f: {"layer_mapping": "inherited"},
        "layer_mapping inherited needs a student that is cut out of its teacher, and this one is not",
    ),
    "unknown tokens": (lambda f: {"kd_tokens": "prompts"}, "kd_tokens"),
    "too many pairs": (lambda f: {"layer_mapping": "uniform:4"}, "asks for 4 pairs"),
    "teacher layers": (
        lambda f: {**student(config_of(f, hidden_size=64)), "student_init": "teacher_layers"},
        "A student cannot be cut out of the teacher",
    ),
    "checkpoint": (lambda f: {"resume_from_checkpoint": f / "gone"}, "is not a folder"),
    "foreign checkpoint": (
        lambda f: {**student(config_of(f)), "resume_from_checkpoint": foreign_checkpoint(f)},
        "does not fit this run",
    ),
    "damaged weights": (
        lambda f: {"resume_from_checkpoint": damaged_checkpoint(f, "model.safetensors")},
        "cannot be resumed: model.safetensors has 100 bytes in place of",
    ),
    "damaged optimizer": (
        lambda f: {"resume_from_checkpoint": damaged_checkpoint(f, "optimizer.pt")},
        "cannot be resumed: optimizer.pt has 100 bytes in place of",
    ),
    "damaged projector": (
        lambda f: {"resume_from_checkpoint": damaged_checkpoint(f, "projector.pth")},
        "cannot be resumed: projector.pth has 100 bytes in place of",
    ),
    "damaged state": (
        lambda f: {"resume_from_checkpoint": damaged_checkpoint(f, "trainer_state.json")},
        "cannot be resumed: trainer_state.json has 100 bytes in place of",
    ),
    "unknown tracker": (lambda f: {"report_to": "tensorbord"}, "report_to tensorbord cannot be used"),
    "hub offline": (lambda f: {"push_to_hub": "true"}, "push_to_hub true needs the hub, which cannot be reached"),
    "wrong kind of student": (lambda f: student(t5_config(f)), "student of type 't5' cannot be loaded"),
    "student is a file": (
        lambda f: {"final_dir": write_dataset(f, "x", "final_student").parent},
        "is a file, but the student's folder goes there",
    ),
    "output is a file": (lambda f: {"output_dir": write_dataset(f, "x", "file")}, "output_dir .* cannot be made"),
    "eval without data": (
        lambda f: {"dataset_name": write_dataset(f, '{"text": "a b c"}\n'), "eval_strategy": "steps"},
        "no held-out examples",
    ),
}
