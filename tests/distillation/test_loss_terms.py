import math

import pytest
import torch
from datasets import Dataset
from helpers.data import random_examples
from helpers.models import TEACHER_LAYERS
from helpers.trainers import loss_lines, make_trainer

from kava_trainer.distillation.loss_terms import needed_teacher_layers, schedule_factor
from kava_trainer.distillation.losses import generalized_jsd_per_token
from kava_trainer.distillation.token_means import TokenMeans
from kava_trainer.evaluation.probe import GRADIENT_EXAMPLES, MINIMUM_SHARE, ShareWatch

ALL_TERMS = {"mercator_weight": 0.8, "mse_weight": 0.2, "lm_weight": 1.0, "kd_weight": 0.5, "anchor_weight": 2.0}


@pytest.mark.parametrize(
    ("schedule", "values"),
    [("constant", [1, 1, 1]), ("linear", [1, 0.5, 0]), ("cosine", [1, 0.5, 0]), ("stage", [1, 0, 0])],
)
def test_schedules_fall_from_one_to_zero_or_stay(schedule, values):
    assert [schedule_factor(schedule, progress) for progress in (0.0, 0.5, 1.0)] == pytest.approx(values)
    assert schedule_factor(schedule, 0.25) >= schedule_factor(schedule, 0.75)


def measured(trainer):
    batch = trainer.data_collator(random_examples(4, seed=3))
    trainer.model.eval()
    with torch.no_grad():
        states = trainer.terms.teacher_states(batch)
        weights = trainer.terms.weights(0.0)
        outputs = trainer.terms.student_outputs(trainer.model, batch, states, weights)
        means = TokenMeans()
        return batch, outputs, trainer.terms.loss(outputs, batch, weights, means=means), means


def test_every_term_is_computed_from_both_models(tmp_path, tokenizer):
    trainer = make_trainer(
        tmp_path, tokenizer, projector_anchor="reconstruction", kd_temperature=2.0, kd_beta=0.5, **ALL_TERMS
    )
    batch, outputs, loss, means = measured(trainer)
    assert list(trainer.terms.weights(0.0)) == ["mercator", "mse", "anchor", "lm", "kd"]
    terms = means.drain(lambda sums: sums)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    teacher = trainer.teacher.model(**inputs).logits.detach()
    student = trainer.student(**inputs).logits.detach()
    answers = batch["labels"][:, 1:] != -100
    expected = generalized_jsd_per_token(student[:, :-1][answers], teacher[:, :-1][answers], 2.0, 0.5).mean()
    assert terms["kd_loss"] == pytest.approx(expected.item(), rel=1e-4)
    mask = batch["attention_mask"].bool()
    pair = outputs.pairs[0]
    assert terms["mse_loss"] == pytest.approx(((pair.student - pair.target) ** 2).mean(-1)[mask].mean().item())
    weights = {"mercator": 0.8, "mse": 0.2, "anchor": 2.0, "lm": 1.0, "kd": 0.5}
    assert loss.item() == pytest.approx(sum(weight * terms[f"{name}_loss"] for name, weight in weights.items()))


def test_log_lines_have_each_term_raw_and_weighted_and_add_up_to_the_loss(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, projector_anchor="reconstruction", max_steps=2, **ALL_TERMS)
    trainer.train()
    for line in loss_lines(trainer):
        names = [name.removesuffix("_weighted") for name in line if name.endswith("_weighted")]
        assert names == ["mercator", "mse", "anchor", "lm", "kd"]
        assert all(line[f"{name}_loss"] > 0 for name in names)
        assert sum(line[f"{name}_weighted"] for name in names) == pytest.approx(line["loss"], rel=1e-3)


