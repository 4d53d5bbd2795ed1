"""Trainings of tiny models on the device that `KAVA_TEST_DEVICE` names, `cuda` or by default `cpu`."""

import os

import pytest
import torch
from helpers.library import arguments, make
from helpers.trainers import loss_lines
from transformers import AutoModelForCausalLM

from kava_trainer.distillation.projector_files import load_projectors

ON_CPU = os.environ.get("KAVA_TEST_DEVICE", "cpu") == "cpu"

TERMS = {"kd_weight": 0.5, "lm_weight": 0.5, "layer_mapping": "uniform:2", "mercator_weight": 1.0}


def trainer_on_the_device(folder, tokenizer, **changes):
    made = make(folder, tokenizer, args=arguments(folder, use_cpu=ON_CPU, **{**TERMS, **changes}))
    assert made.args.device.type == ("cpu" if ON_CPU else "cuda")
    return made


def on_the_host(trainer):
    return {name: tensor.detach().cpu() for name, tensor in trainer.model.state_dict().items()}


def losses(trainer):
    return [line["loss"] for line in loss_lines(trainer)]


def test_a_training_is_that_of_a_cpu(tmp_path, tokenizer):
    here, there = trainer_on_the_device(tmp_path / "a", tokenizer), make(tmp_path / "b", tokenizer, **TERMS)
    for trainer in (here, there):
        trainer.train()
    assert losses(here) == pytest.approx(losses(there), rel=1e-3)
    found, expected = here.evaluate(), there.evaluate()
    for name in ("eval_mercator_loss", "eval_kd_loss", "eval_lm_loss", "eval_cos_sim"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4), name


def test_packed_rows_learn_what_padded_ones_do(tmp_path, tokenizer):
    packed, padded = (
        trainer_on_the_device(tmp_path / str(budget), tokenizer, max_tokens_per_batch=budget) for budget in (64, 0)
    )
    for trainer in (packed, padded):
        trainer.train()
    assert packed.batches.packs
    assert not padded.batches.packs
    assert losses(packed) == pytest.approx(losses(padded), rel=1e-3)


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"gradient_checkpointing": True}])
def test_a_resumed_training_ends_with_the_same_weights(tmp_path, tokenizer, precision):
    asked = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **precision}
    whole = trainer_on_the_device(tmp_path / "whole", tokenizer, **asked)
    whole.train()
    again = trainer_on_the_device(tmp_path / "again", tokenizer, **asked)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    found, expected = on_the_host(again), on_the_host(whole)
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=1e-5, msg=lambda told, name=name: f"{name}: {told}"
        )
    assert losses(again)[-2:] == pytest.approx(losses(whole)[-2:], rel=1e-4)


def test_what_is_exported_is_what_was_trained(tmp_path, tokenizer):
    trainer = trainer_on_the_device(tmp_path, tokenizer)
    trainer.train()
    trainer.save_finals(tmp_path / "final_student", tmp_path / "final_projector.pth")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final_student")
    ids = torch.arange(1, 9).unsqueeze(0)
    with torch.no_grad():
        expected = trainer.student.eval()(ids.to(trainer.args.device)).logits.cpu()
        torch.testing.assert_close(loaded(ids).logits, expected, atol=1e-4, rtol=1e-3)
    kept = load_projectors(tmp_path / "final_projector.pth")
    for own, trained in zip(kept.parameters(), trainer.target.projectors.parameters(), strict=True):
        assert torch.equal(own, trained.detach().cpu())


def test_a_loss_that_is_no_number_is_skipped(tmp_path, tokenizer):
    trainer = trainer_on_the_device(tmp_path, tokenizer, max_steps=3, max_nonfinite_steps=5)
    original, calls = trainer.compute_loss, 0

    def compute(*args, **kwargs):
        nonlocal calls
        calls += 1
        loss = original(*args, **kwargs)
        return loss * float("nan") if calls == 2 else loss

    trainer.compute_loss = compute
    trainer.train()
    assert all(tensor.isfinite().all() for tensor in on_the_host(trainer).values() if tensor.is_floating_point())
    assert [problem["kind"] for problem in trainer.problems] == ["nan"]


def test_times_and_memory_are_told(tmp_path, tokenizer):
    trainer = trainer_on_the_device(tmp_path, tokenizer)
    trainer.train()
    line = next(line for line in trainer.state.log_history if "loss" in line)
    assert line["tokens_per_second"] > 0
    assert line["peak_memory_bytes"] > 0
