"""Models of other shapes than the usual one: their own loss, their text part, their adapters; or one sentence."""

import copy
import json
import shutil

import pytest
import torch
from datasets import Dataset
from helpers.data import random_examples
from helpers.models import STUDENT_LAYERS, STUDENT_SIZE, TEACHER_LAYERS, TEACHER_SIZE, model_of, tiny_llama, tiny_sizes
from helpers.trainers import SETTINGS, loss_lines
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from kava_trainer import KavaTrainer, KavaTrainingArguments
from kava_trainer.data.collators import DistillationCollator
from kava_trainer.models.hidden_states import run_decoder
from kava_trainer.trainer.final_student import RESCUED
from kava_trainer.utils.errors import BadRequest, RunFailed

ROWS = [{name: row[name] for name in ("input_ids", "labels")} for row in random_examples(16)]


def student(seed=2, **changes):
    return tiny_llama(STUDENT_SIZE, STUDENT_LAYERS, seed=seed, **changes)


def teacher():
    return tiny_llama(TEACHER_SIZE, TEACHER_LAYERS, seed=1)


def trainer_of(folder, tokenizer, learner=None, knower=None, **changes):
    settings = {**SETTINGS, "output_dir": str(folder), "plain_output": True, "projector_init": "random", **changes}
    learner = student() if learner is None else learner
    return KavaTrainer(
        learner, knower or teacher(), args=KavaTrainingArguments(**settings),
        train_dataset=Dataset.from_list(ROWS), eval_dataset=Dataset.from_list(ROWS[:5]), processing_class=tokenizer,
    )  # fmt: skip


def narrow_opt():
    sizes = {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}
    return model_of("opt", **tiny_sizes(STUDENT_SIZE, 3) | sizes)


def falcon_h1():
    mamba = {"d_ssm": 64, "n_heads": 8, "d_head": 8, "d_state": 8, "n_groups": 1, "chunk_size": 16}
    sizes = {"lm_head_multiplier": 0.02, "head_dim": 16, **{f"mamba_{name}": size for name, size in mamba.items()}}
    return model_of("falcon_h1", **tiny_sizes(STUDENT_SIZE, 2) | sizes)


def mixture(coefficient=0.5, asks=True):
    sizes = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
    asked = {"router_aux_loss_coef": coefficient, "output_router_logits": asks}
    return model_of("qwen3_moe", **tiny_sizes(STUDENT_SIZE, 2) | sizes | asked)