def test_the_schedule_moves_the_alignment_alone(tmp_path, tokenizer):
    trainer = make_trainer(
        tmp_path, tokenizer, projector_anchor="reconstruction", alignment_schedule="linear", **ALL_TERMS
    )
    expected = {"mercator": 0.2, "mse": 0.05, "anchor": 2.0, "lm": 1.0, "kd": 0.5}
    assert trainer.terms.weights(0.75) == pytest.approx(expected)
    plain = {"mercator_weight": 2.0, "lm_weight": 1.0, "alignment_schedule": "linear", "max_steps": 4}
    trainer = make_trainer(tmp_path, tokenizer, **plain)
    trainer.train()
    factors = [line["mercator_weighted"] / line["mercator_loss"] for line in loss_lines(trainer)]
    assert factors == pytest.approx([2.0, 1.5, 1.0, 0.5])


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [("constant", [1, 1, 1, 1]), ("linear", [0, 0.25, 0.5, 0.75]), ("stage", [0, 0, 1, 1]),
     ("cosine", [0, (1 - math.cos(math.pi / 4)) / 2, 0.5, (1 + math.cos(math.pi / 4)) / 2])],
)  # fmt: skip
def test_the_divergence_rises_in_every_log_line(tmp_path, tokenizer, schedule, factors):
    asked = {"mercator_weight": 2.0, "lm_weight": 0.0, "kd_weight": 3.0, "kd_schedule": schedule, "max_steps": 4}
    trainer = make_trainer(tmp_path, tokenizer, **asked)
    assert trainer.terms.weights(0.75) == pytest.approx({"mercator": 2.0, "kd": 3.0 * factors[3]})
    assert trainer.terms.full_weights == {"mercator": 2.0, "kd": 3.0}
    trainer.train()
    for line, factor in zip(loss_lines(trainer), factors, strict=True):
        assert line["kd_weighted"] == pytest.approx(3.0 * factor * line.get("kd_loss", 0.0))
        assert ("kd_loss" in line) == (factor > 0)
        assert line["mercator_weighted"] == pytest.approx(2.0 * line["mercator_loss"])
        assert line["mercator_weighted"] + line["kd_weighted"] == pytest.approx(line["loss"], rel=1e-3)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "stage"])
def test_a_run_goes_over_from_states_to_logits(tmp_path, tokenizer, schedule):
    asked = {"mercator_weight": 1.0, "kd_weight": 1.0, "alignment_schedule": schedule, "kd_schedule": schedule}
    trainer = make_trainer(tmp_path, tokenizer, **asked)
    for progress in (0.0, 0.2, 0.49, 0.5, 0.7, 1.0):
        weights = trainer.terms.weights(progress)
        assert weights["mercator"] + weights["kd"] == pytest.approx(1)
        assert weights["lm"] == 1.0
    assert [trainer.terms.weights(progress)["kd"] for progress in (0.0, 1.0)] == pytest.approx([0, 1])


def test_a_line_over_both_stages_adds_up_to_its_loss(tmp_path, tokenizer):
    """3 of its 5 steps are without the divergence, whose raw value is a mean over the others."""
    asked = {"mercator_weight": 1.0, "kd_weight": 2.0, "alignment_schedule": "stage", "kd_schedule": "stage"}
    batches = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_tokens_per_batch": 0}
    changes = {"lm_tokens": "all", "kd_tokens": "all", "lm_weight": 0.5, "logging_steps": 5, "max_steps": 5, "count": 8}
    trainer = make_trainer(tmp_path, tokenizer, **asked, **batches, **changes)
    trainer.train()
    (line,) = loss_lines(trainer)
    assert line["kd_weighted"] == pytest.approx(2.0 * line["kd_loss"] * 2 / 5)
    assert line["mercator_weighted"] < line["mercator_loss"]  # 2 of the steps are without it too
    assert sum(line[f"{name}_weighted"] for name in ("mercator", "lm", "kd")) == pytest.approx(line["loss"], rel=1e-3)


def test_a_stage_of_states_alone_touches_no_vocabulary(tmp_path, tokenizer):
    asked = {"mercator_weight": 1.0, "lm_weight": 0.0, "kd_weight": 1.0}
    trainer = make_trainer(tmp_path, tokenizer, **asked, kd_schedule="stage", alignment_schedule="stage")
    heads, head = [], trainer.model.head
    trainer.model.head = lambda states: heads.append(trainer.state.global_step) or head(states)
    trainer.run_probe = lambda: None
    trainer.probe.fixed = None
    trainer.train()
    assert set(heads) == {1}


