"""Each family of models as teacher and as student: its states, packed rows, trainings, what it leaves, and what it
shows of its attention."""

import copy
import random
from functools import cache, partial

import pytest
import torch
from datasets import Dataset
from helpers.families import FAMILIES, LAYERS, VOCABULARY, WINDOW
from helpers.hashes import weight_hash
from helpers.trainers import SETTINGS, loss_lines
from transformers import GenerationConfig

from kava_trainer import KavaTrainer, KavaTrainingArguments
from kava_trainer.data.collators import DistillationCollator, JoiningCollator
from kava_trainer.data.packing import pack_step
from kava_trainer.distillation.model import DistillationModel
from kava_trainer.distillation.targets import RelationsTarget
from kava_trainer.distillation.targets.attention import Heads, log_attention
from kava_trainer.models.attention.capture import (
    AttentionPart,
    FeatureCapture,
    check_features,
    key_value_shape,
    query_heads,
    window_of,
)
from kava_trainer.models.generation.generate import continue_prompts
from kava_trainer.models.hidden_states import run_decoder
from kava_trainer.models.layers import number_of_layers
from kava_trainer.models.lm_head import vocabulary_logits
from kava_trainer.models.packed_attention import enable_packing
from kava_trainer.models.teacher import OnlineTeacher
from kava_trainer.utils.errors import BadRequest

TEACHER_WIDTH = 48

SLOW = ("opt_350m", "qwen2_moe", "bamba", "jamba", "zamba2", "qwen3_next", "gemma3_vision", "llava")
"""Relatives of families that the default tests have."""

PADDED = ("falcon_h1", "bamba", "jamba", "zamba2", "qwen3_next")
"""Whose state spaces carry something from one example of a row into the next."""

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "jamba", "qwen3_next")

SHOWN = {"gemma2": (), "bamba": (2,), "jamba": (2,), "zamba2": (1, 3), "qwen3_next": (2,)}
"""The layers that show their keys, where not all do."""

each = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in FAMILIES]
)


def _rows():
    rng, rows = random.Random(0), []
    for _ in range(8):
        ids = [rng.randint(1, VOCABULARY - 1) for _ in range(rng.randint(4, 16))]
        prompt = rng.randint(1, len(ids) - 2)
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


ROWS = _rows()

IDS = torch.arange(3, 3 + 3 * WINDOW).unsqueeze(0)

_first = cache(lambda name, width: FAMILIES[name](width))


def model_of(name, width=32):
    return copy.deepcopy(_first(name, width))


def trainer_of(folder, tokenizer, student, teacher, **changes):
    weights = {"mercator_weight": 1.0, "lm_weight": 1.0, "kd_weight": 0.5, "layer_mapping": "all"}
    settings = {**SETTINGS, "plain_output": True, "projector_init": "random", **weights, **changes}
    args, rows = KavaTrainingArguments(str(folder), **settings), Dataset.from_list(ROWS)
    return KavaTrainer(
        student, teacher, args=args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
    )  # fmt: skip


def padded_and_packed(tokenizer):
    (packed,) = pack_step([JoiningCollator()(ROWS)], budget=1000)
    return DistillationCollator(tokenizer)(ROWS), packed


@each
@torch.no_grad()
def test_states_are_those_of_transformers_and_the_last_one_gives_the_logits(tokenizer, name):
    model, layers = model_of(name), [*range(1, LAYERS + 1)]
    padded, packed = padded_and_packed(tokenizer)
    ids, mask = padded["input_ids"], padded["attention_mask"]
    own = model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
    assert number_of_layers(model) == LAYERS == len(own.hidden_states) - 1
    teacher = OnlineTeacher(model_of(name), layers)
    student = DistillationModel(model_of(name), RelationsTarget([(layer, layer) for layer in layers])).eval()
    real = mask.bool()
    for model, states_of in ((student.student, partial(as_student, student)), (teacher.model, teacher.features)):
        found = states_of(padded)
        assert sorted(found) == layers
        for layer in layers:
            torch.testing.assert_close(found[layer][real], own.hidden_states[layer][real], rtol=0, atol=0)
        torch.testing.assert_close(vocabulary_logits(model, found[LAYERS])[real], own.logits[real])
        alone = torch.cat([run_decoder(model, torch.tensor([row["input_ids"]])) for row in ROWS], dim=1)
        torch.testing.assert_close(found[LAYERS][real], alone[0], rtol=1e-5, atol=1e-5)
        if name in PADDED:
            continue
        enable_packing(model)
        for layer, state in states_of(packed).items():
            torch.testing.assert_close(state[0], own.hidden_states[layer][real], rtol=1e-5, atol=1e-5)


