"""Rows, batches, models and arguments as people have them: taken for what they are, or refused in one sentence."""

import copy
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.data import random_examples
from helpers.models import STUDENT_LAYERS, STUDENT_SIZE, TEACHER_LAYERS, TEACHER_SIZE, tiny_llama
from helpers.trainers import SETTINGS, loss_lines
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    DataCollatorForSeq2Seq,
    EarlyStoppingCallback,
    HfArgumentParser,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_pt_utils import AcceleratorConfig

from kava_trainer import KavaTrainer, KavaTrainingArguments
from kava_trainer.data.collators import completed
from kava_trainer.models.student import mend_generation_config
from kava_trainer.utils.errors import BadRequest, WrongArguments


def student(seed=2):
    return tiny_llama(STUDENT_SIZE, STUDENT_LAYERS, seed=seed)


def teacher():
    return tiny_llama(TEACHER_SIZE, TEACHER_LAYERS, seed=1)


def plain_trainer(folder, tokenizer, rows, kind=KavaTrainer, pair=None, **changes):
    """A trainer as somebody makes one who has read no more than the README."""
    own = {name: changes.pop(name) for name in ("data_collator", "callbacks", "model_init") if name in changes}
    own["eval_dataset"] = Dataset.from_list(changes.pop("held_out", rows[:5]))
    settings = {**SETTINGS, "output_dir": str(folder), "plain_output": True, "projector_init": "random", **changes}
    both = pair or ((None if "model_init" in own else student()), teacher())
    args = KavaTrainingArguments(**settings)
    return kind(*both, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **own)


def padded(rows, width=40, left=False):
    """The rows as a tokenizer with `padding="max_length"` gives them."""
    found = []
    for row in rows:
        ids, labels, gap = row["input_ids"], row["labels"], width - len(row["input_ids"])
        mask = [1] * len(ids)
        parts = [(ids, [0] * gap), (labels, [-100] * gap), (mask, [0] * gap)]
        names = ("input_ids", "labels", "attention_mask")
        found.append({n: pad + own if left else own + pad for n, (own, pad) in zip(names, parts, strict=True)})
    return found


@pytest.fixture
def rows():
    return [{name: row[name] for name in ("input_ids", "labels")} for row in random_examples(16)]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("budget", [0, 64])
def test_rows_that_their_tokenizer_has_padded_give_the_figures_of_unpadded_ones(
    tmp_path, tokenizer, rows, left, budget
):
    lines = []
    for data in (rows, padded(rows, left=left)):
        trainer = plain_trainer(tmp_path, tokenizer, data, max_tokens_per_batch=budget)
        trainer.train()
        lines.append((loss_lines(trainer), trainer.evaluate()["eval_loss"]))
    assert lines[0] == lines[1]


@pytest.mark.parametrize("budget", [0, 64])
def test_rows_of_no_token_and_of_one_are_taken(tmp_path, tokenizer, rows, budget):
    short = [{"input_ids": [], "labels": []}, {"input_ids": [5], "labels": [5]}]
    trainer = plain_trainer(
        tmp_path, tokenizer, [*short, *short, *rows], max_tokens_per_batch=budget, held_out=[*short, *rows[:3]],
        per_device_train_batch_size=1, gradient_accumulation_steps=1, max_steps=20,
    )  # fmt: skip
    trainer.train()
    assert {problem["kind"] for problem in trainer.problems} <= {"no_labels"}  # a step may have no other row
    assert all(line["loss"] == line["loss"] for line in loss_lines(trainer))


