"""Whole trainings of a student whose tokens are others than its teacher's."""

import json
import math

import pytest
import torch
from datasets import Dataset
from helpers.data import write_dataset
from helpers.hashes import weight_hash
from helpers.library import arguments
from helpers.models import STUDENT_LAYERS, STUDENT_SIZE, TEACHER_LAYERS, TEACHER_SIZE, tiny_llama, tiny_lora_llama
from helpers.other_tokens import ROWS, make_of_other_tokens, step
from helpers.outcomes import assert_same_step
from helpers.processes import Run
from helpers.programs import QUICKSTART, SHORT, summary_of, words
from helpers.small_tokenizers import byte_level, sentence_pieces
from helpers.trainers import loss_lines
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import run_kava
from kava_trainer import KavaTrainer, KavaTrainingArguments, cli, encode
from kava_trainer.distillation.teacher_cache import CachedTeacher
from kava_trainer.models.teacher import OnlineTeacher


def test_training_lowers_the_loss_and_leaves_the_teacher_alone(tmp_path):
    trainer = make_of_other_tokens(
        tmp_path, max_steps=12, learning_rate=1e-2, projector_learning_rate=1e-2, kd_weight=3.0
    )
    before = weight_hash(trainer.teacher.model)
    first = trainer.evaluate()
    trainer.train()
    last = trainer.evaluate()
    assert last["eval_mercator_loss"] < 0.7 * first["eval_mercator_loss"]
    assert last["eval_lm_loss"] < first["eval_lm_loss"]
    assert last["eval_kd_loss"] < first["eval_kd_loss"]
    assert weight_hash(trainer.teacher.model) == before


@pytest.mark.parametrize(
    ("reader", "rule"), [(byte_level, "overlap"), (byte_level, "causal"), (sentence_pieces, "overlap")]
)
def test_padded_packed_and_smaller_batches_learn_the_same(tmp_path, reader, rule):
    """Also with a student of the teacher's tokenizer, whose data say nothing of a teacher."""
    ways = {
        "padded": {"max_tokens_per_batch": 0},
        "packed": {},
        "small": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    }
    lines = {}
    for name, changes in ways.items():
        read = {"student_tokenizer": reader(), "token_alignment": rule}
        trainer = make_of_other_tokens(tmp_path / name, max_steps=3, **read, **changes)
        trainer.train()
        lines[name] = loss_lines(trainer)
    for name in ("packed", "small"):
        for line, expected in zip(lines[name], lines["padded"], strict=True):
            for figure in ("loss", "mercator_loss", "cos_sim", "lm_loss", "kd_loss"):
                assert line[figure] == pytest.approx(expected[figure], rel=1e-3), (name, figure)


@pytest.mark.parametrize("rule", ["overlap", "causal"])
def test_a_loss_is_the_mean_over_the_tokens_that_are_aligned(tmp_path, rule):
    """Against a pass over the examples one by one."""
    trainer = make_of_other_tokens(tmp_path, lm_weight=0.0, kd_weight=0.0, token_alignment=rule)
    total = count = 0.0
    student, teacher, target = trainer.student.eval(), trainer.teacher, trainer.target.eval()
    for example in trainer.eval_dataset:
        ids, others = (torch.tensor([example[name]]) for name in ("input_ids", "teacher_input_ids"))
        features = teacher.features({"input_ids": others, "attention_mask": torch.ones_like(others)})
        states = student(ids, output_hidden_states=True).hidden_states
        for place, (start, *_, end) in enumerate(example["teacher_ranges"]):
            if start == end:
                continue
            for own, layer in target.pairs:
                goal = features[layer][:, start:end].mean(dim=1)
                total += 1 - torch.cosine_similarity(target.projectors[0](states[own][:, place]), goal).item()
            count += len(target.pairs)
    assert trainer.evaluate()["eval_cos_sim"] == pytest.approx(1 - total / count, abs=1e-4)


PCA = {"projector_direction": "teacher_to_student", "projector_anchor": "pca"}