def test_the_teacher_does_not_read_for_a_divergence_that_is_held_back(tmp_path, tokenizer):
    trainer = make_trainer(
        tmp_path, tokenizer, mercator_weight=0.0, lm_weight=1.0, kd_weight=1.0, kd_schedule="stage", max_steps=4
    )
    reads, features = [], trainer.teacher.features
    trainer.teacher.features = lambda inputs: reads.append(trainer.state.global_step) or features(inputs)
    trainer.train()
    assert set(reads) == {2, 3}
    assert [line["kd_weighted"] > 0 for line in loss_lines(trainer)] == [False, False, True, True]


def test_an_evaluation_has_full_weights_and_the_probe_those_of_its_moment(tmp_path, tokenizer, capsys):
    asked = {"kd_weight": 2.0, "kd_schedule": "linear", "alignment_schedule": "linear"}
    scheduled = make_trainer(tmp_path, tokenizer, **asked, eval_strategy="steps", eval_steps=1, max_steps=2)
    plain = make_trainer(tmp_path, tokenizer, kd_weight=2.0)
    before = [trainer.evaluate() for trainer in (scheduled, plain)]
    for name in ("eval_loss", "eval_kd_loss", "eval_kd_weighted"):
        assert before[0][name] == before[1][name]
    assert before[0]["eval_kd_gradient_share"] == 0.0 < before[1]["eval_kd_gradient_share"]
    scheduled.train()
    lines = [line for line in scheduled.state.log_history if "eval_kd_weighted" in line]
    assert all(line["eval_kd_weighted"] == pytest.approx(2.0 * line["eval_kd_loss"]) for line in lines)
    assert [line["eval_mercator_gradient_share"] > 0 for line in lines[-2:]] == [True, False]
    assert "The term kd gives less than" not in capsys.readouterr().out


@pytest.mark.parametrize("schedule", ["linear", "stage"])
def test_a_resumed_run_goes_on_in_the_schedule_bit_for_bit(tmp_path, tokenizer, schedule):
    changes = {
        "kd_weight": 1.0, "kd_schedule": schedule, "alignment_schedule": schedule, "max_steps": 4,
        "save_strategy": "steps", "save_steps": 1, "logging_steps": 2,
    }  # fmt: skip
    straight = make_trainer(tmp_path, tokenizer, **changes)
    straight.train()
    for step in (1, 2, 3):
        again = make_trainer(tmp_path, tokenizer, **changes)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert loss_lines(again) == loss_lines(straight)
        there = straight.student.state_dict()
        assert all(torch.equal(tensor, there[name]) for name, tensor in again.student.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, [1, TEACHER_LAYERS]),
        ({"mercator_weight": 0.0}, []),
        ({"mercator_weight": 0.0, "kd_weight": 1.0}, [TEACHER_LAYERS]),
        ({"mercator_weight": 0.0, "mse_weight": 1.0}, [1, TEACHER_LAYERS]),
        ({"kd_weight": 1.0, "layer_mapping": "[[1, 2]]"}, [2, TEACHER_LAYERS]),
    ],
)
def test_the_teacher_gives_only_the_layers_that_a_term_reads(tmp_path, tokenizer, changes, layers):
    trainer = make_trainer(tmp_path, tokenizer, **{"layer_mapping": "uniform:2", **changes})
    assert needed_teacher_layers(trainer.args, trainer.target, TEACHER_LAYERS) == layers


def test_divergence_alone_trains_the_student_and_aligns_nothing(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, mercator_weight=0.0, lm_weight=0.0, kd_weight=1.0, max_steps=2)
    trainer.train()
    assert set(loss_lines(trainer)[0]) >= {"kd_loss", "kd_weighted"}
    assert "cos_sim" not in loss_lines(trainer)[0]
    assert trainer.evaluate()["eval_lm_loss"] > 0