FAMILIES = {"narrow last state": narrow_opt, "hybrid": falcon_h1, "mixture": mixture, "usual": student}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_next_token_loss_is_the_models_own(tmp_path, tokenizer, name):
    trainer = trainer_of(tmp_path, tokenizer, FAMILIES[name](), lm_weight=1.0, mercator_weight=0.0)
    batch = DistillationCollator(tokenizer)(ROWS[:4])
    model = trainer.model.eval()
    own = trainer.student(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss
    torch.testing.assert_close(trainer.compute_loss(model, batch).detach(), own.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_it_trains_as_student_and_as_teacher(tmp_path, tokenizer, name, role):
    pair = {"learner" if role == "student" else "knower": FAMILIES[name]()}
    trainer = trainer_of(tmp_path, tokenizer, lm_weight=1.0, kd_weight=1.0, max_tokens_per_batch=64, **pair)
    assert trainer.batches.packs == (name != "hybrid")
    trainer.train()
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in loss_lines(trainer))


def test_two_coefficients_of_the_routers_give_two_students(tmp_path, tokenizer, capsys):
    found = {}
    for coefficient, asks in ((0.0, True), (5.0, True), (5.0, False)):
        trainer = trainer_of(tmp_path / f"{coefficient}{asks}", tokenizer, mixture(coefficient, asks))
        trainer.train()
        router = next(w for n, w in trainer.student.named_parameters() if "gate.weight" in n)
        found[coefficient, asks] = router.detach().clone(), trainer.evaluate()
    assert not torch.equal(found[0.0, True][0], found[5.0, True][0])
    assert torch.equal(found[0.0, True][0], found[5.0, False][0])
    assert "Routers: no auxiliary loss keeps the student's experts in balance" in capsys.readouterr().out
    evaluated = found[5.0, True][1]
    assert evaluated["eval_router_weighted"] == pytest.approx(5 * evaluated["eval_router_loss"])
    assert evaluated["eval_loss"] > 5 * evaluated["eval_router_loss"]
    assert "eval_router_loss" not in found[5.0, False][1]


TEXT = {**tiny_sizes(STUDENT_SIZE, 2), "head_dim": 16}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGES = {
    "gemma3": ({"sliding_window": 16}, {**VISION, "image_size": 28, "patch_size": 14}),
    "qwen2_vl": (
        {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
        {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": STUDENT_SIZE},
    ),
    "llava": (
        {"model_type": "llama"},
        {**VISION, "model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, "projection_dim": 16},
    ),
}


def with_images(kind):
    torch.manual_seed(0)
    text, vision = IMAGES[kind]
    config = AutoConfig.for_model(kind, text_config=TEXT | text, vision_config=vision)
    maker = AutoModelForCausalLM if kind == "gemma3" else AutoModelForImageTextToText
    return maker.from_config(config)


@pytest.mark.parametrize("kind", IMAGES)
def test_a_model_that_reads_images_too_is_trained_and_saved_in_its_text_part(tmp_path, tokenizer, kind):
    before = with_images(kind)
    trainer = trainer_of(tmp_path, tokenizer, copy.deepcopy(before), lm_weight=1.0, layer_mapping="all")
    trainer.train()
    frozen = {name for name, weight in trainer.student.named_parameters() if not weight.requires_grad}
    assert frozen
    assert all("vis" in name or "multi_modal" in name for name in frozen)
    after = dict(trainer.student.named_parameters())
    assert all(torch.equal(weight, after[name]) for name, weight in before.named_parameters() if name in frozen)
    trainer.save_student(tmp_path / "student")
    assert "use_cache" not in json.loads((tmp_path / "student" / "config.json").read_text())
    again = type(before).from_pretrained(tmp_path / "student").eval()
    ids = torch.tensor([ROWS[0]["input_ids"]])
    torch.testing.assert_close(run_decoder(again, ids), run_decoder(trainer.student.eval(), ids))


@pytest.mark.parametrize("kind", IMAGES)
def test_a_model_that_reads_images_too_is_a_teacher(tmp_path, tokenizer, kind):
    trainer = trainer_of(tmp_path, tokenizer, knower=with_images(kind), kd_weight=1.0, layer_mapping="all")
    trainer.train()
    assert all(line["loss"] == line["loss"] for line in loss_lines(trainer))


@pytest.mark.parametrize("kind", ["mixture", *IMAGES])
def test_the_best_checkpoint_is_loaded_whole_whatever_names_its_weights_have(tmp_path, tokenizer, kind):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    steps = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    learner = mixture() if kind == "mixture" else with_images(kind)
    trainer = trainer_of(tmp_path, tokenizer, learner, lm_weight=1.0, learning_rate=1e-2, **steps, **best)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    saved = type(learner).from_pretrained(tmp_path / "checkpoint-1").state_dict()
    assert all(torch.equal(weight, saved[name]) for name, weight in trainer.student.state_dict().items())
    last = type(learner).from_pretrained(tmp_path / "checkpoint-2").state_dict()
    assert any("experts" in name or kind != "mixture" for name in saved if not torch.equal(last[name], saved[name]))


def adapted(model, **changes):
    options = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"], **changes}
    return get_peft_model(model, LoraConfig(**options))


@pytest.mark.parametrize("changes", [{}, {"modules_to_save": ["lm_head"]}])
def test_a_peft_model_is_a_student_through_its_adapters(tmp_path, tokenizer, changes):
    learner = adapted(student(tie=False), **changes)
    trainer = trainer_of(tmp_path, tokenizer, learner, lm_weight=1.0)
    before = {name: weight.detach().clone() for name, weight in trainer.student.named_parameters()}
    trainer.train()
    changed = {name for name, weight in trainer.student.named_parameters() if not torch.equal(weight, before[name])}
    assert changed
    assert all("lora_" in name or "modules_to_save" in name for name in changed)
    trainer.save_finals(tmp_path / "student", tmp_path / "projector.pth")
    again, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "student"), torch.tensor([ROWS[0]["input_ids"]])
    torch.testing.assert_close(again.eval()(ids).logits, learner.eval()(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_peft_model_is_a_teacher_with_its_adapters(tmp_path, tokenizer):
    knower = adapted(teacher())
    for name, weight in knower.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    trainer = trainer_of(tmp_path, tokenizer, knower=knower, kd_weight=1.0)
    batch = DistillationCollator(tokenizer)(ROWS[:1])
    last = trainer.teacher.features(batch)[TEACHER_LAYERS]
    torch.testing.assert_close(trainer.teacher.head(last), knower.eval()(batch["input_ids"]).logits)


@pytest.mark.parametrize(
    ("learner", "told"),
    [
        (
            lambda: get_peft_model(student(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
            "learns a prompt",
        ),
        (lambda: get_peft_model(student(), LoraConfig(target_modules=["q_proj"]), "mine"), "has the adapters mine"),
        (lambda: student().half(), "weights are float16, which is not trained in"),
        (lambda: student().double(), "weights are float64, which is not trained in"),
        (lambda: student().requires_grad_(False), "No weight of the student needs a gradient"),
        (lambda: torch.compile(student()), "The student is a OptimizedModule"),
    ],
)
def test_students_that_cannot_be_trained_are_refused_in_one_sentence(tmp_path, tokenizer, learner, told):
    with pytest.raises(ValueError, match=told):
        trainer_of(tmp_path, tokenizer, learner())


def with_bias():
    model = student(tie=False)
    model.lm_head = nn.Linear(STUDENT_SIZE, 512)
    return model


def without_a_block():
    model = student()
    model.config.num_hidden_layers += 1
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))
    model.config.num_hidden_layers -= 1
    return model


@pytest.mark.parametrize("learner", [with_bias, without_a_block])
def test_a_student_that_nobody_could_load_again_is_refused_before_the_first_step(tmp_path, tokenizer, learner):
    with pytest.raises(BadRequest, match="not what its config describes"):
        trainer_of(tmp_path, tokenizer, learner(), layer_mapping="last").train()


def test_weights_that_cannot_be_saved_as_a_model_are_kept_and_the_reason_is_told(tmp_path, tokenizer, monkeypatch):
    trainer = trainer_of(tmp_path, tokenizer, save_strategy="no")
    trainer.train()
    trainer.student.generation_config.temperature = 0.3  # is mended
    trainer.save_finals(tmp_path / "student", tmp_path / "projector.pth")
    shutil.rmtree(tmp_path / "student")
    for error, advice in (
        (OSError(28, "No space left on device"), "make room, or set final_dir"),
        (PermissionError(13, "Permission denied"), "Make the folder writable"),
        (TypeError("not serialisable"), "config, tokenizer or model class to mend"),
    ):

        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(trainer.student, "save_pretrained", fail)
        with pytest.raises(RunFailed, match=advice) as told:
            trainer.save_finals(tmp_path / "student", tmp_path / "projector.pth")
        assert str(tmp_path / RESCUED) in str(told.value)
        assert "no checkpoint yet" not in str(told.value)
        assert ("room" in str(told.value)) == (error.args[0] == 28)
        fresh = student(seed=9)
        fresh.load_state_dict(torch.load(tmp_path / RESCUED, weights_only=True))
        assert torch.equal(fresh.lm_head.weight, trainer.student.lm_head.weight)
        (tmp_path / RESCUED).unlink()


def test_a_teacher_of_two_widths_aligns_inner_layers_beside_its_own_logits(tmp_path, tokenizer):
    trainer = trainer_of(tmp_path, tokenizer, knower=narrow_opt(), kd_weight=1.0, layer_mapping="[[1, 1], [2, 2]]")
    trainer.train()
    assert [projector.config.input_size for projector in trainer.target.projectors] == [STUDENT_SIZE] * 2
    with pytest.raises(BadRequest, match="is 16 wide and its others 32"):
        trainer_of(tmp_path, tokenizer, knower=narrow_opt(), layer_mapping="all")