def test_a_student_that_could_not_be_written_trains_on_without_a_cache(tmp_path, tokenizer, rows, monkeypatch):
    trainer = plain_trainer(tmp_path, tokenizer, rows, max_steps=1)
    trainer.train()
    assert trainer.student.config.use_cache is False
    monkeypatch.setattr(trainer.student, "save_pretrained", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.save_student(tmp_path / "student")
    assert trainer.student.config.use_cache is False


@pytest.mark.parametrize("odd", ["ignored", "one token"])
def test_where_no_held_out_token_has_a_loss_it_is_no_number_and_not_0(tmp_path, tokenizer, rows, odd):
    ignored = [{**row, "labels": [-100] * len(row["labels"])} for row in rows[:3]]
    held_out = ignored if odd == "ignored" else [{"input_ids": [5], "labels": [5]}] * 3
    trainer = plain_trainer(tmp_path, tokenizer, rows, mercator_weight=0.0, held_out=held_out)
    assert np.isnan(trainer.evaluate()["eval_loss"])
    assert np.isfinite(trainer.evaluate(Dataset.from_list(rows[:3]))["eval_loss"])
    aligned = plain_trainer(tmp_path, tokenizer, rows, mercator_weight=2.0, lm_weight=1.0, held_out=held_out).evaluate()
    assert aligned["eval_loss"] == pytest.approx(2 * aligned["eval_mercator_loss"])


@pytest.mark.parametrize("labelled", [True, False])
def test_there_is_a_prediction_for_every_row_also_for_one_of_no_token(tmp_path, tokenizer, rows, labelled):
    masked = {"input_ids": [3, 4], "labels": [3, 4], "attention_mask": [0, 0]}
    plain = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    mixed = [{"input_ids": [], "labels": [], "attention_mask": []}, plain[0], masked, *plain[1:5]]
    trainer, places = plain_trainer(tmp_path, tokenizer, rows), [1, 3, 4, 5, 6]
    found = []
    for asked in (mixed, plain[:5]):
        kept = [{n: v for n, v in row.items() if labelled or n != "labels"} for row in asked]
        found.append(trainer.predict(Dataset.from_list(kept)))
    assert len(found[0].predictions) == len(mixed)
    for place, row, own in zip(places, rows, found[1].predictions, strict=False):
        length = len(row["input_ids"])
        assert np.allclose(found[0].predictions[place, :length], own[:length], atol=1e-5)
    figures = [name for name in found[1].metrics if not any(part in name for part in ("time", "per_second"))]
    assert all(found[0].metrics[name] == pytest.approx(found[1].metrics[name], rel=1e-5) for name in figures)
    assert ("test_cos_sim" in figures) is labelled


def test_the_probe_and_the_calibration_leave_out_rows_of_no_token(tmp_path, tokenizer, rows):
    nothing = {"input_ids": [], "labels": []}
    settings = {"per_device_eval_batch_size": 32, "projector_init": "least_squares", "max_steps": 1}
    with_it, without = (
        plain_trainer(tmp_path / name, tokenizer, own, held_out=own, **settings)
        for name, own in (("with", [*rows, nothing]), ("without", rows))
    )
    for trainer in (with_it, without):
        trainer.calibrate()
    one, other = (trainer.evaluate() for trainer in (with_it, without))
    figures = [name for name in other if not any(part in name for part in ("time", "per_second"))]
    assert {"eval_margin", "eval_cos_sim", "eval_loss"} <= set(figures)
    assert all(one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5) for name in figures)


@pytest.mark.parametrize(("cut", "count"), [(-2, "18 labels"), (2, "22 labels")])
def test_labels_of_another_length_are_refused(tmp_path, tokenizer, rows, cut, count):
    ids = list(range(1, 21))
    labels = ids[:cut] if cut < 0 else ids + [7] * cut
    trainer = plain_trainer(tmp_path, tokenizer, [{"input_ids": ids, "labels": labels}] * 8, held_out=rows[:2])
    with pytest.raises(ValueError, match=f"An example has 20 input_ids and {count}"):
        trainer.train()


@pytest.mark.parametrize("budget", [0, 64])
def test_a_loader_of_ones_own_and_a_collator_set_later_train_as_kavas_do(tmp_path, tokenizer, rows, budget):
    usual = DataCollatorForSeq2Seq(tokenizer)

    class WithLoader(KavaTrainer):
        def get_train_dataloader(self):
            return DataLoader(rows, batch_size=4, collate_fn=usual)

    own = plain_trainer(tmp_path, tokenizer, rows, WithLoader, max_tokens_per_batch=budget)
    own.train()
    late = plain_trainer(tmp_path, tokenizer, rows, max_tokens_per_batch=budget)
    late.data_collator = usual
    late.train()
    assert late.evaluate()["eval_loss"] > 0
    reference = plain_trainer(tmp_path, tokenizer, rows, max_tokens_per_batch=0)
    reference.train()
    assert [line["loss"] for line in loss_lines(late)] == pytest.approx(
        [line["loss"] for line in loss_lines(reference)], rel=1e-5
    )
    assert len(loss_lines(own)) == 2


