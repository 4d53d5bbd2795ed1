"""One optimizer step for `outcomes.one_step`, in one process or one of several ranks; rank 0 writes the weights."""

import json

import torch
from datasets import Dataset
from transformers import AutoTokenizer

from helpers import models
from helpers.data import random_examples
from helpers.sharded_teacher import by_shards
from helpers.trainers import loss_lines, make_trainer
from kava_trainer.distillation.rollouts.examples import Rollout
from kava_trainer.distillation.rollouts.files import as_dataset, mixed
from kava_trainer.quickstart import STUDENT_FOLDER
from kava_trainer.utils.distributed import whole


def made_up_answers(prompts, student, sampling):
    """The same answer to the same prompt, on whatever rank."""
    return [[1 + sum(prompt) * (i + 3) % 500 for i in range(1 + sum(prompt) % 5)] + [0] for prompt in prompts]


def with_answers_from_a_file(count, tokenizer):
    """The usual examples, of which every other one holds a student's answer."""
    rows = random_examples(count)
    prompts = [row["input_ids"][: row["prompt_length"]] for row in rows]
    answers = made_up_answers(prompts, None, None)
    own = as_dataset([Rollout(*pair, ended=True) for pair in zip(prompts, answers, strict=True)], tokenizer)
    return mixed(Dataset.from_list([{**row, "answer_text": ""} for row in rows]), own, 0.5, 0).select(range(count))


def main(
    output: str,
    batch_size: str,
    accumulation: str,
    weighting: str,
    student: str = "tiny_llama",
    tokens: str = "",
    on_policy: str = "",
    changes: str = "{}",
    teacher: str = "",
) -> None:
    """`teacher` is a folder that it is loaded from by shards; by default it is whole."""
    mercator_weight, lm_weight = map(float, weighting.split(","))
    tokenizer, given = AutoTokenizer.from_pretrained(STUDENT_FOLDER), {}
    if on_policy == "file":
        given = {"train": with_answers_from_a_file(8, tokenizer), "rollouts_from": "own", "on_policy_fraction": 0.5}
    elif on_policy:
        given = {"on_policy_fraction": float(on_policy), "rollout_fn": made_up_answers}
    trainer = make_trainer(
        output,
        tokenizer,
        count=8,
        model=getattr(models, student),
        max_steps=1,
        per_device_train_batch_size=int(batch_size),
        gradient_accumulation_steps=int(accumulation),
        projector_dropout=0.0,
        optim="sgd",
        learning_rate=1.0,
        projector_learning_rate=1.0,
        lr_scheduler_type="constant",
        mercator_weight=mercator_weight,
        lm_weight=lm_weight,
        teacher=by_shards(teacher) if teacher else None,
        **given,
        **({"kd_weight": 0.5, "kd_tokens": tokens, "relative_mse_weight": 0.5} if tokens else {}),
        **{"max_grad_norm": 0.0, **json.loads(changes)},
    )
    write_step(trainer, output)


def write_step(trainer, output: str) -> None:
    """Train, and write what `outcomes.assert_same_step` compares."""
    trainer.train()
    metrics = trainer.evaluate()
    weights = {name: whole(parameter.detach()) for name, parameter in trainer.model.named_parameters()}
    if trainer.is_world_process_zero():
        state = {
            "weights": weights,
            "line": {k: v for k, v in loss_lines(trainer)[0].items() if isinstance(v, float)},
            "evaluation": {name: metrics[f"eval_{name}"] for name in ("loss", "cos_sim", "lm_loss", "cka")},
            "throughput": trainer.throughput()["padding_fraction"],
            "world_size": trainer.args.world_size,
            "wrapper": type(trainer.model_wrapped).__name__,
        }
        torch.save(state, f"{output}.pt")
