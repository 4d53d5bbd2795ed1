"""What a student is worth, read in one process or, where its weights are sharded, by several ranks."""

import json
from pathlib import Path
from unittest import mock

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoTokenizer

from helpers import fault_child, models
from helpers.data import random_examples
from helpers.sharded_run import sharding_on_cpu
from helpers.trainers import make_trainer
from kava_trainer.config.launcher import is_fsdp_asked
from kava_trainer.config.parser import parse_arguments
from kava_trainer.evaluation.answers import evaluate_with_answers
from kava_trainer.quickstart import STUDENT_FOLDER
from kava_trainer.runs import measure as measure_run
from kava_trainer.runs.rollouts import sample
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


def evaluate(output, words):
    """Write what `python -m kava_trainer evaluate` measures of the models of a command line, by rank."""
    sharded, original = [], measure_run.measure

    def watched(console, arguments, models, *others):
        sharded.append(is_sharded(models.student))
        return original(console, arguments, models, *others)

    with mock.patch.object(measure_run, "measure", watched):
        figures = measure_run.measure_models(parse_arguments(words))
    with open(f"{output}{PartialState().process_index}.json", "w") as file:
        json.dump({"figures": figures, "sharded": sharded}, file)
    return 0


def evaluate_sharded(*arguments):
    with sharding_on_cpu():
        return evaluate(*arguments)


def answer(path, words):
    """`python -m kava_trainer rollouts` with a command line; 9 where the weights are not held as they should be."""
    sharded, original = [], sample.sample_answers

    def watched(prompts, student, sampling):
        sharded.append(is_sharded(student))
        return original(prompts, student, sampling)

    with mock.patch.object(sample, "sample_answers", watched):
        sample.sample_rollouts(parse_arguments(words), Path(path))
    return 0 if set(sharded) == {is_fsdp_asked()} else 9


def answer_sharded(*arguments):
    with sharding_on_cpu():
        return answer(*arguments)


def train_with_another_term(*arguments):
    """As `fault_child.train`; the teacher's divergence is weighed once the trainer is there."""
    return fault_child.train(*arguments, prepare=lambda trainer: setattr(trainer.args, "kd_weight", 0.5))


def train_with_another_term_sharded(*arguments):
    with sharding_on_cpu():
        return train_with_another_term(*arguments)