def test_a_usual_batch_has_the_loss_of_kavas_and_no_padding_is_learned(tmp_path, tokenizer, rows):
    trainer = plain_trainer(tmp_path, tokenizer, rows, max_tokens_per_batch=0)
    usual, ours = DataCollatorForSeq2Seq(tokenizer)(rows[:4]), trainer.data_collator(rows[:4])
    trainer.model.eval()  # no dropout
    with torch.no_grad():
        assert torch.equal(trainer.compute_loss(trainer.model, usual), trainer.compute_loss(trainer.model, ours))
    batch = completed({"input_ids": torch.tensor([[0, 0, 5, 6]]), "labels": torch.tensor([[0, 0, 5, 6]]),
                       "attention_mask": torch.tensor([[0, 0, 1, 1]])})  # fmt: skip
    assert (batch["answer_index"].tolist(), batch["next_tokens"].tolist()) == ([2], [6])


def test_a_collator_around_kavas_is_checked_as_any_other(tmp_path, tokenizer, rows):
    trainer = plain_trainer(tmp_path, tokenizer, rows, max_tokens_per_batch=0)
    ours = trainer.data_collator

    def with_positions(examples):
        return {**ours(examples), "position_ids": torch.zeros(1)}

    around = plain_trainer(tmp_path, tokenizer, rows, data_collator=lambda examples: ours(examples))
    around.train()
    with pytest.raises(ValueError, match="gives position_ids, which KAVA does not pass on"):
        plain_trainer(tmp_path, tokenizer, rows, data_collator=with_positions).train()


def test_the_model_answers_as_a_users_callback_expects(tmp_path, tokenizer, rows):
    trainer = plain_trainer(tmp_path, tokenizer, rows)
    batch = DataCollatorForSeq2Seq(tokenizer, return_tensors="pt")(rows[:2])
    with torch.no_grad():
        found, own = trainer.model(**batch), trainer.student(**batch)
    assert torch.equal(found.loss, own.loss)
    assert torch.equal(found.logits, own.logits)


class Dearer(KavaTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        return (loss + 100, outputs) if return_outputs else loss + 100


def test_a_loss_of_ones_own_is_the_one_that_is_evaluated(tmp_path, tokenizer, rows):
    dearer, plain = (plain_trainer(tmp_path, tokenizer, rows, kind) for kind in (Dearer, KavaTrainer))
    assert dearer.evaluate()["eval_loss"] == pytest.approx(100 + plain.evaluate()["eval_loss"], rel=0.05)


def test_projectors_start_from_the_seed_alone(tmp_path, tokenizer, rows):
    def start(seed, drawn):
        both = (student(), teacher())
        torch.manual_seed(drawn)
        trainer = plain_trainer(tmp_path, tokenizer, rows, pair=both, seed=seed)
        assert torch.initial_seed() == seed  # Trainer sets it
        return [parameter.clone() for parameter in trainer.target.parameters()]

    first, again, other = start(1, 10), start(1, 20), start(2, 10)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    "sampling",
    [
        {"train_sampling_strategy": "group_by_length"},
        {"accelerator_config": {"use_seedable_sampler": False}},
        {"data_seed": 7},
    ],
    ids=str,
)
def test_a_resumed_run_sees_what_it_would_have_seen(tmp_path, tokenizer, rows, sampling):
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 1, **sampling}
    whole = plain_trainer(tmp_path, tokenizer, rows, **settings)
    whole.train()
    resumed = plain_trainer(tmp_path, tokenizer, rows, **settings)
    output = resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert loss_lines(resumed) == loss_lines(whole)
    last = [line["loss"] for line in loss_lines(resumed)][2:]
    assert output.training_loss == pytest.approx(sum(last) / len(last), rel=1e-5)


