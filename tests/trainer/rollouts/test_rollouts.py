"""The student's own answers in a training: what is learned of them, and that nothing else changes."""

import itertools
import os
import signal

import pytest
import torch
from datasets import Dataset
from helpers.data import random_examples
from helpers.hashes import weight_hash
from helpers.matrices import matrix
from helpers.models import llama_as_wide_as_the_teacher, tiny_llama, tiny_lora_llama
from helpers.trainers import loss_lines, make_trainer
from transformers import TrainerCallback

from kava_trainer.config.arguments import KavaTrainingArguments
from kava_trainer.data.collators import DistillationCollator
from kava_trainer.data.formats import SAMPLED
from kava_trainer.distillation.losses import generalized_jsd_per_token, mercator_per_token
from kava_trainer.distillation.targets import build_target
from kava_trainer.trainer.rollouts import rollouts
from kava_trainer.trainer.trainer import KavaTrainer
from kava_trainer.utils.errors import RunFailed

SETTINGS = {"kd_weight": 1.0, "on_policy_max_new_tokens": 6, "max_grad_norm": 0.0}

PADDED = {"max_tokens_per_batch": 0}

END = 0
"""The end-of-text token of the tiny models."""


class Gradients(TrainerCallback):
    """Keeps the gradient of the last step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = model.named_parameters()
        self.found = {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}


class Writer:
    """Answers with made-up tokens of different lengths, every third time without an end, and keeps what it answered."""

    def __init__(self):
        self.given = {}

    def __call__(self, prompts, student, sampling):
        for prompt in prompts:
            rng, count = sum(prompt), len(self.given)
            answer = [1 + (rng * (i + 3)) % 500 for i in range(1 + count % 5)]
            self.given[tuple(prompt)] = answer if count % 3 == 2 else [*answer, END]
        return [
            [*self.given[tuple(prompt)], *([END, 9] if END in self.given[tuple(prompt)] else [])] for prompt in prompts
        ]


def naive(trainer, writer, examples):
    """The loss of a step and its gradient, from each example by itself: no packing, no chunks, no micro-batches."""
    args, target = trainer.args, trainer.target
    sums = {"lm": [], "kd": [], "mercator": [], "relative_mse": []}
    for example in examples:
        prompt = tuple(example["input_ids"][: example["prompt_length"]])
        own = prompt in writer.given
        ids = [*prompt, *writer.given[prompt]] if own else example["input_ids"]
        tokens, first = torch.tensor([ids]), example["prompt_length"]
        student = trainer.student(tokens, output_hidden_states=True)
        with torch.no_grad():
            teacher = trainer.teacher.model(tokens, output_hidden_states=True)
        if args.on_policy_fraction < 1 and not own:
            start = 1 if args.lm_tokens == "all" else first
            logits = student.logits[0, start - 1 : -1].float()
            sums["lm"] += torch.nn.functional.cross_entropy(logits, tokens[0, start:], reduction="none")
        start = 1 if args.kd_tokens == "all" and not own else first
        both = student.logits[0, start - 1 : -1], teacher.logits[0, start - 1 : -1]
        sums["kd"] += generalized_jsd_per_token(*both, args.kd_temperature, args.kd_beta)
        state, goal = student.hidden_states[-1], teacher.hidden_states[-1]
        goal = target.projectors[0](goal) if len(target.projectors) else goal
        compared = torch.tensor([[not own or place >= first for place in range(len(ids))]])
        losses, _ = mercator_per_token(state, goal, compared, args.mercator_alpha, args.mercator_beta)
        sums["mercator"] += losses[compared]
        shares = (state - goal).square().sum(-1) / goal.square().sum(-1)
        sums["relative_mse"] += shares[compared]
    weights = {name: getattr(args, f"{name}_weight") for name in sums}
    means = {name: torch.stack(own).mean() for name, own in sums.items() if own and weights[name] > 0}
    trainer.model.zero_grad()
    sum(weights[name] * mean for name, mean in means.items()).backward()
    gradients = {name: own.grad for name, own in trainer.model.named_parameters() if own.grad is not None}
    return {name: mean.item() for name, mean in means.items()}, gradients


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {**PADDED},
        {"kd_tokens": "all", "lm_tokens": "all", "kd_beta": 0.5},
        {"kd_tokens": "all", "kd_beta": 1.0, "kd_temperature": 2.0},
        {"lm_tokens": "all", "kd_weight": 0.0, **PADDED},
        {"kd_weight": 0.0},
        {"on_policy_fraction": 1.0, "kd_beta": 1.0},
        {"on_policy_fraction": 1.0, "kd_weight": 0.0, **PADDED},
        pytest.param(
            {"projector_direction": "none", "relative_mse_weight": 2.0, "model": llama_as_wide_as_the_teacher},
            id="no projector",
        ),
    ],
    ids=str,
)
def test_value_and_gradient_of_every_term_are_those_of_each_example_by_itself(tmp_path, tokenizer, changes):
    writer, gradients = Writer(), Gradients()
    settings = {**SETTINGS, "on_policy_fraction": 0.5, "max_steps": 1, "learning_rate": 0.0, **changes}
    rates = {"projector_learning_rate": 0.0, "projector_dropout": 0.0}
    trainer = make_trainer(tmp_path, tokenizer, 8, rollout_fn=writer, **{**settings, **rates})
    trainer.add_callback(gradients)
    trainer.train()
    assert len(writer.given) == 8 * trainer.args.on_policy_fraction
    means, expected = naive(trainer, writer, random_examples(8))
    (line,) = loss_lines(trainer)
    assert {name: line[f"{name}_loss"] for name in means} == pytest.approx(means, rel=1e-4)
    assert ("lm_loss" in line) == ("lm" in means)
    assert gradients.found.keys() == expected.keys()
    for name, own in expected.items():
        torch.testing.assert_close(
            gradients.found[name], own, rtol=1e-3, atol=1e-6, msg=lambda told, name=name: f"{name}: {told}"
        )


def test_prompts_and_what_stands_behind_the_end_carry_no_loss(tmp_path, tokenizer):
    writer = Writer()
    trainer = make_trainer(tmp_path, tokenizer, 8, rollout_fn=writer, on_policy_fraction=1.0, **SETTINGS)
    loader = iter(trainer.get_train_dataloader())
    batches, counts = trainer.get_batch_samples(loader, 2, trainer.args.device)
    rows = [row for batch in batches for row in batch["rows"]]
    learned = [int(token) for row in rows for token in row["next_tokens"]]
    assert sorted(learned) == sorted(token for answer in writer.given.values() for token in answer)
    assert counts.tolist()[1:] == [len(learned), len(learned), len(learned), 0, 0]
    for row in rows:
        followed = row["input_ids"].flatten()[row["answer_index"] + 1]
        assert torch.equal(followed, row["next_tokens"])
        assert torch.equal(row["next_index"], row["answer_index"])


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_a_student_that_is_its_teacher_has_nothing_to_learn_on_its_answers(tmp_path, tokenizer, fraction):
    settings = {"on_policy_fraction": fraction, "lm_weight": 0.0, "projector_direction": "none", "learning_rate": 0.0}
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        model=lambda width, layers, seed: tiny_llama(64, 4, seed=1),
        max_steps=2,
        **settings,
        **SETTINGS,
    )
    trainer.train()
    for line in loss_lines(trainer):
        assert line["kd_loss"] == pytest.approx(0, abs=1e-6)
        assert line["cos_sim"] == pytest.approx(1, abs=1e-6)
        assert line["rollout_agreement"] == 1


RESUMED = matrix(
    list(itertools.product((0.5, 1.0), (1, 3), (None, 0))),
    lambda fraction, every, padded: padded == (fraction + every) % 2,
)
"""With two ranks: test_invariants."""


@pytest.mark.parametrize(
    ("fraction", "every", "most_tokens"),
    [pytest.param(*own.values, marks=[pytest.mark.slow, *own.marks] if own.marks else []) for own in RESUMED],
)
def test_a_resumed_run_is_the_same_bit_by_bit(tmp_path, tokenizer, fraction, every, most_tokens):
    settings = {
        **SETTINGS,
        "on_policy_fraction": fraction,
        "rollouts_every": every,
        "max_tokens_per_batch": most_tokens,
        "max_steps": 5,
        "logging_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    straight = make_trainer(tmp_path, tokenizer, **settings)
    straight.train()
    assert straight.batches.packs == (most_tokens is None)
    resumed = make_trainer(tmp_path, tokenizer, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert weight_hash(resumed.model) == weight_hash(straight.model)
    assert loss_lines(resumed) == loss_lines(straight)


def test_one_generation_serves_several_steps_and_then_another_is_made(tmp_path, tokenizer):
    asked = []

    def write(prompts, student, sampling):
        asked.append((trainer.state.global_step, len(prompts)))
        return [[7, 8, END]] * len(prompts)

    changes = {"rollouts_every": 3, "on_policy_fraction": 0.3, "max_steps": 7, **SETTINGS}
    trainer = make_trainer(tmp_path, tokenizer, 64, rollout_fn=write, **changes)
    trainer.train()
    assert asked == [(0, 3), (3, 3), (6, 3)]  # 2.4 of 8 examples, so three are wanted now and then


def test_a_short_step_that_was_answered_leaves_later_ones_their_examples(tmp_path, tokenizer):
    def write(prompts, student, sampling):
        return [[7, 8, END]] * len(prompts)

    def counted(batches):
        found = mix(batches)
        sizes.append([(len(batch["lengths"]), int((batch["origins"] == SAMPLED).sum()) // 3) for batch in found])
        return found

    changes = {"rollouts_every": 2, "on_policy_fraction": 1.0, "max_steps": 4, "gradient_accumulation_steps": 1}
    changes |= {"per_device_train_batch_size": 8, "projector_direction": "student_to_teacher"}
    trainer, sizes = make_trainer(tmp_path, tokenizer, 17, rollout_fn=write, **{**SETTINGS, **changes}), []
    mix, trainer.batches.mix = trainer.batches.mix, counted
    trainer.train()
    assert sizes == [[(8, 8)], [(8, 8)], [(1, 1)], [(8, 1)]]  # 17 examples: the third step has one


def test_without_a_fraction_nothing_of_it_plays_a_part(tmp_path, tokenizer):
    def trained(folder, **changes):
        trainer = make_trainer(tmp_path / folder, tokenizer, kd_weight=1.0, max_steps=3, **changes)
        trainer.train()
        assert not any(name.startswith(("rollout", "generation")) for line in loss_lines(trainer) for name in line)
        return weight_hash(trainer.model), loss_lines(trainer)

    other = {"on_policy_temperature": 0.5, "on_policy_top_p": 0.3, "on_policy_max_new_tokens": 2, "rollouts_every": 4}
    assert trained("plain") == trained("other", on_policy_fraction=0.0, **other)


def test_sampling_leaves_the_random_numbers_of_the_training_alone(tmp_path, tokenizer):
    """Dropout draws the same, however much is sampled."""
    numbers = []

    def write(prompts, student, sampling):
        torch.rand(len(prompts))
        assert not student.training
        assert not torch.is_grad_enabled()
        return [[7, 8, END]] * len(prompts)

    class Drawn(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            numbers.append(torch.random.get_rng_state().sum().item())

    for fraction in (0.0, 1.0):
        changes = {"on_policy_fraction": fraction, "rollout_fn": write if fraction else None, **SETTINGS}
        trainer = make_trainer(tmp_path, tokenizer, max_steps=2, projector_dropout=0.0, **changes)
        trainer.add_callback(Drawn())
        torch.manual_seed(0)
        trainer.train()
        assert trainer.model.training
    assert numbers[:2] == numbers[2:]


def test_an_answer_of_nothing_is_counted_and_left_out(tmp_path, tokenizer):
    def write(prompts, student, sampling):
        return [[END] if i % 2 else [7, END] for i, _ in enumerate(prompts)]

    trainer = make_trainer(tmp_path, tokenizer, rollout_fn=write, on_policy_fraction=1.0, **SETTINGS)
    trainer.train()
    for line in loss_lines(trainer):
        assert line["rollout_empty_share"] == 0.5
        assert line["rollout_length"] == 2
        assert "rollout_entropy" not in line
    assert trainer.throughput()["samples_per_second"] > 0


@pytest.mark.parametrize("packing", [{}, PADDED], ids=["packed", "padded"])
@pytest.mark.parametrize("nothing", [[], [END]])
def test_a_step_of_empty_answers_alone_changes_nothing(tmp_path, tokenizer, nothing, packing):
    trainer = make_trainer(
        tmp_path, tokenizer, rollout_fn=lambda prompts, *_: [nothing] * len(prompts), on_policy_fraction=1.0,
        weight_decay=0.0, **SETTINGS, **packing,
    )  # fmt: skip
    before = weight_hash(trainer.model)
    trainer.train()
    assert weight_hash(trainer.model) == before
    assert trainer.problems == []
    assert [line["rollout_empty_share"] for line in loss_lines(trainer)] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([[7]], "gave 1 answers to 8 prompts; give one for each"),
        ([[7]] * 7 + [[512]], r"gave the token 512; give token ids, whole numbers from 0 to 496\."),
        ([[7]] * 7 + [[0.5]], r"gave the token 0\.5; give token ids"),
    ],
)
def test_what_a_user_s_function_gives_is_looked_at(tmp_path, tokenizer, given, told):
    trainer = make_trainer(tmp_path, tokenizer, rollout_fn=lambda *_: given, on_policy_fraction=1.0, **SETTINGS)
    with pytest.raises(ValueError, match=told):
        trainer.train()


def test_a_function_that_would_never_be_asked_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="rollout_fn writes nothing while on_policy_fraction is 0"):
        make_trainer(tmp_path, tokenizer, rollout_fn=Writer())


def test_a_fraction_that_is_raised_before_a_training_counts(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, **SETTINGS)
    trainer.args.on_policy_fraction = 0.5
    trainer.train()
    assert all(line["rollout_length"] > 0 for line in loss_lines(trainer))


@pytest.mark.parametrize(
    ("collator", "told"),
    [
        (
            lambda tokenizer: DistillationCollator(tokenizer, read_states=dict),
            "needs a teacher that runs: a cache",
        ),
        (lambda tokenizer: lambda examples: {}, "on_policy_fraction needs DistillationCollator as data_collator"),
    ],
)
def test_a_collator_that_cannot_take_new_answers_is_refused(tmp_path, tokenizer, collator, told):
    class Elsewhere:
        num_layers, hidden_size = 4, 64

    args = KavaTrainingArguments(str(tmp_path), use_cpu=True, on_policy_fraction=0.5, layer_mapping="last")
    student, teacher = tiny_llama(32, 2), tiny_llama(64, 4, seed=1)
    given = {"args": args, "data_collator": collator(tokenizer), "processing_class": tokenizer}
    with pytest.raises(ValueError, match=told):
        KavaTrainer(student, Elsewhere(), build_target(args, student, teacher), **given)


def test_where_memory_runs_out_fewer_prompts_are_answered_at_a_time_from_then_on(tmp_path, tokenizer, monkeypatch):
    sizes, original = [], rollouts.sample_answers

    def sample(prompts, student, sampling):
        sizes.append(sampling.batch_size)
        if sampling.batch_size > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(prompts, student, sampling)

    monkeypatch.setattr(rollouts, "sample_answers", sample)
    changes = {"on_policy_fraction": 1.0, "per_device_eval_batch_size": 9, "max_steps": 3, **SETTINGS}
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(tmp_path, tokenizer, **changes, **saving)
    trainer.train()
    assert sizes == [9, 4, 2, 2, 2]
    assert [problem["kind"] for problem in trainer.problems if problem["kind"] == "oom"] == ["oom", "oom"]
    again = make_trainer(tmp_path, tokenizer, **changes, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert sizes[5:] == [2]
    assert weight_hash(again.model) == weight_hash(trainer.model)


def test_where_not_even_one_prompt_fits_the_run_says_what_to_lower(tmp_path, tokenizer, monkeypatch):
    def sample(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(rollouts, "sample_answers", sample)
    trainer = make_trainer(tmp_path, tokenizer, on_policy_fraction=1.0, **SETTINGS)
    with pytest.raises(RunFailed, match=r"answered a single prompt; lower on_policy_max_new_tokens \(now 6\)"):
        trainer.train()


def test_a_signal_during_a_generation_ends_after_the_step_and_the_rest_is_the_same(tmp_path, tokenizer):
    writer, steps = Writer(), []

    def interrupted(*given):
        steps.append(len(steps))
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return writer(*given)

    settings = {**SETTINGS, "on_policy_fraction": 0.5, "max_steps": 4, "rollouts_every": 2}
    straight = make_trainer(tmp_path / "straight", tokenizer, rollout_fn=Writer(), **settings)
    straight.train()
    first = make_trainer(tmp_path / "run", tokenizer, rollout_fn=interrupted, **settings)
    first.train()
    assert first.emergency.received == signal.SIGTERM
    assert first.state.global_step == 3
    second = make_trainer(tmp_path / "run", tokenizer, rollout_fn=writer, **settings)
    second.train(resume_from_checkpoint=True)
    assert loss_lines(second) == loss_lines(straight)


def test_adapters_learn_from_the_student_s_answers_and_the_weights_below_stay(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, model=tiny_lora_llama, on_policy_fraction=1.0, **SETTINGS)
    before = {name: own.clone() for name, own in trainer.student.named_parameters()}
    trainer.train()
    changed = {name for name, own in trainer.student.named_parameters() if not torch.equal(own, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_a_data_set_of_prompts_alone_is_enough_where_all_answers_are_the_student_s(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, on_policy_fraction=1.0, **SETTINGS)
    rows = [example["input_ids"][: example["prompt_length"]] for example in random_examples(16)]
    trainer.train_dataset = Dataset.from_list([{"input_ids": ids, "labels": [-100] * len(ids)} for ids in rows])
    before = weight_hash(trainer.student)
    trainer.train()
    assert weight_hash(trainer.student) != before
    assert all(line["kd_loss"] > 0 for line in loss_lines(trainer))
    assert trainer.problems == [] or {own["kind"] for own in trainer.problems} == {"rollout_limit"}