SETTINGS = {
    "last": {},
    "uniform": {"layer_mapping": "uniform:2"},
    "all, shared": {"layer_mapping": "all", "projector_sharing": "all", "projector_init": "least_squares"},
    "into the student": PCA,
    "bridge": {**PCA, "projector_rank": 8, "projector_init": "least_squares"},
    "causal": {"token_alignment": "causal", "projector_init": "least_squares"},
}
"""Of what is aligned."""

each = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


@each
@pytest.mark.parametrize("reader", [byte_level, pytest.param(lambda: byte_level(5), marks=pytest.mark.slow)])
@pytest.mark.parametrize("student", [tiny_llama, tiny_lora_llama])
def test_every_setting_is_learned_resumed_bit_equal_and_exported(tmp_path, settings, reader, student):
    asked = settings | {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "learning_rate": 1e-2}
    asked |= {"lr_scheduler_type": "cosine", "mercator_weight": 10.0}
    whole, again = (
        make_of_other_tokens(
            tmp_path / name, student_tokenizer=reader(), student=student(STUDENT_SIZE, STUDENT_LAYERS, seed=2), **asked
        )
        for name in ("whole", "again")
    )
    before = whole.evaluate()
    whole.train()
    after = whole.evaluate()
    assert after["eval_mercator_loss"] < 0.95 * before["eval_mercator_loss"]
    assert after["eval_cos_sim"] > before["eval_cos_sim"]
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert weight_hash(again.model) == weight_hash(whole.model)
    assert loss_lines(again) == loss_lines(whole)
    whole.save_finals(tmp_path / "final_student", tmp_path / "final_projector.pth")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "final_student", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(1, 9).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, whole.student.eval()(ids).logits)


@each
def test_a_planted_collapse_is_called(tmp_path, settings):
    asked = {**settings, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0, "max_steps": 1}
    trainer = make_of_other_tokens(tmp_path, **asked)
    with torch.no_grad():
        trainer.student.get_input_embeddings().weight.fill_(1.0)
        for projector in trainer.target.projectors:
            for weight in projector.parameters():
                weight.zero_()
    trainer.train()
    assert "another token" in trainer.collapse
    assert trainer.pair_figures()[0]["collapsed"]


@pytest.mark.parametrize("sizes", [(2, 2, 2), pytest.param((4, 2, 1), marks=pytest.mark.slow)])
def test_one_step_does_not_depend_on_how_the_batch_is_split(tmp_path, sizes):
    found = []
    for batch_size, accumulation, ranks in ((8, 1, 1), sizes):
        output = str(tmp_path / f"{ranks}x{batch_size}")
        run = Run(step, tmp_path, output, str(batch_size), str(accumulation), ranks=ranks)
        assert run.wait() == [0] * ranks, run.output()
        found.append(torch.load(f"{output}.pt", weights_only=True))
    whole, split = found
    assert split["world_size"] == sizes[-1]
    assert_same_step(split, whole)


class Noted(CachedTeacher):
    """A cache in memory: states that the teacher gave to the tokens it reads, in full precision."""

    def __init__(self, model, examples):
        layers = [TEACHER_LAYERS]
        teacher = OnlineTeacher(model, layers)
        found = {}
        for ids in examples:
            batch = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
            found[tuple(ids)] = {layer: own[0] for layer, own in teacher.features(batch).items()}
        super().__init__(model, lambda ids: found[tuple(ids)])


