"""The first of the student's own answers beside the last ones to the same prompts."""

import json
from dataclasses import asdict

import pytest
import torch
from helpers.hashes import weight_hash
from helpers.trainers import loss_lines, make_trainer

from kava_trainer import write_report
from kava_trainer.reports import page
from kava_trainer.reports.summary import RunSummary
from kava_trainer.runs.finish import add_rollouts
from kava_trainer.trainer.rollouts import rollouts
from kava_trainer.utils.errors import RunFailed

SETTINGS = {"kd_weight": 1.0, "on_policy_max_new_tokens": 6, "on_policy_fraction": 1.0}

LARGE = {**SETTINGS, "per_device_train_batch_size": 8}
"""More prompts a step than are shown."""


@pytest.fixture
def sampled(monkeypatch):
    """All prompts and answers that are sampled from now on, of each generation."""
    kept, original = [], rollouts.sample_answers

    def sample(prompts, student, sampling):
        answers = original(prompts, student, sampling)
        kept.append((prompts, answers.tokens, sampling))
        return answers

    monkeypatch.setattr(rollouts, "sample_answers", sample)
    return kept


def shown(trainer):
    summary = RunSummary({}, {})
    add_rollouts(summary, trainer)
    found = json.loads(summary.to_json())["rollouts"]
    assert found == (None if summary.content.rollouts is None else [asdict(own) for own in summary.content.rollouts])
    return found


def to_the_end(answer, ends):
    return answer[: next((place + 1 for place, token in enumerate(answer) if token in ends), None)]


def test_ten_prompts_of_the_first_step_have_the_answer_of_then_and_that_of_the_end(tmp_path, tokenizer, sampled):
    trainer = make_trainer(tmp_path, tokenizer, 32, learning_rate=0.1, **LARGE)
    trainer.train()
    assert [len(prompts) for prompts, *_ in sampled] == [16, 16]
    pairs = shown(trainer)
    assert len(sampled) == 3
    (prompts, first, asked), _, (again, last, again_asked) = sampled
    assert again == prompts[:10]
    assert vars(again_asked) == {**vars(asked), "seed": again_asked.seed}
    assert len(pairs) == 10
    for own, prompt, before, after in zip(pairs, prompts, first, last, strict=False):
        assert own["prompt"] == tokenizer.decode(prompt, skip_special_tokens=True)
        assert own["first"] == tokenizer.decode(to_the_end(before, asked.end_tokens))
        assert own["last"] == tokenizer.decode(to_the_end(after, asked.end_tokens))
    assert any(own["first"] != own["last"] for own in pairs)


def test_asking_again_changes_nothing_and_says_the_same(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, **SETTINGS)
    trainer.train()
    before = weight_hash(trainer.model), loss_lines(trainer), torch.random.get_rng_state().tolist()
    mode, figures = trainer.student.training, trainer.throughput()
    pairs = shown(trainer)
    assert len(pairs) == 8  # the step has no more
    assert (weight_hash(trainer.model), loss_lines(trainer), torch.random.get_rng_state().tolist()) == before
    assert (trainer.student.training, trainer.throughput()) == (mode, figures)
    assert trainer.steps.means.drain(trainer.sum_over_ranks) == {}
    assert shown(trainer) == pairs


@pytest.mark.parametrize(("every", "step"), [(1, 1), (3, 2), (1, 3)], ids=["resumed", "rollouts kept", "at the end"])
def test_a_resumed_run_keeps_the_first_answers(tmp_path, tokenizer, sampled, every, step):
    saving = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "rollouts_every": every}
    straight = make_trainer(tmp_path, tokenizer, **SETTINGS, **saving)
    straight.train()
    first = sampled[0][0]
    resumed = make_trainer(tmp_path, tokenizer, **SETTINGS, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert [own.prompt for own, _ in resumed.rollouts.first_and_last()] == first
    assert shown(resumed) == shown(straight)


def test_answers_after_an_older_checkpoint_do_not_pass_for_the_first(tmp_path, tokenizer, sampled):
    saving = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, tokenizer, **SETTINGS, **saving).train()
    file = tmp_path / "checkpoint-1" / "progress_0.pth"
    progress = torch.load(file, weights_only=True)
    del progress["rollouts"]["first"]
    resumed = make_trainer(tmp_path, tokenizer, **SETTINGS)
    resumed.rollouts.load_state_dict({**progress, "same_ranks": True})
    resumed.rollouts.mix([next(iter(resumed.get_train_dataloader()))])
    assert len(sampled) == 3
    assert shown(resumed) is None


def test_a_training_begins_with_first_answers_of_its_own(tmp_path, tokenizer, sampled):
    trainer = make_trainer(tmp_path, tokenizer, **SETTINGS)
    trainer.train()
    trainer.args.seed = 7
    trainer.train()
    assert [own.prompt for own, _ in trainer.rollouts.first_and_last()] == sampled[2][0]


def test_there_is_nothing_to_show_where_the_student_wrote_nothing_or_nothing_reads_it(tmp_path, tokenizer):
    plain = make_trainer(tmp_path, tokenizer)
    plain.train()
    assert shown(plain) is None
    silent = make_trainer(tmp_path, tokenizer, **SETTINGS)
    assert shown(silent) is None
    silent.train()
    silent.processing_class = None
    assert shown(silent) is None


def test_an_answer_of_nothing_is_shown_as_one(tmp_path, tokenizer):
    given = [[[]] * 8, [[7]] * 8, [[8]] * 8]
    trainer = make_trainer(tmp_path, tokenizer, rollout_fn=lambda *_: given.pop(0), **SETTINGS)
    trainer.train()
    assert {(own["first"], own["last"]) for own in shown(trainer)} == {("", tokenizer.decode([8]))}


def test_memory_that_runs_out_after_the_training_is_told_as_of_then(tmp_path, tokenizer, monkeypatch):
    trainer = make_trainer(tmp_path, tokenizer, **SETTINGS)
    trainer.train()

    def sample(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(rollouts, "sample_answers", sample)
    with pytest.raises(RunFailed, match="Out of memory after the last step while the student answered a single"):
        shown(trainer)


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_report_of_a_script_has_them_where_the_training_came_to_its_end(
    tmp_path, tokenizer, monkeypatch, interrupted
):
    trainer = make_trainer(tmp_path, tokenizer, **SETTINGS)
    trainer.train()
    trainer.emergency.received = 15 if interrupted else None
    monkeypatch.setattr(page, "write_report", lambda record: None)
    write_report(trainer)
    summary = json.loads((tmp_path / "run_summary.json").read_text())
    assert len(summary["rollouts"] or []) == (0 if interrupted else 8)