def test_callbacks_come_back_from_a_finished_checkpoint_as_the_objects_they_are(tmp_path, tokenizer, rows):
    settings = {
        "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
        "load_best_model_at_end": True, "restore_callback_states_from_checkpoint": True,
    }  # fmt: skip
    plain_trainer(tmp_path, tokenizer, rows, callbacks=[EarlyStoppingCallback(5, 0.2)], **settings).train()
    callback = EarlyStoppingCallback()
    trainer = plain_trainer(tmp_path, tokenizer, rows, callbacks=[callback], **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (callback.early_stopping_patience, callback.early_stopping_threshold) == (5, 0.2)
    assert callback in trainer.callback_handler.callbacks


def test_both_rates_of_a_log_line_are_of_one_step(tmp_path, tokenizer, rows):
    rates = {"learning_rate": 1e-2, "projector_learning_rate": 1e-3, "max_steps": 4, "lr_scheduler_type": "linear"}
    trainer = plain_trainer(tmp_path, tokenizer, rows, **rates)
    trainer.train()
    lines = loss_lines(trainer)
    assert [line["projector_learning_rate"] for line in lines] == pytest.approx(
        [line["learning_rate"] / 10 for line in lines]
    )
    assert lines[0]["learning_rate"] == 1e-2


def with_shared_embeddings():
    both = tiny_llama(TEACHER_SIZE, 2, seed=1), tiny_llama(TEACHER_SIZE, 2, seed=2)
    both[0].model.embed_tokens = both[1].model.embed_tokens
    return both


def one_model():
    model = teacher()
    return model, model


def encoder_decoder():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 512}
    return T5ForConditionalGeneration(T5Config(**sizes))


def masked():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForMaskedLM(BertConfig(vocab_size=512, **sizes))


@pytest.mark.parametrize(
    ("pair", "told"),
    [
        (with_shared_embeddings, "The student shares model.embed_tokens.weight with the teacher, which is frozen"),
        (one_model, "Teacher and student are one model; give the student a copy"),
        (lambda: (student().model, teacher()), "The student is a LlamaModel, which predicts no next token"),
        (lambda: (student(), teacher().model), "The teacher is a LlamaModel, which predicts no next token"),
        (
            lambda: (encoder_decoder(), teacher()),
            "The student is a T5ForConditionalGeneration, which reads",
        ),
        (
            lambda: (student(), encoder_decoder()),
            "The teacher is a T5ForConditionalGeneration, which reads",
        ),
        (lambda: (masked(), teacher()), "The student is a BertForMaskedLM, which predicts no next token"),
        (lambda: (torch.nn.DataParallel(student()), teacher()), "The student is a DataParallel, not a model of transf"),
        (lambda: (student(), torch.nn.DataParallel(teacher())), "The teacher is a DataParallel, not a model of transf"),
        (lambda: ("some/model", teacher()), "The student is a name; load it: AutoModelForCausalLM.from_pretrained"),
        (lambda: (student(), "some/model"), "The teacher is a name; load it: AutoModelForCausalLM.from_pretrained"),
    ],
)
def test_models_that_cannot_be_a_pair_are_refused_by_name_and_role(tmp_path, tokenizer, rows, pair, told):
    with pytest.raises(ValueError, match=told):
        plain_trainer(tmp_path, tokenizer, rows, pair=pair())


def test_plain_arguments_are_refused_and_a_missing_checkpoint_is_one_sentence(tmp_path, tokenizer, rows):
    with pytest.raises(ValueError, match="args is a TrainingArguments; write KavaTrainingArguments"):
        KavaTrainer(student(), teacher(), args=TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(BadRequest, match="names nowhere, which is not a folder; write true for the newest"):
        plain_trainer(tmp_path, tokenizer, rows).train(resume_from_checkpoint="nowhere")


def test_a_teacher_is_used_where_a_device_map_has_put_it(tmp_path, tokenizer, rows):
    whole, offload = teacher(), tmp_path / "offload"
    whole.save_pretrained(tmp_path / "teacher")
    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    places |= {f"model.layers.{layer}": "disk" if layer > 1 else "cpu" for layer in range(TEACHER_LAYERS)}
    placed = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", device_map=places, offload_folder=offload)
    lines = []
    for model in (whole, placed):
        trainer = plain_trainer(tmp_path / "out", tokenizer, rows, pair=(student(), model), kd_weight=1.0)
        trainer.train()
        lines.append([line["loss"] for line in loss_lines(trainer)])
    assert lines[0] == pytest.approx(lines[1], rel=1e-6)


def test_a_search_minimises_the_loss_of_the_evaluation_by_default(tmp_path, tokenizer, rows):
    pytest.importorskip("optuna")
    trainer = plain_trainer(tmp_path, tokenizer, rows, model_init=lambda: student(), eval_strategy="epoch")
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-3)}, n_trials=1
    )
    evaluated = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert best.objective == evaluated[-1]


