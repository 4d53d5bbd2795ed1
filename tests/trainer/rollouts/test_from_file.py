"""A training on answers that a student wrote before is the one on the same answers as they are sampled."""

import pytest
import torch
from datasets import Dataset
from helpers.caches import build
from helpers.data import random_examples
from helpers.hashes import weight_hash
from helpers.trainers import loss_lines, make_trainer

from kava_trainer.distillation.rollouts.examples import Rollout, rollout_of
from kava_trainer.distillation.rollouts.files import as_dataset, mixed
from kava_trainer.distillation.teacher_cache import CachedTeacher, release_weights

SETTINGS = {"kd_weight": 1.0, "kd_beta": 0.5, "max_grad_norm": 0.0, "on_policy_max_new_tokens": 6}

FROM_FILE = {"rollouts_from": "own.jsonl"}

PADDED = {"max_tokens_per_batch": 0}

END = 0


def written(prompt):
    """A made-up answer to a prompt, of one to five tokens, every third time without an end."""
    number = sum(prompt)
    answer = [1 + (number * (i + 3)) % 490 for i in range(1 + number % 5)]
    return answer if number % 3 == 2 else [*answer, END]


def rollout(example):
    prompt = example["input_ids"][: example["prompt_length"]]
    return rollout_of(prompt, written(prompt), (END,))


def rows_with(chosen, tokenizer, count=16):
    """The usual examples in their order, of which those that are chosen by their prompts are rollouts."""
    examples = random_examples(count)
    own = iter(as_dataset([rollout(example) for example in examples], tokenizer))
    rows = []
    for example in examples:
        sampled, data = next(own), {**example, "origins": [0] * len(example["input_ids"])}
        row = sampled if chosen(example["input_ids"][: example["prompt_length"]]) else data
        rows.append({name: row[name] for name in ("input_ids", "labels", "origins", "prompt_length")})
    return Dataset.from_list(rows)


def figures_alone(trainer):
    """The log lines, without what only a generation tells."""
    told = ("rollout_length", "rollout_limit_share", "rollout_empty_share", "rollout_repetition")
    return [{name: own for name, own in line.items() if name not in told} for line in loss_lines(trainer)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {**PADDED},
        {"on_policy_fraction": 0.5},
        {"on_policy_fraction": 0.5, **PADDED},
        {"on_policy_fraction": 0.5, "lm_tokens": "all", "kd_tokens": "all"},
        {"on_policy_fraction": 0.25, "kd_weight": 0.0},
    ],
    ids=str,
)
def test_values_and_weights_are_those_of_the_same_answers_as_they_are_sampled(tmp_path, tokenizer, changes):
    settings, answered = {**SETTINGS, "on_policy_fraction": 1.0, **changes}, set()

    def write(prompts, student, sampling):
        answered.update(map(tuple, prompts))
        return [written(prompt) for prompt in prompts]

    online = make_trainer(tmp_path, tokenizer, rollout_fn=write, **settings)
    online.train()
    assert len(answered) == 16 * settings["on_policy_fraction"]
    rows = rows_with(lambda prompt: tuple(prompt) in answered, tokenizer)
    read = make_trainer(tmp_path, tokenizer, train=rows, **{**settings, **FROM_FILE})
    assert read.rollouts is None
    read.train()
    assert figures_alone(read) == figures_alone(online)
    assert all(("lm_loss" in line) == (settings["on_policy_fraction"] < 1) for line in loss_lines(read))
    assert weight_hash(read.model) == weight_hash(online.model)


@pytest.mark.parametrize("fraction", [0.5, 1.0])
@pytest.mark.parametrize("packing", [{}, PADDED], ids=["packed", "padded"])
def test_a_cache_gives_the_states_of_a_teacher_that_runs(tmp_path, tokenizer, packing, fraction):
    settings = {**SETTINGS, **FROM_FILE, **packing, "on_policy_fraction": fraction, "projector_dropout": 0.0}
    rows = rows_with(lambda prompt: fraction == 1 or sum(prompt) % 2, tokenizer)
    online, cached = (make_trainer(tmp_path, tokenizer, train=rows, **settings) for _ in range(2))
    model = cached.teacher.model
    examples = [*rows["input_ids"], *cached.eval_dataset["input_ids"]]
    cache = build(tmp_path / "cache", examples, model, cached.teacher.layers)
    cached.read_cache(CachedTeacher(model, cache.read))
    release_weights(model, keep_head=True)
    for trainer in (online, cached):
        trainer.train()
    for line, other in zip(loss_lines(cached), loss_lines(online), strict=True):
        assert line == pytest.approx(other, rel=0.02, abs=1e-3)  # states are kept in bfloat16


@pytest.mark.parametrize("fraction", [0.5, 1.0])
@pytest.mark.parametrize("packing", [{}, PADDED], ids=["packed", "padded"])
def test_a_resumed_run_is_the_same_bit_by_bit(tmp_path, tokenizer, packing, fraction):
    examples = random_examples(32)
    data = Dataset.from_list([{**example, "answer_text": ""} for example in examples[:16]])
    own = as_dataset([rollout(example) for example in examples[16:]], tokenizer)
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "on_policy_fraction": fraction}
    settings = {**SETTINGS, **FROM_FILE, **packing, **saving}

    def trainer():
        return make_trainer(tmp_path, tokenizer, train=mixed(data, own, fraction, seed=7), **settings)

    straight, resumed = trainer(), trainer()
    straight.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert loss_lines(resumed) == loss_lines(straight)
    assert weight_hash(resumed.model) == weight_hash(straight.model)


def test_an_answer_without_an_end_does_not_teach_to_stop(tmp_path, tokenizer):
    own = [Rollout([5, 6], [7, 8], ended=False), Rollout([5, 9], [7, END], ended=True)] * 4
    trainer = make_trainer(
        tmp_path, tokenizer, train=as_dataset(own, tokenizer), on_policy_fraction=1.0, **SETTINGS, **FROM_FILE
    )
    batches, counts = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, torch.device("cpu"))
    learned = [int(token) for batch in batches for row in batch["rows"] for token in row["next_tokens"]]
    assert sorted(learned) == [END] * 4 + [7] * 8 + [8] * 4
    assert counts.tolist() == [32, 16, 16, 16, 0, 0]


def test_a_script_is_told_to_read_the_file_itself(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"give what kava_trainer\.rollout_examples\(file, tokenizer\) reads as train"):
        make_trainer(tmp_path, tokenizer, on_policy_fraction=1.0, **SETTINGS, **FROM_FILE)
    rows = rows_with(lambda prompt: True, tokenizer)
    with pytest.raises(ValueError, match="rollout_fn writes nothing while rollouts_from has answers"):
        make_trainer(tmp_path, tokenizer, train=rows, rollout_fn=print, on_policy_fraction=1.0, **SETTINGS, **FROM_FILE)


def test_a_script_trains_on_such_examples_without_any_argument_for_them(tmp_path, tokenizer):
    rows = rows_with(lambda prompt: True, tokenizer)
    hashes = []
    for changes in ({"lm_weight": 0.0}, {"on_policy_fraction": 1.0, **FROM_FILE}):
        trainer = make_trainer(tmp_path, tokenizer, train=rows, **SETTINGS, **changes)
        trainer.train()
        hashes.append(weight_hash(trainer.model))
    assert hashes[0] == hashes[1]