@pytest.mark.parametrize("packs", [True, False])
def test_states_of_a_cache_are_learned_from_alike(tmp_path, packs):
    lines = []
    for cached in (False, True):
        trainer = make_of_other_tokens(tmp_path / str(cached), max_tokens_per_batch=None if packs else 0, max_steps=3)
        if cached:
            trainer.read_cache(Noted(trainer.teacher.model, trainer.train_dataset["teacher_input_ids"]))
        trainer.train()
        lines.append(loss_lines(trainer))
    for line, expected in zip(*lines, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert line["cos_sim"] == pytest.approx(expected["cos_sim"], abs=1e-4)
        assert line["kd_loss"] == pytest.approx(expected["kd_loss"], rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"kd_tokens": "all", "lm_tokens": "answers", "kd_beta": 0.5},
        {"lm_weight": 0.0, "mercator_weight": 0.0, "kd_temperature": 2.0},
        {"kd_tokens": "answers", "lm_tokens": "all", "label_smoothing_factor": 0.1},
    ],
)
def test_a_divergence_over_any_tokens_beside_any_terms_falls(tmp_path, changes):
    trainer = make_of_other_tokens(tmp_path, max_steps=8, learning_rate=1e-2, **{"kd_weight": 5.0, **changes})
    first = trainer.evaluate()
    trainer.train()
    assert trainer.evaluate()["eval_kd_loss"] < first["eval_kd_loss"]


def test_a_divergence_without_the_teachers_tokenizer_is_refused(tmp_path):
    made = make_of_other_tokens(tmp_path)
    models = tiny_llama(STUDENT_SIZE, STUDENT_LAYERS, seed=2), tiny_llama(TEACHER_SIZE, TEACHER_LAYERS, seed=1)
    trainer = KavaTrainer(*models, args=made.args, train_dataset=made.train_dataset)
    with pytest.raises(ValueError, match="give KavaTrainer the tokenizers, as processing_class and teacher_tokenizer"):
        trainer.train()


def test_a_collator_that_knows_nothing_of_the_teachers_tokens_is_refused(tmp_path):
    data = encode(Dataset.from_list(ROWS), byte_level(), 64, teacher_tokenizer=sentence_pieces())
    models = tiny_llama(STUDENT_SIZE, STUDENT_LAYERS, seed=2), tiny_llama(TEACHER_SIZE, TEACHER_LAYERS, seed=1)
    for name in ("train_dataset", "eval_dataset"):
        with pytest.raises(ValueError, match=f"^{name} holds teacher_ranges, because the teacher reads other tokens"):
            KavaTrainer(*models, args=arguments(tmp_path), data_collator=dict, **{name: data})


@pytest.mark.parametrize("names", [("train_dataset",), ("eval_dataset",), ("eval_dataset", "own")])
def test_examples_without_what_the_teacher_reads_are_refused(tmp_path, names):
    both = encode(Dataset.from_list(ROWS), byte_level(), 64, teacher_tokenizer=sentence_pieces())
    alone = encode(Dataset.from_list(ROWS), byte_level(), 64)
    given = {"train_dataset": both, names[0]: {names[1]: alone} if names[1:] else alone}
    models = tiny_llama(STUDENT_SIZE, STUDENT_LAYERS, seed=2), tiny_llama(TEACHER_SIZE, TEACHER_LAYERS, seed=1)
    tokenizers = {"processing_class": byte_level(), "teacher_tokenizer": sentence_pieces()}
    with pytest.raises(ValueError, match=f"^{names[-1]} has no teacher_ranges, but teacher_tokenizer has other tokens"):
        KavaTrainer(*models, args=arguments(tmp_path), **tokenizers, **given)


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_mapping": "cka"},
        {"alignment_target": "relations"},
        {"alignment_target": "kv"},
        {"on_policy_fraction": 0.5, "kd_weight": 1.0},
    ],
)
def test_what_does_not_go_with_other_tokens_is_refused_in_a_script_too(tmp_path, changes):
    name = next(iter(changes))
    with pytest.raises(ValueError, match=f"^train_dataset holds teacher_ranges, .* {name} .*does not go with; write"):
        make_of_other_tokens(tmp_path, **changes)


@pytest.fixture
def pair(tmp_path):
    """A student of another tokenizer than the quickstart's, random and with few layers, and data."""
    folder = tmp_path / "student"
    tokenizer = byte_level(60, template=None)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **sizes).save_pretrained(folder)
    return {
        **QUICKSTART,
        **SHORT,
        "student_model_name_or_path": folder,
        "student_init": "random",
        "lm_weight": 1.0,
        "output_dir": tmp_path / "out",
        "final_dir": tmp_path / "out",
    }