def test_transformers_own_parser_takes_the_arguments(tmp_path):
    words = ["--output_dir", str(tmp_path), "--mercator_weight", "2", "--use_cpu"]
    (args,) = HfArgumentParser(KavaTrainingArguments).parse_args_into_dataclasses(words)
    assert args.mercator_weight == 2.0


def test_a_student_whose_generation_config_cannot_be_saved_is_mended_before_the_first_step(
    tmp_path, tokenizer, rows, capsys
):
    model = student()
    model.generation_config.temperature, model.generation_config.top_p = 0.9, 0.6
    trainer = plain_trainer(tmp_path, tokenizer, rows, pair=(model, teacher()))
    assert "generation config sets temperature, top_p without do_sample" in capsys.readouterr().out
    trainer.train()
    trainer.save_finals(tmp_path / "final_student", tmp_path / "final_projector.pth")
    saved = json.loads((tmp_path / "final_student" / "generation_config.json").read_text())
    assert not {"temperature", "top_p"} & saved.keys()
    sampling = student()
    sampling.generation_config.do_sample, sampling.generation_config.temperature = True, 0.9
    before = copy.deepcopy(sampling.generation_config)
    assert mend_generation_config(sampling) is None
    assert sampling.generation_config.to_dict() == before.to_dict()


def test_what_would_keep_the_student_from_being_saved_is_found_before_the_first_step(tmp_path, tokenizer, rows):
    trainer = plain_trainer(tmp_path, tokenizer, rows)
    trainer.student.generation_config.num_return_sequences = 5  # greedy, it gives one
    with pytest.raises(BadRequest, match="The student could not be saved"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("padded_rows", [False, True])
def test_rows_without_labels_are_predicted_on_as_by_trainer(tmp_path, tokenizer, rows, padded_rows):
    unlabelled = [{n: v for n, v in row.items() if n != "labels"} for row in (padded(rows) if padded_rows else rows)]
    ours = plain_trainer(tmp_path, tokenizer, rows).predict(Dataset.from_list(unlabelled))
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, per_device_eval_batch_size=SETTINGS["per_device_eval_batch_size"]
    )
    theirs = Trainer(student(), args, processing_class=tokenizer).predict(Dataset.from_list(unlabelled))
    assert ours.label_ids is theirs.label_ids is None
    assert {name for name in ours.metrics if "loss" in name} == set()
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        assert np.allclose(ours.predictions[number, :length], theirs.predictions[number, :length], atol=1e-5)


def test_rows_without_labels_are_neither_trained_nor_evaluated_on(tmp_path, tokenizer, rows):
    unlabelled = [{"input_ids": row["input_ids"]} for row in rows]
    for budget in (0, None):
        with pytest.raises(ValueError, match="no labels"):
            plain_trainer(tmp_path, tokenizer, unlabelled, held_out=rows, max_tokens_per_batch=budget).train()
    with pytest.raises(ValueError, match="no labels"):
        plain_trainer(tmp_path, tokenizer, rows).evaluate(Dataset.from_list(unlabelled))


TEACHERS = (
    {"mercator_weight": 0.0},
    {"kd_weight": 1.0},
    {"mercator_weight": 0.0, "kd_weight": 1.0},
    {"mse_weight": 0.5},
)


