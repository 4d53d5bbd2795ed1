"""Several teachers for one student: a training learns from all, goes on bit-equal, and leaves a plain student."""

import pytest
import torch
from datasets import Dataset
from helpers.hashes import weight_hash
from helpers.library import DATA, arguments, make, new_student, new_teacher
from helpers.models import tiny_llama
from helpers.trainers import loss_lines
from transformers import AutoModelForCausalLM

from kava_trainer import KavaTrainer
from kava_trainer.distillation.teachers.several import SeveralTeachers

WAYS = {
    "fixed": {"teachers": [{"weight": 2}, {"layers": "uniform:2"}]},
    "routed, with logits": {"teacher_routing": "agreement", "kd_weight": 1.0},
    "relations": {"alignment_target": "relations", "layer_mapping": "uniform:2"},
    "kv": {"alignment_target": "kv", "layer_mapping": "all", "kd_weight": 0.5},
}


def teachers():
    return [new_teacher(), tiny_llama(48, 3, seed=7)]


def trainer_of(folder, tokenizer, given=None, **changes):
    return make(folder, tokenizer, {"teacher": teachers(), **(given or {})}, **changes)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("settings", WAYS.values(), ids=WAYS)
def test_training_lowers_its_loss_and_resumes_bit_equal(tmp_path, tokenizer, settings, packed):
    steps = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "learning_rate": 3e-3}
    steps |= {"lr_scheduler_type": "cosine", "max_tokens_per_batch": 60 if packed else 0, "lm_weight": 0.5}
    straight, resumed = (trainer_of(tmp_path / n, tokenizer, **settings, **steps) for n in ("straight", "resumed"))
    term = straight.target.terms[0]
    frozen = [weight_hash(source.model) for source in straight.teacher.sources]
    before = straight.evaluate()
    straight.train()
    after = straight.evaluate()
    assert straight.batches.packs == packed
    assert after[f"eval_{term}_loss"] < 0.97 * before[f"eval_{term}_loss"]
    for number in (1, 2):
        assert after[f"eval_teacher{number}_cos_sim"] > before[f"eval_teacher{number}_cos_sim"]
    assert [weight_hash(source.model) for source in straight.teacher.sources] == frozen
    resumed.train(str(tmp_path / "straight" / "checkpoint-4"))
    assert weight_hash(resumed.model) == weight_hash(straight.model)
    assert loss_lines(resumed) == loss_lines(straight)
    routed = "teacher_routing" in settings
    assert all(("teacher_routing_entropy" in line) == routed for line in loss_lines(straight))
    assert all(("kd_routing_entropy" in line) == routed for line in loss_lines(straight))
    straight.save_finals(tmp_path / "final_student", tmp_path / "final_projector.pth")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final_student")
    ids = torch.arange(1, 9).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, straight.student.eval()(ids).logits)


def test_two_teachers_that_are_one_are_that_one(tmp_path, tokenizer):
    """Their projectors start from other random numbers, so none stands between."""
    settings = {"projector_direction": "none", "layer_mapping": "uniform:2", "kd_weight": 1.0, "max_steps": 3}
    student = {"student": tiny_llama(64, 2, seed=2)}
    alone = make(tmp_path / "one", tokenizer, {"student": tiny_llama(64, 2, seed=2)}, **settings)
    twice = make(tmp_path / "two", tokenizer, {"teacher": [new_teacher(), new_teacher()], **student}, **settings)
    for trainer in (alone, twice):
        trainer.train()
    for one, two in zip(loss_lines(alone), loss_lines(twice), strict=True):
        for name in ("loss", "mercator_loss", "kd_loss", "cos_sim", "grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-4), name


def test_the_loss_is_the_weighted_sum_of_that_with_each_teacher(tmp_path, tokenizer):
    settings = {"projector_direction": "none", "kd_weight": 1.0, "lm_weight": 0.0, "max_steps": 1, "learning_rate": 0.0}
    pair = [tiny_llama(64, 4, seed=1), tiny_llama(64, 3, seed=7)]

    def line(folder, teacher, **more):
        given = {"teacher": teacher, "student": tiny_llama(64, 2, seed=2)}
        trainer = make(tmp_path / folder, tokenizer, given, **settings, **more)
        trainer.train()
        return loss_lines(trainer)[0]

    first, second = line("first", pair[0]), line("second", pair[1])
    both = line("both", pair, teachers=[{"weight": 1}, {"weight": 3}])
    for name in ("mercator_loss", "kd_loss", "cos_sim", "loss"):
        assert both[name] == pytest.approx(0.25 * first[name] + 0.75 * second[name], rel=1e-4), name


def test_the_probe_measures_each_teacher_and_calls_a_planted_collapse(tmp_path, tokenizer):
    trainer = trainer_of(tmp_path, tokenizer, eval_strategy="steps", eval_steps=1, learning_rate=0.0)
    with torch.no_grad():
        for projector in trainer.target.parts[1].projectors:
            projector.down.weight.zero_()
    trainer.train()
    first, second = trainer.pair_figures()
    assert (first["part"], second["part"]) == ("teacher 1", "teacher 2")
    assert second["collapsed"]
    assert "teacher 2" in trainer.collapse


def test_both_projectors_are_calibrated(tmp_path, tokenizer):
    trainer = trainer_of(tmp_path, tokenizer, projector_init="least_squares", calibration_tokens=200)
    random = trainer_of(tmp_path, tokenizer)
    trainer.calibrate()
    before, after = random.run_probe(), trainer.run_probe()
    for was, now in zip(before.pairs, after.pairs, strict=True):
        assert now.cos_sim > was.cos_sim + 0.3


@pytest.mark.parametrize("changes", [{"lm_weight": 1.0, "mercator_weight": 0.0}, {"kd_weight": 1.0}])
def test_what_reads_no_teacher_needs_none_and_what_is_switched_on_later_is_read(tmp_path, tokenizer, changes):
    trainer = trainer_of(tmp_path, tokenizer, **changes)
    assert (trainer.teacher is None) == ("kd_weight" not in changes)
    trainer.args.mercator_weight = 1.0
    trainer.train()
    assert isinstance(trainer.teacher, SeveralTeachers)
    assert all("mercator_loss" in line for line in loss_lines(trainer))


def test_the_student_answers_itself_and_both_teachers_correct_it(tmp_path, tokenizer):
    settings = {"on_policy_fraction": 0.5, "on_policy_max_new_tokens": 4, "kd_weight": 1.0, "max_steps": 2}
    trainer = trainer_of(tmp_path, tokenizer, **settings)
    trainer.train()
    assert all({"rollout_agreement", "teacher2_cos_sim"} <= line.keys() for line in loss_lines(trainer))


@pytest.mark.parametrize(
    ("given", "changes", "message"),
    [
        ({}, {"teachers": [{}, {}, {}]}, "2 teachers, but teachers has 3"),
        ({}, {"layer_mapping": "cka"}, "cka chooses the layers of one teacher"),
        ({"teacher": [new_teacher(), "some/model"]}, {}, "The teacher 2 is a name"),
    ],
)
def test_what_does_not_go_with_several_is_refused(tmp_path, tokenizer, given, changes, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, tokenizer, given, **changes)


def test_a_student_that_is_one_of_the_teachers_is_refused(tmp_path, tokenizer):
    student = new_student()
    with pytest.raises(ValueError, match="one model"):
        KavaTrainer(student, [new_teacher(), student], args=arguments(tmp_path), train_dataset=Dataset.from_list(DATA))
