import json
import math
from concurrent.futures import Future

import pytest
import torch
from helpers.data import random_examples
from helpers.trainers import loss_lines, make_trainer
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoModelForCausalLM, TrainerCallback

from kava_trainer.distillation.losses import mercator_loss
from kava_trainer.distillation.projector_files import load_projectors
from kava_trainer.trainer.trainer import KavaTrainer
from kava_trainer.utils.errors import RunFailed


@pytest.mark.parametrize("mapping", ["last", "uniform:2"])
def test_the_loss_is_the_weighted_sum_of_its_terms(tmp_path, tokenizer, mapping):
    trainer = make_trainer(tmp_path, tokenizer, layer_mapping=mapping, mercator_weight=0.7, lm_weight=0.3)
    trainer.model.eval()
    batch = trainer.data_collator(random_examples(5, seed=9))
    mask = batch["attention_mask"].bool()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    teacher = trainer.teacher.model(**inputs, output_hidden_states=True).hidden_states
    student = trainer.student(**inputs, output_hidden_states=True)
    pairs = trainer.target.pairs
    mercator = sum(
        mercator_loss(student.hidden_states[s], projector(teacher[t]), mask)
        for (s, t), projector in zip(pairs, trainer.target.projectors, strict=True)
    ) / len(pairs)
    lm = torch.nn.functional.cross_entropy(student.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    with torch.enable_grad():
        loss = trainer.compute_loss(trainer.model, batch)
    torch.testing.assert_close(loss, 0.7 * mercator + 0.3 * lm)
    means = trainer.steps.means.drain(lambda sums: sums)
    assert means["mercator_loss"] == pytest.approx(mercator.item(), rel=1e-5)
    assert means["lm_loss"] == pytest.approx(lm.item(), rel=1e-5)


def test_without_the_language_model_term_no_logits_are_computed(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, lm_weight=0.0)
    batch = trainer.data_collator(random_examples(2))
    trainer.model.train()
    assert trainer.terms.student_outputs(trainer.model, batch, None, {"mercator": 1.0}).logits_sums == {}
    trainer.student.get_output_embeddings().register_forward_hook(lambda *_: pytest.fail("the head ran"))
    trainer.train()
    assert "lm_loss" not in loss_lines(trainer)[0]


def test_without_the_mercator_term_the_teacher_does_not_run(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, mercator_weight=0.0)
    trainer.teacher.features = None
    before = [parameter.clone() for parameter in trainer.target.parameters()]
    trainer.train()
    assert "cos_sim" not in loss_lines(trainer)[0]
    assert all(torch.equal(old, new) for old, new in zip(before, trainer.target.parameters(), strict=True))


def test_two_learning_rates_with_decay_and_no_decay_cover_every_parameter_once(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, weight_decay=0.1, projector_learning_rate=5e-2)
    groups = trainer.create_optimizer().param_groups
    assert sorted((g["lr"], g["weight_decay"]) for g in groups) == [(1e-3, 0.0), (1e-3, 0.1), (5e-2, 0.0), (5e-2, 0.1)]
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in trainer.model.parameters())
    projector = {id(parameter) for parameter in trainer.target.parameters()}
    for group in groups:
        assert {id(p) in projector for p in group["params"]} == {group["lr"] == 5e-2}
        assert all((p.dim() > 1) == (group["weight_decay"] > 0) for p in group["params"])


def test_student_and_projector_are_clipped_together(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, max_grad_norm=1e-3, max_steps=1)
    norms = []

    def record(optimizer, args, kwargs):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append((len(gradients), torch.stack([g.norm() for g in gradients]).norm().item()))

    trainer.create_optimizer().register_step_pre_hook(record)
    trainer.train()
    assert norms == [(len(list(trainer.model.parameters())), pytest.approx(1e-3, rel=1e-3))]


def test_evaluation_gives_exact_token_means(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer)
    metrics = trainer.evaluate()
    whole = trainer.data_collator(trainer.eval_dataset.to_list())
    trainer.model.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, whole).item()
    means = trainer.eval_means.drain(lambda sums: sums)
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["eval_cos_sim"] == pytest.approx(means["cos_sim"], rel=1e-5)
    assert metrics["eval_mercator_loss"] == pytest.approx(means["mercator_loss"], rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(means["lm_loss"]), rel=1e-4)


def test_predict_gives_logits_and_labels_and_compute_metrics_sees_them(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer)
    output = trainer.predict(trainer.eval_dataset)
    assert output.predictions.shape == (7, output.label_ids.shape[1], 512)
    trainer.compute_metrics = lambda prediction: {"seen": prediction.predictions.shape[0]}
    assert trainer.evaluate()["eval_seen"] == 7


def test_a_log_line_has_the_loss_of_its_terms_and_both_learning_rates(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, mercator_weight=2.0, lm_weight=0.5)
    trainer.train()
    line = loss_lines(trainer)[0]
    assert line["loss"] == pytest.approx(2.0 * line["mercator_loss"] + 0.5 * line["lm_loss"], rel=1e-4)
    assert -1 <= line["cos_sim"] <= 1
    assert line["projector_learning_rate"] > 0
    seconds = {"teacher_seconds", "student_seconds"}
    assert set(trainer.throughput()) == {"tokens_per_second", "samples_per_second", "padding_fraction", *seconds}


def test_packed_rows_have_no_padding_and_padded_ones_are_counted(tmp_path, tokenizer):
    fractions = []
    for budget in (None, 0):
        trainer = make_trainer(tmp_path, tokenizer, max_tokens_per_batch=budget)
        trainer.train()
        fractions.append(trainer.throughput()["padding_fraction"])
    assert fractions[0] == 0 < fractions[1] < 1