def as_student(model, batch):
    read = {name: batch.get(name) for name in ("input_ids", "attention_mask", "packed_lengths")}
    return model(**read, distils=True).hidden_states


TARGETS = {
    "hidden": {"lm_weight": 1.0, "kd_weight": 0.5},
    "kv": {"alignment_target": "kv", "kv_shape": "headwise"},
    "attention": {"alignment_target": "attention", "attention_weight": 100.0},
    "relations": {"alignment_target": "relations"},
}


def mapping_of(name, target):
    if name == "opt_350m" and target == "hidden":
        return "last"  # its last state is narrower than the others
    shown = SHOWN.get(name, ()) if target in ("kv", "attention") else ()
    return str([[layer, layer] for layer in shown]) if shown else "all"


@each
@pytest.mark.parametrize("target", TARGETS)
def test_a_packed_step_has_the_loss_and_the_gradients_of_a_padded_one_or_it_is_told_why_none_is_packed(
    tmp_path, tokenizer, capsys, name, target
):
    changes = {"lm_weight": 0.0, "kd_weight": 0.0, "layer_mapping": mapping_of(name, target)} | TARGETS[target]
    if target in ("attention", "relations"):
        changes["mercator_weight"] = 0.0
    pair = model_of(name), model_of(name, TEACHER_WIDTH)
    if name == "gemma2" and target in ("kv", "attention"):
        with pytest.raises(
            BadRequest, match=f"{target} reads what goes into sdpa attention, but the student, a Gemma2"
        ):
            trainer_of(tmp_path, tokenizer, *pair, **changes)
        return
    trainer = trainer_of(tmp_path, tokenizer, *pair, **changes)
    told = f"No packing, because the student, a {type(pair[0]).__name__}, cannot read packed examples"
    assert (told in capsys.readouterr().out) == (name in PADDED) != trainer.batches.packs
    model, outcomes = trainer.model.eval(), []
    for batch in padded_and_packed(tokenizer)[: 1 if name in PADDED else 2]:
        model.zero_grad()
        loss = trainer.compute_loss(model, batch)
        loss.backward()
        outcomes.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    assert any(gradient.any() for own, gradient in outcomes[0][1].items() if own.startswith("student."))
    torch.testing.assert_close(outcomes[-1], outcomes[0], rtol=1e-5, atol=1e-5)


def collapsed(trainer):
    """What the probe says of targets that are all one."""
    with torch.no_grad():
        for projector in trainer.target.projectors:
            projector.down.weight.zero_()
    return trainer.run_probe().collapse


STEPS = {
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "constant",
}


@each
def test_as_a_student_it_learns_and_goes_on_from_a_checkpoint_and_is_loaded_as_it_was(tmp_path, tokenizer, name):
    changes = STEPS | {"layer_mapping": mapping_of(name, "hidden")}
    straight, resumed = (
        trainer_of(tmp_path, tokenizer, model_of(name), model_of("llama", TEACHER_WIDTH), **changes) for _ in range(2)
    )
    straight.train()
    lines = loss_lines(straight)
    assert lines[-1]["mercator_loss"] < lines[0]["mercator_loss"]
    assert lines[-1]["lm_loss"] < lines[0]["lm_loss"]
    resumed.train(str(tmp_path / "checkpoint-2"))
    assert weight_hash(resumed.model) == weight_hash(straight.model)
    assert loss_lines(resumed) == lines
    assert_is_loaded_as_it_was(straight, tmp_path / "student")
    assert "another token" in collapsed(straight)


