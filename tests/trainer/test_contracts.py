"""What a user of `transformers.Trainer` relies on holds for `KavaTrainer` too."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from helpers.library import DATA, EVERY_STEP, arguments, changed, make, new_student, new_teacher, weights
from helpers.trainers import SETTINGS
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from kava_trainer import KavaTrainer, build_target
from kava_trainer.data.collators import DistillationCollator
from kava_trainer.utils.errors import BadRequest


def plain_trainer(folder, tokenizer, callbacks=None, **changes):
    data = Dataset.from_list(DATA)
    return Trainer(
        new_student(),
        TrainingArguments(output_dir=str(folder), disable_tqdm=True, **{**SETTINGS, **changes}),
        DataCollatorForSeq2Seq(tokenizer),
        data,
        data.select(range(7)),
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def test_predict_gives_what_trainer_gives(tmp_path, tokenizer):
    ours = make(tmp_path, tokenizer).predict(Dataset.from_list(DATA[:7]))
    theirs = plain_trainer(tmp_path, tokenizer).predict(Dataset.from_list(DATA[:7]))
    assert np.array_equal(ours.label_ids, theirs.label_ids)
    read = theirs.label_ids != -100
    assert np.allclose(ours.predictions[read], theirs.predictions[read], atol=1e-5)
    for row, example in enumerate(DATA[:7]):
        width = len(example["labels"])
        assert ours.label_ids[row, :width].tolist() == example["labels"]
    assert {"test_loss", "test_lm_loss", "test_cos_sim", "test_perplexity", "test_runtime"} <= ours.metrics.keys()


def mean_guess(prediction):
    guesses = prediction.predictions if prediction.predictions.ndim == 2 else prediction.predictions.argmax(-1)
    return {"mean_guess": float(guesses[prediction.label_ids != -100].mean())}


def test_compute_metrics_gives_the_same_with_logits_made_small_beforehand(tmp_path, tokenizer):
    shapes = []

    def smaller(logits, labels):
        shapes.append((logits.shape[:2], labels.shape))
        return logits.argmax(-1)

    found = []
    for given in ({}, {"preprocess_logits_for_metrics": smaller}):
        trainer = make(tmp_path, tokenizer, {"compute_metrics": mean_guess, **given})
        trainer.train()
        found.append(trainer.evaluate()["eval_mean_guess"])
    assert found[0] == found[1] > 0
    assert shapes
    assert all(logits == labels for logits, labels in shapes)


def test_metrics_are_computed_batch_by_batch_with_inputs_and_losses(tmp_path, tokenizer):
    seen = []

    def compute(prediction, compute_result):
        seen.append((prediction.predictions.shape[0], prediction.losses.shape, prediction.inputs is not None))
        return {"batches": len(seen)} if compute_result else {}

    settings = {"batch_eval_metrics": True, "include_for_metrics": ["inputs", "loss"]}
    metrics = make(tmp_path, tokenizer, {"compute_metrics": compute}, **settings).evaluate()
    assert metrics["eval_batches"] == 3
    assert [rows for rows, *_ in seen] == [3, 3, 1]
    assert all(with_inputs for *_, with_inputs in seen)


def test_several_evaluation_sets_have_metrics_of_their_own(tmp_path, tokenizer):
    sets = {"one": Dataset.from_list(DATA[:3]), "two": Dataset.from_list(DATA[3:7])}
    settings = {**EVERY_STEP, "load_best_model_at_end": True, "metric_for_best_model": "eval_two_perplexity"}
    trainer = make(tmp_path, tokenizer, {"eval_dataset": sets}, greater_is_better=False, **settings)
    trainer.train()
    metrics = trainer.evaluate()
    for name, data in sets.items():
        alone = make(tmp_path, tokenizer, {"student": trainer.student, "eval_dataset": data}).evaluate()
        assert metrics[f"eval_{name}_lm_loss"] == pytest.approx(alone["eval_lm_loss"], rel=1e-5)
    assert metrics["eval_two_perplexity"] == pytest.approx(trainer.state.best_metric, rel=1e-4)
    alone = make(tmp_path, tokenizer, {"student": trainer.student, "eval_dataset": sets["one"]})
    alone.target.load_state_dict(trainer.target.state_dict())
    assert metrics["eval_one_margin"] == pytest.approx(alone.evaluate()["eval_margin"], rel=1e-4)
    assert "eval_two_margin" not in metrics  # the probe is the first set's


class Recorder(TrainerCallback):
    """Takes down every event; of a log also what kind of line it is."""

    def __init__(self):
        self.events = []
        for name in (name for name in dir(TrainerCallback) if name.startswith("on_")):
            setattr(self, name, self._event(name))

    def _event(self, name):
        def record(args, state, control, logs=None, **kwargs):
            kind = next((key for key in ("eval_loss", "train_runtime", "loss") if key in (logs or {})), None)
            if name != "on_log" or kind is not None:  # KAVA has lines of its own, of what the probe measured
                self.events.append((name, kind, state.global_step))

        return record


def test_a_progress_callback_of_the_user_stays(tmp_path, tokenizer):
    class Mine(ProgressCallback):
        pass

    mine = Mine()
    trainer = make(tmp_path, tokenizer, {"callbacks": [mine]}, disable_tqdm=False)
    assert [c for c in trainer.callback_handler.callbacks if isinstance(c, ProgressCallback)] == [mine]


@pytest.mark.parametrize(
    "settings",
    [{"max_steps": 3, **EVERY_STEP}, {"max_steps": -1, "num_train_epochs": 2, "eval_strategy": "epoch"}],
    ids=["steps", "epochs"],
)
def test_callbacks_see_the_events_of_trainer_in_the_same_order(tmp_path, tokenizer, settings):
    ours, theirs = Recorder(), Recorder()
    make(tmp_path / "ours", tokenizer, {"callbacks": [ours]}, **settings).train()
    plain_trainer(tmp_path / "theirs", tokenizer, [theirs], **settings).train()
    assert ours.events == theirs.events
    assert len(ours.events) > 20


@pytest.mark.parametrize("count", ["all", "non_padding", True])
@pytest.mark.parametrize("budget", [None, 0], ids=["packed", "padded"])
def test_input_tokens_seen_are_the_tokens_of_the_examples(tmp_path, tokenizer, count, budget):
    trainer = make(tmp_path, tokenizer, include_num_input_tokens_seen=count, max_tokens_per_batch=budget)
    trainer.train()  # 16 examples: each is seen once
    real = sum(len(example["input_ids"]) for example in DATA)
    seen = trainer.state.num_input_tokens_seen
    if budget is None or count == "non_padding":
        assert seen == real
    else:
        batches = make(tmp_path, tokenizer, max_tokens_per_batch=0).get_train_dataloader()
        assert seen == sum(batch["input_ids"].numel() for batch in batches) > real
    lines = [line["num_input_tokens_seen"] for line in trainer.state.log_history if "loss" in line]
    assert lines == sorted(lines)
    assert lines[-1] == seen


def test_an_optimizer_and_a_schedule_passed_in_train_what_they_hold(tmp_path, tokenizer):
    args, student, teacher = arguments(tmp_path), new_student(), new_teacher()
    target = build_target(args, student, teacher)
    layer = list(student.model.layers[0].parameters())
    optimizer = torch.optim.SGD([{"params": layer, "lr": 0.5}, {"params": target.parameters(), "lr": 0.25}])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    given = {"student": student, "target": target, "optimizers": (optimizer, schedule)}
    trainer = make(tmp_path, tokenizer, given, args)
    before = weights(trainer)
    trainer.train()
    assert changed(trainer, before) == {
        name for name in before if name.startswith(("target.", "student.model.layers.0."))
    }
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.0625]
    rates = [line["projector_learning_rate"] for line in trainer.state.log_history if "loss" in line]
    assert rates == [0.25, 0.125]  # those of the steps, before the schedule moves on


def test_an_optimizer_without_the_projectors_is_refused_unless_they_are_frozen(tmp_path, tokenizer):
    args, student = arguments(tmp_path), new_student()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    trainer = make(tmp_path, tokenizer, {"student": student, "optimizers": (optimizer, None)}, args)
    with pytest.raises(ValueError, match="The optimizer leaves the projectors out"):
        trainer.train()
    target = build_target(args, student, new_teacher()).requires_grad_(False)
    trainer = make(tmp_path, tokenizer, {"student": student, "target": target, "optimizers": (optimizer, None)}, args)
    before = weights(trainer)
    trainer.train()
    assert changed(trainer, before) == {name for name in before if name.startswith("student.")}


def test_a_class_of_optimizers_trains_student_and_projectors(tmp_path, tokenizer):
    given = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.5, "momentum": 0.9})}
    trainer = make(tmp_path, tokenizer, given, projector_learning_rate=0.25, lr_scheduler_type="constant")
    before = weights(trainer)
    trainer.train()
    assert changed(trainer, before) == before.keys()
    assert {group["lr"] for group in trainer.optimizer.param_groups if group["params"]} == {0.5, 0.25}
    assert {group["momentum"] for group in trainer.optimizer.param_groups} == {0.9}


def trained(trainer):
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_a_collator_of_the_users_own_gives_the_same_training(tmp_path, tokenizer):
    packed = trained(make(tmp_path, tokenizer))
    padded = trained(make(tmp_path, tokenizer, {"data_collator": DataCollatorForSeq2Seq(tokenizer)}))

    def nothing_but_tokens(examples):  # no attention mask, so one example at a time
        (example,) = examples
        return {name: torch.tensor([example[name]]) for name in ("input_ids", "labels")}

    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "per_device_eval_batch_size": 1}
    single = make(tmp_path, tokenizer, {"data_collator": nothing_but_tokens}, **sizes)
    assert padded == pytest.approx(packed, rel=1e-4)
    assert trained(single) == pytest.approx(packed, rel=1e-4)
    assert math.isfinite(single.evaluate()["eval_loss"])


def without_labels(examples):
    return {"input_ids": torch.ones(len(examples), 4, dtype=torch.long)}


@pytest.mark.parametrize(
    ("collator", "sentence"),
    [
        (without_labels, "The data collator gives no labels, but only input_ids"),
        (DataCollatorWithFlattening(), "The data collator gives position_ids, which KAVA does not pass on"),
    ],
    ids=["labels", "position_ids"],
)
def test_a_collator_that_does_not_fit_is_told_what_is_missing(tmp_path, tokenizer, collator, sentence):
    trainer = make(tmp_path, tokenizer, {"data_collator": collator, "eval_dataset": None})
    with pytest.raises(ValueError, match=sentence):
        trainer.train()


@pytest.mark.parametrize("budget", [None, 0], ids=["packed", "padded"])
def test_examples_without_labels_are_told(tmp_path, tokenizer, budget):
    data = Dataset.from_list(DATA).remove_columns("labels")
    given = {"train_dataset": data, "eval_dataset": None}
    with pytest.raises(ValueError, match="An example has no labels, but only input_ids"):
        make(tmp_path, tokenizer, given, max_tokens_per_batch=budget).train()


@pytest.mark.parametrize("kind", ["torch", "numpy"])
@pytest.mark.parametrize("keep", [True, False], ids=["remove", "keep"])
def test_columns_may_be_tensors_and_unused_ones_may_stay(tmp_path, tokenizer, kind, keep, recwarn):
    usual = trained(make(tmp_path, tokenizer))
    data = Dataset.from_list([{**example, "note": "a text"} for example in DATA])
    given = {"train_dataset": data.with_format(kind)}
    assert trained(make(tmp_path, tokenizer, given, remove_unused_columns=keep)) == usual
    assert not [str(warning.message) for warning in recwarn if "copy construct" in str(warning.message)]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(DATA)


@pytest.mark.parametrize("budget", [None, 0], ids=["packed", "padded"])
@pytest.mark.parametrize("kind", ["torch", "datasets"])
def test_data_may_come_one_example_after_another(tmp_path, tokenizer, kind, budget):
    data = Stream() if kind == "torch" else IterableDataset.from_generator(lambda: iter(DATA))
    settings = {"max_tokens_per_batch": budget, "projector_init": "least_squares", "calibration_tokens": 200}
    trainer = make(tmp_path, tokenizer, {"train_dataset": data, "eval_dataset": data}, max_steps=3, **settings)
    losses = trained(trainer)
    assert len(losses) == 3
    assert all(map(math.isfinite, losses))
    usual = make(tmp_path, tokenizer, {"student": trainer.student, "eval_dataset": Dataset.from_list(DATA)})
    assert trainer.evaluate()["eval_lm_loss"] == pytest.approx(usual.evaluate()["eval_lm_loss"], rel=1e-5)


@pytest.mark.slow
def test_a_compiled_model_learns_the_same(tmp_path, tokenizer):
    usual, compiled = (
        trained(make(tmp_path, tokenizer, {"eval_dataset": None}, layer_mapping="uniform:2", **settings))
        for settings in ({}, {"torch_compile": True, "torch_compile_backend": "eager"})
    )
    assert compiled == pytest.approx(usual, rel=1e-4)


def test_nothing_reports_anywhere_unless_it_is_asked_for(tmp_path):
    assert arguments(tmp_path).report_to == []


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"compute_loss_func": print}, "The loss is the sum of KAVA's terms"),
        ({"student": None}, "Give a student, or model_init"),
        ({"student": new_student(), "model_init": new_student}, "Give either a student or model_init"),
    ],
    ids=["compute_loss_func", "nothing", "both"],
)
def test_what_cannot_be_meant_is_refused(tmp_path, tokenizer, given, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(tmp_path, tokenizer, given)


def test_labels_have_one_name(tmp_path):
    assert arguments(tmp_path, label_names=["labels"]).label_names == ["labels"]
    with pytest.raises(ValueError, match="KAVA reads the column labels alone"):
        arguments(tmp_path, label_names=["answers"])


def test_a_batch_size_that_is_to_be_found_leaves_the_effective_batch(tmp_path, tokenizer, monkeypatch):
    trainer = make(tmp_path, tokenizer, auto_find_batch_size=True)
    rows = []
    real = KavaTrainer.compute_loss

    def too_large(self, model, inputs, *args, **kwargs):
        rows.append(inputs["input_ids"].numel())
        if rows[-1] > 60:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return real(self, model, inputs, *args, **kwargs)

    usual = trained(make(tmp_path, tokenizer))
    monkeypatch.setattr(KavaTrainer, "compute_loss", too_large)
    assert trained(trainer) == pytest.approx(usual, rel=1e-4)
    assert max(rows) > 60
    assert trainer.state.global_step == 2
    assert trainer.problems[0]["kind"] == "oom"


def test_the_saved_model_is_the_student(tmp_path, tokenizer):
    trainer = make(tmp_path / "run", tokenizer)
    trainer.train()
    assert trainer.student is trainer.model.student
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for (name, ours), theirs in zip(trainer.student.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert not [path.name for path in (tmp_path / "saved").iterdir() if "projector" in path.name]


def test_trainers_own_card_can_be_written(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, **{**EVERY_STEP, "save_strategy": "no"})
    trainer.train()
    trainer.create_model_card(model_name="distilled", tags="kava")
    card = (tmp_path / "README.md").read_text()
    assert "distilled" in card
    assert "Lm Loss" in card


def test_a_second_training_begins_without_what_the_first_left(tmp_path, tokenizer):
    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    callback = Break()
    trainer = make(tmp_path, tokenizer, {"callbacks": [callback]}, learning_rate=0.0, projector_learning_rate=0.0)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(callback)
    again, usual = trained(trainer), trained(make(tmp_path, tokenizer, learning_rate=0.0, projector_learning_rate=0.0))
    assert again == pytest.approx(usual, rel=1e-5)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert lines[0]["mercator_weighted"] + lines[0]["lm_weighted"] == pytest.approx(lines[0]["loss"], rel=1e-4)


def test_the_data_collator_is_kavas_by_default(tmp_path, tokenizer):
    assert type(make(tmp_path, tokenizer).data_collator) is DistillationCollator


def test_a_trial_with_unsound_arguments_is_refused(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, {"model_init": new_student})
    trainer.args.lm_weight = -1.0
    with pytest.raises(BadRequest, match="lm_weight is -1"):
        trainer.train()