@pytest.mark.parametrize("start", [{"mercator_weight": 0.0}, {"mercator_weight": 3.0}, {"kd_weight": 1.0}])
@pytest.mark.parametrize("changes", TEACHERS, ids=str)
def test_weights_that_are_changed_before_the_training_take_effect(tmp_path, tokenizer, rows, start, changes):
    made = plain_trainer(tmp_path / "made", tokenizer, rows, **{**start, **changes})
    made.train()
    later = plain_trainer(tmp_path / "later", tokenizer, rows, **start)
    for name, value in changes.items():
        setattr(later.args, name, value)
    later.train()
    assert loss_lines(later) == loss_lines(made)
    assert [n for n, p in later.model.named_parameters() if p.requires_grad] == [
        n for n, p in made.model.named_parameters() if p.requires_grad
    ]


@pytest.mark.parametrize("start", [{"mercator_weight": 0.0}, {"mercator_weight": 3.0}, {"kd_weight": 1.0}])
@pytest.mark.parametrize("changes", TEACHERS, ids=str)
def test_weights_that_are_changed_before_an_evaluation_take_effect(tmp_path, tokenizer, rows, start, changes):
    made = plain_trainer(tmp_path, tokenizer, rows, **{**start, **changes}).evaluate()
    later = plain_trainer(tmp_path, tokenizer, rows, **start)
    later.evaluate()
    for name, value in changes.items():
        setattr(later.args, name, value)
    found = later.evaluate()
    assert found.keys() == made.keys()
    assert all(found[n] == pytest.approx(made[n]) for n in found if "time" not in n and "per_second" not in n)


def test_a_weight_that_needs_a_teacher_is_refused_where_there_is_none(tmp_path, tokenizer, rows):
    trainer = plain_trainer(tmp_path, tokenizer, rows, pair=(student(), None), mercator_weight=0.0)
    trainer.train()
    trainer.args.kd_weight = 1.0
    for work in (trainer.train, trainer.evaluate):
        with pytest.raises(ValueError, match="kd_weight is above 0; give a teacher"):
            work()
    with pytest.raises(ValueError, match=r"mercator_weight, .* give a teacher"):
        plain_trainer(tmp_path, tokenizer, rows, pair=(student(), None), mercator_weight=1.0)


def test_label_smoothing_is_in_the_loss_that_is_evaluated_and_not_in_the_perplexity(tmp_path, tokenizer, rows):
    plain, smooth = (
        plain_trainer(tmp_path, tokenizer, rows, mercator_weight=0.0, label_smoothing_factor=share).evaluate()
        for share in (0.0, 0.3)
    )
    assert smooth["eval_perplexity"] == pytest.approx(plain["eval_perplexity"])
    assert smooth["eval_loss"] == pytest.approx(plain["eval_loss"] + 0.3 * smooth["eval_smoothing_loss"])
    assert smooth["eval_loss"] != pytest.approx(plain["eval_loss"], rel=1e-4)


@pytest.mark.parametrize("form", ["object", "dictionary", "text", "file"])
@pytest.mark.parametrize("unwanted", [{"dispatch_batches": True}, {"split_batches": True}, {"even_batches": False}])
def test_what_of_accelerator_config_is_not_supported_is_refused_in_every_form(tmp_path, form, unwanted):
    (tmp_path / "config.json").write_text(json.dumps(unwanted))
    forms = {
        "object": AcceleratorConfig(**unwanted), "dictionary": unwanted, "text": json.dumps(unwanted),
        "file": str(tmp_path / "config.json"),
    }  # fmt: skip
    (name,) = unwanted
    with pytest.raises(WrongArguments, match=f"accelerator_config.{name} .* is not supported; leave it out"):
        KavaTrainingArguments(str(tmp_path), use_cpu=True, accelerator_config=forms[form])


@pytest.mark.parametrize("optim", ["galore_adamw_layerwise", "apollo_adamw_layerwise", "lomo", "adalomo"])
def test_an_optimizer_that_steps_within_the_backward_pass_is_refused(tmp_path, optim):
    with pytest.raises(WrongArguments, match=f"optim is {optim}, which takes its steps within the backward pass"):
        KavaTrainingArguments(str(tmp_path), use_cpu=True, optim=optim, optim_target_modules=["mlp"])


