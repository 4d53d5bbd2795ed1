"""What a student is worth, read in one process or, where its weights are sharded, by several ranks."""

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoTokenizer

from helpers import models
from helpers.data import random_examples
from helpers.sharded_run import sharding_on_cpu
from helpers.trainers import make_trainer
from kava_trainer.evaluation.answers import evaluate_with_answers
from kava_trainer.quickstart import STUDENT_FOLDER
from kava_trainer.utils.distributed import is_sharded, whole


def untied_llama(*sizes, seed):
    return models.tiny_llama(*sizes, seed=seed, tie=False)


def whole_projectors(trainer):
    return {name: whole(tensor.detach()) for name, tensor in trainer.target.state_dict().items()}


def measure(output, held_out, settings):
    """Write all figures of a student before any training, and its projectors once they are calibrated."""
    kind = {"untied": untied_llama}.get(settings.pop("kind", ""), models.tiny_llama)
    tokenizer = AutoTokenizer.from_pretrained(STUDENT_FOLDER)
    trainer = make_trainer(output, tokenizer, count=40, model=kind, calibration_tokens=400, **settings)
    rows = [{**row, "answer_text": f"#### {len(row['input_ids'])}"} for row in random_examples(held_out, seed=5)]
    data, text = Dataset.from_list(rows), Dataset.from_list(random_examples(3, seed=6))
    trainer.eval_dataset = data
    trainer.choose_probe()
    trainer.student.generation_config.eos_token_id = [0, *range(3, 512, 5)]  # so that answers have many lengths
    own = (trainer.student, tokenizer, data, trainer.data_collator, 2, 12, text)
    measured = trainer.model.read(lambda: evaluate_with_answers(*own))
    trainer.calibrate()
    metrics = trainer.evaluate()
    again = trainer.model.read(lambda: evaluate_with_answers(*own))
    projectors, sharded = whole_projectors(trainer), is_sharded(trainer.model)
    held = {type(parameter).__name__ for parameter in trainer.model.parameters()}
    probe = trainer.run_probe()
    if PartialState().is_main_process:
        timing = ("_runtime", "_per_second", "_time")
        content = {
            "figures": measured.figures, "again": again.figures, "answers": measured.answers, "projectors": projectors,
            "metrics": {name: value for name, value in metrics.items() if not name.endswith(timing)},
            "probe": {**probe.mean(), **probe.gradient_shares}, "sharded": sharded, "held": held,
        }  # fmt: skip
        torch.save(content, output + ".pt")
    return 0


def measure_sharded(*arguments):
    with sharding_on_cpu():
        return measure(*arguments)