@torch.no_grad()
def assert_is_loaded_as_it_was(trainer, folder):
    student, ask = trainer.student.eval(), {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    ask["attention_mask"] = torch.ones_like(IDS)
    logits, answer = student(IDS).logits, student.generate(IDS, **ask)
    trainer.save_student(folder)
    again, found = type(student).from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert torch.equal(again(IDS).logits, logits)
    assert torch.equal(again.generate(IDS, **ask), answer)
    whole = again(answer, use_cache=False).logits.argmax(dim=-1)  # without the cache that it was written with
    assert torch.equal(whole[:, IDS.shape[1] - 1 : -1], answer[:, IDS.shape[1] :])


@each
def test_prompts_of_different_lengths_are_continued_as_each_alone(name):
    model, config = model_of(name), GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)
    asks = getattr(model.config.get_text_config(), "output_router_logits", None)
    prompts = [row["input_ids"][:length] for row, length in zip(ROWS, (3, 12, 7), strict=False)]
    together = continue_prompts(model, prompts, config)
    assert torch.equal(together, torch.cat([continue_prompts(model, [prompt], config) for prompt in prompts]))
    assert getattr(model.config.get_text_config(), "output_router_logits", None) == asks


@each
def test_as_a_teacher_it_is_learned_from_and_left_as_it_is(tmp_path, tokenizer, name):
    teacher, before = model_of(name, TEACHER_WIDTH), weight_hash(_first(name, TEACHER_WIDTH))
    changes = STEPS | {"layer_mapping": mapping_of(name, "hidden"), "save_strategy": "no"}
    trainer = trainer_of(tmp_path, tokenizer, model_of("llama"), teacher, **changes)
    trainer.train()
    lines = loss_lines(trainer)
    assert lines[-1]["mercator_loss"] < lines[0]["mercator_loss"]
    assert lines[-1]["kd_loss"] < lines[0]["kd_loss"]
    assert "router_loss" not in lines[0]
    assert weight_hash(teacher) == before
    assert "another token" in collapsed(trainer)


ATTENDING = [
    pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in FAMILIES if SHOWN.get(name) != ()
]


@pytest.mark.parametrize("name", ATTENDING)
@torch.no_grad()
def test_keys_and_attention_are_the_models_own_in_the_layers_that_show_them(name):
    model, eager = model_of(name), model_of(name)
    eager.set_attn_implementation("eager")
    cache, attentions = model(IDS, use_cache=True).past_key_values, eager(IDS, output_attentions=True).attentions
    for layer in range(1, LAYERS + 1):
        parts = [AttentionPart(layer, part) for part in ("query", "key", "value")]
        if layer not in SHOWN.get(name, (1, 2, 3)):
            with pytest.raises(BadRequest, match=f"Layer {layer} of the teacher, a .* does not attend by"):
                check_features(model, parts, "teacher")
            continue
        check_features(model, parts, "student")
        with FeatureCapture(model, parts) as found:
            run_decoder(model, IDS)
        for part in ("key", "value"):
            own = getattr(cache.layers[layer - 1], f"{part}s")
            state = found[AttentionPart(layer, part)].transpose(1, 2)[:, :, -own.shape[2] :]
            torch.testing.assert_close(state, own)
        heads = Heads(query_heads(model), key_value_shape(model)[0], window_of(model, layer))
        both = torch.cat([found[part] for part in parts[:2]], dim=2)[0]
        ours = log_attention(both, heads, 0, IDS.shape[1], merged=False).exp()
        own = attentions[SHOWN.get(name, (1, 2, 3)).index(layer)]
        torch.testing.assert_close(ours, own[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in MIXTURES])
@pytest.mark.parametrize("coefficient", [0.0, 0.5, 5.0])
def test_the_auxiliary_loss_of_a_mixture_is_in_the_loss_of_the_student_with_its_weight(
    tmp_path, tokenizer, name, coefficient
):
    student = model_of(name)
    student.router_aux_loss_coef = student.config.router_aux_loss_coef = coefficient
    trainer = trainer_of(tmp_path, tokenizer, student, model_of(name, TEACHER_WIDTH), kd_weight=0.0)
    padded, _ = padded_and_packed(tokenizer)
    asked, found = {own: padded[own] for own in ("input_ids", "attention_mask", "labels")}, []
    for asks in (True, False):
        student.config.get_text_config().output_router_logits = asks
        with torch.no_grad():
            found.append((trainer.compute_loss(trainer.model.eval(), padded), student(**asked).loss))
    (ours, own), (ours_without, own_without) = found
    torch.testing.assert_close(ours - ours_without, own - own_without, rtol=1e-4, atol=1e-5)
    assert (ours - ours_without > 0.4 * coefficient) == (coefficient > 0)