def run(asked, **changes):
    return run_kava.main(words({**asked, **changes}))


def test_a_whole_run(pair, tmp_path, capsys):
    cache = tmp_path / "cache"
    assert run(pair, teacher_cache_dir=cache) == 0
    out, summary = capsys.readouterr().out, summary_of(tmp_path / "out")
    shares = summary["token_alignment"]
    assert shares["one_to_one"] + shares["merged"] + shares["left_out"] == pytest.approx(1)
    assert shares["merged"] > 0.1
    assert shares["left_out"] < 0.05
    assert f"{100 * shares['one_to_one']:.1f} % are aligned one to one" in out
    weight = KavaTrainingArguments.mercator_weight
    assert f"so the defaults here are mercator_weight {weight:g}, kd_weight 0" in out
    assert (summary["arguments"]["mercator_weight"], summary["arguments"]["kd_weight"]) == (weight, 0)
    teacher = summary["evaluation"]["teacher"]["perplexity"]
    assert teacher < 3  # it reads its own tokens, and knows these problems
    assert math.isfinite(summary["evaluation"]["student_after"]["perplexity"])
    assert summary["final"]["cos_sim"] is not None
    folder = tmp_path / "out" / "final_student"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == byte_level(60, template=None).get_vocab()
    prompt = tokenizer("Question: 1 + 1?", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=3).shape[1] == prompt["input_ids"].shape[1] + 3
    second = {"output_dir": tmp_path / "second", "final_dir": tmp_path / "second", "kd_weight": 0.5}
    assert run(pair, teacher_cache_dir=cache, **second) == 0
    out = capsys.readouterr().out
    assert "0 of 72 examples are to be written" in out
    assert "the defaults here" not in out
    assert "kd 0.5" in out


@pytest.mark.estimate
def test_a_padding_token_that_the_teacher_does_not_have(pair):
    folder = pair["student_model_name_or_path"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<extra {n}>" for n in range(600)])
    tokenizer.pad_token = "<extra 599>"
    tokenizer.save_pretrained(folder)
    LlamaConfig.from_pretrained(folder, vocab_size=len(tokenizer)).save_pretrained(folder)
    assert run(pair, run_control=False, evaluate_generation=True, per_device_eval_batch_size=8) == 0


def test_doctor_and_evaluate_know_both_tokenizers(pair, tmp_path, capsys):
    assert cli.main(["doctor", *words(pair)]) == 0
    out = capsys.readouterr().out
    assert "others than the teacher's" in out
    assert "% are aligned one to one" in out
    assert not (tmp_path / "out").exists()
    assert run(pair, run_control=False, evaluate_generation=False) == 0
    teacher = summary_of(tmp_path / "out")["evaluation"]["teacher"]["cross_entropy"]
    assert cli.main(["evaluate", str(tmp_path / "out"), "--output", str(tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())["evaluation"]
    assert figures["teacher"]["cross_entropy"] == pytest.approx(teacher)


def test_a_streamed_run(pair, tmp_path, capsys):
    lines = "\n".join(json.dumps({"question": f"1 + {n}?", "answer": f"{n + 1}"}) for n in range(80))
    folder = write_dataset(tmp_path, lines)
    asked = {**pair, "dataset_name": folder, "streaming": True, "run_control": False}
    assert run(asked) == 0
    assert "% are aligned one to one" in capsys.readouterr().out
    assert summary_of(tmp_path / "out")["token_alignment"]["tokens"] > 0


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("on_policy_fraction", 0.5, "on_policy_fraction is 0.5, but the tokenizers of teacher and student differ"),
        ("student_init", "teacher_layers", "which takes the teacher's embeddings over, but the tokenizer of"),
    ],
)
def test_what_other_tokens_do_not_allow_is_refused(pair, capsys, name, value, told):
    assert run(pair, **{name: value}) == 2
    assert told in capsys.readouterr().err