@pytest.mark.parametrize("when", [{"logging_strategy": "no"}, {"logging_strategy": "epoch"}, {"logging_steps": 50}])
def test_a_distillation_logs_its_last_step_unless_nothing_is_to_be_logged(tmp_path, tokenizer, rows, when):
    trainer = plain_trainer(tmp_path, tokenizer, rows, max_steps=2, logging_first_step=False, **when)
    trainer.train()
    assert [line["step"] for line in loss_lines(trainer)] == ([] if when == {"logging_strategy": "no"} else [2])


@pytest.mark.parametrize(
    ("positional", "named", "told"),
    [
        (lambda args: (student(), args), {}, "The arguments stand in another's place"),
        (lambda args: (student(), teacher(), args), {}, "The arguments stand in another's place"),
        (lambda args: (args,), {}, "The arguments stand in another's place"),
        (lambda args: (), {"model": student, "teacher": teacher}, "model is called student here"),
        (lambda args: (student(),), {"teacher_model": teacher}, "teacher_model is called teacher here"),
        (lambda args: (student(), teacher()), {"tokenizer": str}, "tokenizer is called processing_class here"),
    ],
)
def test_parameters_in_anothers_place_or_under_anothers_name_are_told(tmp_path, positional, named, told):
    args = KavaTrainingArguments(str(tmp_path), use_cpu=True, plain_output=True)
    with pytest.raises(ValueError, match=told):
        KavaTrainer(*positional(args), args=args, **{name: make() for name, make in named.items()})


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
@pytest.mark.parametrize(
    ("data", "told"),
    [
        (Dataset.from_list([{"text": "a"}]), "has the columns text, and no input_ids. Tokenise it first"),
        (Dataset.from_list([]), "holds no examples"),
        ([], "holds no examples"),
        (
            {"first": Dataset.from_list([{"question": "a", "answer": "b"}])},
            r"\['first'\] has the columns question, answer",
        ),
    ],
)
def test_data_that_was_not_tokenised_or_is_empty_is_told(tmp_path, name, data, told):
    args = KavaTrainingArguments(str(tmp_path), use_cpu=True, plain_output=True)
    with pytest.raises(ValueError, match=f"{name}.*{told}"):
        KavaTrainer(student(), teacher(), args=args, **{name: data})


def test_rows_are_padded_without_a_tokenizer_and_texts_may_be_tokenised_by_a_collator(tmp_path, tokenizer, rows):
    settings = {"output_dir": str(tmp_path), **SETTINGS, "plain_output": True, "max_tokens_per_batch": 0}
    data = Dataset.from_list(rows)
    without = KavaTrainer(student(), teacher(), args=KavaTrainingArguments(**settings), train_dataset=data)
    without.train()
    ours = plain_trainer(tmp_path, tokenizer, rows, max_tokens_per_batch=0, projector_init="least_squares")
    ours.train()
    assert loss_lines(without) == loss_lines(ours)

    def collate(examples):
        batch = tokenizer([example["text"] for example in examples], padding=True, return_tensors="pt")
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    texts = Dataset.from_list([{"text": f"{number} and {number}"} for number in range(16)])
    args = KavaTrainingArguments(**settings, remove_unused_columns=False, projector_init="random")
    KavaTrainer(student(), teacher(), args=args, train_dataset=texts, data_collator=collate).train()


@pytest.mark.parametrize("budget", [0, None])
@pytest.mark.parametrize("terms", [{"mercator_weight": 0.0}, {"mercator_weight": 1.0}])
def test_steps_without_a_label_are_told_once(tmp_path, tokenizer, rows, capsys, budget, terms):
    ignored = [{"input_ids": row["input_ids"], "labels": [-100] * len(row["labels"])} for row in rows]
    trainer = plain_trainer(tmp_path, tokenizer, ignored, held_out=rows, max_tokens_per_batch=budget, **terms)
    trainer.train()
    assert capsys.readouterr().out.count("every label since the last line was -100") == 1
    assert [problem["kind"] for problem in trainer.problems] == ["no_labels"]
    labelled = plain_trainer(tmp_path, tokenizer, rows, max_tokens_per_batch=budget, **terms)
    labelled.train()
    assert labelled.problems == []
