"""One training done by `transformers.Trainer` and one by `KavaTrainer` on the same student, data and arguments."""

import functools
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from kava_trainer import KavaTrainer, KavaTrainingArguments

SETTINGS = {
    "use_cpu": True, "max_steps": 3, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 8,
    "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no",
    "disable_tqdm": True, "report_to": "none", "num_train_epochs": 1, "save_steps": 500,
}  # fmt: skip

OURS = {"mercator_weight": 0.0, "lm_weight": 1.0, "max_tokens_per_batch": 0, "plain_output": True}
"""What makes of `KavaTrainer` a `Trainer`: no alignment, and no packing, which deals the examples out anew."""


def _rows(count: int, seed: int) -> list[dict[str, list[int]]]:
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        ids = [rng.randint(1, 63) for _ in range(rng.randint(4, 10))]
        cut = rng.randint(1, len(ids) - 2)
        rows.append({"input_ids": ids, "labels": [-100] * cut + ids[cut:]})
    return rows


TRAINED, HELD_OUT = _rows(16, 0), _rows(5, 1)


@functools.cache
def as_dataset(name: str) -> Dataset:
    """`TRAINED` or `HELD_OUT`, made once."""
    return Dataset.from_list({"TRAINED": TRAINED, "HELD_OUT": HELD_OUT}[name])


def tiny_student() -> LlamaForCausalLM:
    """Of one block and 64 tokens."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    tokens = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**sizes, **tokens, num_attention_heads=2, num_key_value_heads=1))


def tiny_mixture() -> MixtralForCausalLM:
    """Of two experts, whose routers have an auxiliary loss."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    tokens = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    routers = {"num_local_experts": 2, "output_router_logits": True, "router_aux_loss_coef": 0.5}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return MixtralForCausalLM(MixtralConfig(**sizes, **tokens, **routers, **heads, num_experts_per_tok=1))


class Events(TrainerCallback):
    """Takes down every event with the step it came at."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        for name in (name for name in dir(TrainerCallback) if name.startswith("on_")):
            setattr(self, name, self._note(name))

    def _note(self, name: str) -> Any:
        return lambda args, state, control, **kwargs: self.seen.append((name, state.global_step))


@dataclass
class Outcome:
    """What a training leaves."""

    log: list[dict[str, float]]
    state: dict[str, Any]
    files: dict[str, set[str]]
    weights: dict[str, torch.Tensor]
    metrics: dict[str, float]
    events: list[tuple[str, int]]
    evaluation: dict[str, float] = field(default_factory=dict)


def make(kind: type[Trainer], folder: Path, tokenizer: Any, changes: dict[str, Any], events: Events) -> Trainer:
    """A trainer of either kind.

    `changes` are training arguments, and under `given` parameters of the trainer, under `ours` arguments that
    `KavaTrainer` alone takes, and under `student` what makes another one.
    """
    given = {"train_dataset": as_dataset("TRAINED"), "eval_dataset": as_dataset("HELD_OUT")}
    given |= {"processing_class": tokenizer, **changes.get("given", dict)()}
    given["callbacks"] = [events, *given.get("callbacks", ())]
    own = {name: value for name, value in changes.items() if name not in ("given", "resume", "ours", "student")}
    student = changes.get("student", tiny_student)()
    if kind is KavaTrainer:
        settings = {**SETTINGS, **OURS, **changes.get("ours", {}), **own}
        return KavaTrainer(student, args=KavaTrainingArguments(str(folder), **settings), **given)
    args = TrainingArguments(str(folder), **{**SETTINGS, **own})
    return kind(student, args, **{"data_collator": DataCollatorForSeq2Seq(tokenizer), **given})


def outcome(kind: type[Trainer], folder: Path, tokenizer: Any, changes: dict[str, Any]) -> Outcome:
    """Train, and with `resume` train again from the checkpoint of that step with a new trainer."""
    events = Events()
    trainer = make(kind, folder, tokenizer, changes, events)
    output = trainer.train()
    if step := changes.get("resume"):
        events = Events()
        trainer = make(kind, folder, tokenizer, changes, events)
        output = trainer.train(str(folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"))
    state = trainer.state
    kept = (
        "global_step", "epoch", "max_steps", "num_train_epochs", "best_metric", "best_global_step", "logging_steps",
        "eval_steps", "save_steps", "train_batch_size", "num_input_tokens_seen", "is_world_process_zero",
    )  # fmt: skip
    best = state.best_model_checkpoint and Path(state.best_model_checkpoint).name
    return Outcome(
        log=list(state.log_history),
        state={name: getattr(state, name) for name in kept} | {"best_model_checkpoint": best},
        files={c.name: {f.name for f in c.iterdir()} for c in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")},
        weights={name.removeprefix("student."): p.detach().clone() for name, p in trainer.model.named_parameters()},
        metrics=output.metrics,
        events=events.seen,
        evaluation=trainer.evaluate() if changes.get("eval_strategy", "no") != "no" else {},
    )
