"""A cache serves the examples of the data, and a teacher that runs reads the answers that the student writes now."""

import pytest
import torch
from helpers.caches import build
from helpers.hashes import weight_hash
from helpers.trainers import loss_lines, make_trainer

from kava_trainer.distillation.teacher_cache import CachedTeacher, release_weights

SETTINGS = {
    "kd_weight": 1.0, "kd_beta": 0.5, "max_grad_norm": 0.0, "projector_dropout": 0.0, "on_policy_fraction": 0.5,
    "on_policy_max_new_tokens": 6,
}  # fmt: skip

PADDED = {"max_tokens_per_batch": 0}

END = 0


def write(prompts, student, sampling):
    return [[1 + (sum(prompt) * (i + 3)) % 490 for i in range(1 + sum(prompt) % 5)] + [END] for prompt in prompts]


def exact(trainer):
    """A cache that loses nothing: what the teacher makes of an example by itself."""
    running = trainer.teacher

    def read(ids):
        tokens = torch.tensor([list(ids)])
        states = running.features({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
        return {layer: own[0] for layer, own in states.items()}

    return CachedTeacher(running.model, read)


def read_by(teacher, monkeypatch):
    """Token ids of all examples that a teacher reads from now on."""
    seen, features = [], teacher.features

    def watched(batch):
        rows = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
        seen.extend(tuple(ids[mask].tolist()) for ids, mask in rows)
        return features(batch)

    monkeypatch.setattr(teacher, "features", watched)
    return seen


@pytest.mark.parametrize(
    "changes",
    [{}, PADDED, {"kd_weight": 0.0}, {"kd_tokens": "all", "lm_tokens": "all", "on_policy_fraction": 0.25}],
    ids=str,
)
def test_values_are_those_of_a_teacher_that_reads_everything(tmp_path, tokenizer, changes):
    trained = []
    for cached in (False, True):
        trainer = make_trainer(tmp_path, tokenizer, rollout_fn=write, **{**SETTINGS, **changes})
        if cached:
            trainer.read_cache(exact(trainer))
            assert isinstance(trainer.teacher, CachedTeacher)
        trainer.train()
        trained.append(trainer)
    for line, other in zip(*map(loss_lines, trained), strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-6)
    for own, other in zip(*(trainer.model.parameters() for trainer in trained), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("packing", [{}, PADDED], ids=["packed", "padded"])
def test_the_teacher_reads_the_answers_alone(tmp_path, tokenizer, packing, monkeypatch):
    written = []

    def kept(prompts, student, sampling):
        answers = write(prompts, student, sampling)
        written.extend((*prompt, *answer) for prompt, answer in zip(prompts, answers, strict=True))
        return answers

    trainer = make_trainer(tmp_path, tokenizer, rollout_fn=kept, **SETTINGS, **packing)
    examples = [*trainer.train_dataset["input_ids"], *trainer.eval_dataset["input_ids"]]
    cache = build(tmp_path / "cache", examples, trainer.teacher.model, trainer.teacher.layers)
    trainer.read_cache(CachedTeacher(trainer.teacher.model, cache.read))
    seen = read_by(trainer.running_teacher, monkeypatch)
    trainer.train()
    assert len(written) == 8
    assert sorted(seen) == sorted(written)


@pytest.mark.parametrize("packing", [{}, PADDED], ids=["packed", "padded"])
def test_a_resumed_run_is_the_same_bit_by_bit(tmp_path, tokenizer, packing):
    saving = {"max_steps": 4, "rollouts_every": 2, "save_strategy": "steps", "save_steps": 1}

    def cached():
        trainer = make_trainer(tmp_path, tokenizer, **SETTINGS, **packing, **saving)
        trainer.read_cache(exact(trainer))
        return trainer

    straight, resumed = cached(), cached()
    straight.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert loss_lines(resumed) == loss_lines(straight)
    assert weight_hash(resumed.model) == weight_hash(straight.model)


@pytest.mark.parametrize("packing", [{}, PADDED], ids=["packed", "padded"])
def test_an_answer_of_nothing_leaves_a_prompt_of_which_nothing_is_learned(tmp_path, tokenizer, packing):
    settings = {**SETTINGS, **packing, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    lines = []
    for cached in (False, True):
        trainer = make_trainer(tmp_path, tokenizer, 8, rollout_fn=lambda prompts, *_: [[] for _ in prompts], **settings)
        if cached:
            trainer.read_cache(exact(trainer))
        trainer.train()
        lines.append(loss_lines(trainer))
    for line, other in zip(*lines, strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_where_answers_are_all_or_the_teacher_is_gone_a_cache_is_refused(tmp_path, tokenizer):
    own = make_trainer(tmp_path, tokenizer, **{**SETTINGS, "on_policy_fraction": 1.0})
    gone = make_trainer(tmp_path, tokenizer, **SETTINGS)
    release_weights(gone.teacher.model, keep_head=True)
    for trainer in (own, gone):
        with pytest.raises(ValueError, match="leave the teacher its weights, and set on_policy_fraction below 1"):
            trainer.read_cache(CachedTeacher(trainer.teacher.model, lambda ids: {}))