def test_the_export_is_a_plain_student_without_the_projector(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path / "run", tokenizer)
    trainer.train()
    trainer.save_student(tmp_path / "student")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    for (name, ours), theirs in zip(trainer.student.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert not [name for name in loaded.state_dict() if "projector" in name or "target" in name]
    assert loaded.config.use_cache
    assert (tmp_path / "student" / "tokenizer.json").exists()
    assert not list((tmp_path / "student").glob("*.bin"))
    loaded.generate(torch.tensor([[5, 6]]), max_new_tokens=3)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, max_steps=30)
    with torch.no_grad():
        trainer.student.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(RunFailed, match=r"no finite numbers for 10 steps in a row, up to step 10;"):
        trainer.train()


def test_weights_that_are_no_numbers_never_replace_a_sound_checkpoint(tmp_path, tokenizer):
    settings = {"max_steps": 6, "save_steps": 1, "logging_steps": 6, "save_total_limit": 1, "save_strategy": "steps"}
    trainer = make_trainer(tmp_path, tokenizer, **settings)

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 3:
                model.student.get_input_embeddings().weight.data.fill_(float("nan"))

    trainer.add_callback(Break())
    with pytest.raises(RunFailed, match="At step 3 weights"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_an_overflow_of_the_gradient_alone_does_not_end_the_run(tmp_path, tokenizer):
    make_trainer(tmp_path, tokenizer).log({"eval_loss": 1.0, "grad_norm": float("inf")})


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints", "end"])
def test_checkpoints_go_to_the_hub_without_any_secret(tmp_path, tokenizer, monkeypatch, strategy):
    sent = []

    def upload(self, folder_path, path_in_repo, ignore_patterns, **kwargs):
        kept = filter_repo_objects([path.name for path in folder_path.iterdir()], ignore_patterns=ignore_patterns)
        sent.append((path_in_repo, sorted(kept), b"".join(path.read_bytes() for path in folder_path.iterdir())))
        done = Future()
        done.set_result(None)
        return done

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    monkeypatch.setattr(KavaTrainer, "init_hf_repo", lambda self, **kwargs: setattr(self, "hub_model_id", "me/student"))
    settings = {"save_strategy": "steps", "save_steps": 2, "push_to_hub": True, "hub_token": "hf_planted"}
    trainer, begun = make_trainer(tmp_path, tokenizer, hub_strategy=strategy, **settings), []

    class Watch(TrainerCallback):
        def on_push_begin(self, args, state, control, **kwargs):
            begun.append((state.global_step, len(sent)))

    trainer.add_callback(Watch())
    trainer.train()
    assert begun == ([] if strategy == "end" else [(2, 0)])
    expected = {"checkpoint": "last-checkpoint", "all_checkpoints": "checkpoint-2"}.get(strategy)
    assert [path for path, *_ in sent] == ([] if strategy == "end" else [expected])
    for _, names, content in sent:
        assert "model.safetensors" in names
        for name in ("optimizer.pt", "progress_0.pth", "manifest.json"):
            assert (name in names) == (expected is not None)
        assert b"hf_planted" not in content
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hf_planted" in path.read_bytes()]


def test_checkpoints_hold_student_and_projector_and_no_pickled_arguments(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, save_strategy="steps", save_steps=1, hub_token="hf_planted")
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "projector.pth", "optimizer.pt", "scheduler.pt", "trainer_state.json"} <= names
    assert "training_args.bin" not in names
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hf_planted" in path.read_bytes()]
    for step in (1, 2):
        saved = load_projectors(tmp_path / f"proj_step_{step}.pth")
    for ours, theirs in zip(trainer.target.projectors.parameters(), saved.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_best_student_and_its_projector_are_loaded_at_the_end(tmp_path, tokenizer):
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        max_steps=4,
        learning_rate=2.0,
        lr_scheduler_type="constant",
        load_best_model_at_end=True,
        metric_for_best_model="perplexity",
        greater_is_better=False,
        **dict.fromkeys(("save_strategy", "eval_strategy"), "steps"),
        **dict.fromkeys(("save_steps", "eval_steps"), 1),
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert not best.endswith("-4")
    assert trainer.evaluate()["eval_perplexity"] == pytest.approx(trainer.state.best_metric, rel=1e-4)
    saved = load_projectors(f"{best}/projector.pth")
    for ours, theirs in zip(trainer.target.projectors.parameters(), saved.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["global_step"] == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"optim": "adafactor"},
        {"train_sampling_strategy": "group_by_length"},
        {"dataloader_num_workers": 1},
        {"neftune_noise_alpha": 5.0},
        {"label_smoothing_factor": 0.1},
        {"auto_find_batch_size": True},
        {"include_num_input_tokens_seen": "non_padding"},
        {"lr_scheduler_type": "cosine", "warmup_steps": 1},
        {"num_train_epochs": 1.5, "max_steps": -1},
        {"eval_on_start": True},
        {"max_grad_norm": 0.0},
    ],
    ids=str,
)
def test_training_arguments_work_as_users_know_them(tmp_path, tokenizer, changes):
    trainer = make_trainer(tmp_path, tokenizer, **changes)
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    trainer.train()
    assert all(not torch.equal(old, new) for old, new in zip(before, trainer.model.parameters(), strict=True))
    assert all(math.isfinite(line["loss"]) for line in loss_lines(trainer))


def test_fewer_activations_are_kept_with_gradient_checkpointing_and_the_loss_is_the_same(tmp_path, tokenizer):
    losses = []
    for name, value in (("off", False), ("on", True)):
        trainer = make_trainer(tmp_path / name, tokenizer, gradient_checkpointing=value, projector_dropout=0.0)
        trainer.train()
        losses.append([line["loss"] for line in loss_lines(trainer)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