def test_gradient_shares_are_those_of_each_term_alone(tmp_path, tokenizer):
    changes = {"mercator_weight": 3.0, "kd_weight": 0.5, "projector_dropout": 0.0}
    trainer = make_trainer(tmp_path, tokenizer, projector_anchor="reconstruction", **changes)
    generator = torch.get_rng_state()
    shares = trainer.run_probe().gradient_shares
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    norms = {}
    batch = trainer.data_collator(list(trainer.eval_dataset)[:GRADIENT_EXAMPLES])
    for name, weight in trainer.terms.weights(0.0).items():
        trainer.model.zero_grad()
        trainer.model.train()
        states = trainer.terms.teacher_states(batch)
        weights = {name: weight}
        outputs = trainer.terms.student_outputs(trainer.model, batch, states, weights)
        trainer.terms.loss(outputs, batch, weights).backward()
        grads = [parameter.grad for parameter in trainer.student.parameters() if parameter.grad is not None]
        norms[name] = math.sqrt(sum(float(grad.square().sum()) for grad in grads))
    assert norms["anchor"] == 0
    assert shares == pytest.approx({name: norm / sum(norms.values()) for name, norm in norms.items()}, rel=1e-4)


def test_shares_are_logged_and_a_term_without_effect_is_named_once(tmp_path, tokenizer, capsys):
    trainer = make_trainer(tmp_path, tokenizer, mercator_weight=1e-5, eval_strategy="steps", eval_steps=1, max_steps=3)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "eval_mercator_gradient_share" in line]
    assert [line["eval_mercator_gradient_share"] < MINIMUM_SHARE for line in lines] == [True, True, True]
    assert capsys.readouterr().out.count("The term mercator gives less than 1% of the student's gradient") == 1


def test_a_term_counts_as_without_effect_where_it_was_small_twice_and_is_named_once():
    watch = ShareWatch({"anchor"})
    assert watch.without_effect({"lm": 0.001, "kd": 0.5, "anchor": 0.0}) == []
    assert watch.without_effect({"lm": 0.001, "kd": 0.0, "anchor": 0.0}) == ["lm"]
    assert watch.without_effect({"lm": 0.001, "kd": 0.0, "anchor": 0.0}) == ["kd"]
    assert watch.without_effect({"lm": 0.001, "kd": 0.0, "anchor": 0.0}) == []


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_shares_are_the_same_with_gradient_checkpointing(tmp_path, tokenizer, reentrant):
    plain = make_trainer(tmp_path, tokenizer, projector_dropout=0.0)
    kwargs = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    checkpointed = make_trainer(tmp_path, tokenizer, projector_dropout=0.0, max_steps=1, learning_rate=0.0, **kwargs)
    shares = plain.run_probe().gradient_shares
    checkpointed.train()
    first = next(line for line in checkpointed.state.log_history if "probe_lm_gradient_share" in line)
    assert first["probe_lm_gradient_share"] == pytest.approx(shares["lm"], rel=1e-3)


def test_the_probe_leaves_gradients_that_are_there_as_they_are(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer)
    gradient = torch.ones_like(trainer.student.lm_head.weight)
    trainer.student.lm_head.weight.grad = gradient
    trainer.run_probe()
    assert trainer.student.lm_head.weight.grad is gradient


def naive_terms(student, teacher, examples, lm_tokens, kd_tokens):
    """Sums and counts of both terms on logits, example by example and token by token."""
    sums, counts = {"lm": 0.0, "kd": 0.0}, {"lm": 0, "kd": 0}
    for example in examples:
        ids = torch.tensor([example["input_ids"]])
        ours = student(input_ids=ids).logits[0].log_softmax(-1)
        with torch.no_grad():
            theirs = teacher(input_ids=ids).logits[0].log_softmax(-1)
        for place in range(len(example["input_ids"]) - 1):
            answers = example["labels"][place + 1] != -100
            if lm_tokens == "all" or answers:
                sums["lm"] = sums["lm"] - ours[place, example["input_ids"][place + 1]]
                counts["lm"] += 1
            if kd_tokens == "all" or answers:
                sums["kd"] = sums["kd"] + (theirs[place].exp() * (theirs[place] - ours[place])).sum()
                counts["kd"] += 1
    return {name: sums[name] / counts[name] for name in sums}


ONE_WITHOUT_ANSWER = {"input_ids": [5, 6, 7, 8], "labels": [-100] * 4}
"""Its tokens count where all do."""


@pytest.mark.parametrize("layout", ["packed", "padded", "one by one", "all at once"])
@pytest.mark.parametrize(("lm_tokens", "kd_tokens"), [("all", "all"), ("answers", "all"), ("all", "answers")])
def test_terms_over_all_tokens_are_exact_means_over_the_whole_step(tmp_path, tokenizer, layout, lm_tokens, kd_tokens):
    sizes = {"one by one": (1, 8), "all at once": (8, 1)}.get(layout, (2, 4))
    options = {"per_device_train_batch_size": sizes[0], "gradient_accumulation_steps": sizes[1]}
    options["max_tokens_per_batch"] = 60 if layout == "packed" else 0
    asked = {"mercator_weight": 0.0, "lm_weight": 0.7, "kd_weight": 1.5, "lm_tokens": lm_tokens, "kd_tokens": kd_tokens}
    trainer = make_trainer(tmp_path, tokenizer, max_steps=1, **asked, **options)
    examples = [*random_examples(7, seed=5), ONE_WITHOUT_ANSWER]
    trainer.train_dataset = Dataset.from_list([{"input_ids": e["input_ids"], "labels": e["labels"]} for e in examples])
    batches, counts = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), sizes[1], trainer.args.device)
    assert batches[0].get("rows") is not None if layout == "packed" else "rows" not in batches[0]
    loss = sum(trainer.compute_loss(trainer.model.train(), row, num_items_in_batch=counts)
               for batch in batches for row in batch.get("rows", [batch]))  # fmt: skip
    means = naive_terms(trainer.student, trainer.teacher.model, examples, lm_tokens, kd_tokens)
    expected = 0.7 * means["lm"] + 1.5 * means["kd"]
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    weights = [weight for weight in trainer.student.parameters() if weight.requires_grad]
    for ours, naive in zip(*(torch.autograd.grad(total, weights) for total in (loss, expected)), strict=True):
        torch.testing.assert_close(ours, naive, rtol=1e-4, atol=1e-6)
    logged = trainer.steps.means.drain(lambda sums: sums)
    assert logged["lm_loss"] == pytest.approx(means["lm"].item(), rel=1e-5)
    assert logged["kd_loss"] == pytest.approx(means["kd"].item(), rel=1e-4)


def test_where_every_token_is_an_answer_all_tokens_change_no_bit(tmp_path, tokenizer):
    plain = [{"input_ids": e["input_ids"], "labels": e["input_ids"]} for e in random_examples(16)]
    seen = []
    for asked in ({}, {"kd_tokens": "all"}, {"lm_tokens": "all", "kd_tokens": "all"}):
        trainer = make_trainer(tmp_path, tokenizer, kd_weight=0.5, label_smoothing_factor=0.1, **asked)
        trainer.train_dataset = Dataset.from_list(plain)
        trainer.train()
        seen.append((loss_lines(trainer), list(trainer.student.state_dict().values())))
    for lines, weights in seen[1:]:
        assert lines == seen[0][0]
        assert all(torch.equal(one, other) for one, other in zip(weights, seen[0][1], strict=True))


def test_the_perplexity_is_that_of_the_answers_whatever_is_learned(tmp_path, tokenizer):
    answers, everything = (
        make_trainer(tmp_path, tokenizer, lm_tokens=tokens, label_smoothing_factor=0.1).evaluate()
        for tokens in ("answers", "all")
    )
    assert everything["eval_perplexity"] == answers["eval_perplexity"]
    assert everything["eval_answer_loss"] == answers["eval_lm_loss"] != everything["eval_lm_loss"]
    assert "eval_answer_loss" not in answers
    assert everything["eval_smoothing_loss"] != answers["eval_smoothing_loss"]
