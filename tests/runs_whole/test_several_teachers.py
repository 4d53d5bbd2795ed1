"""Several teachers for one student: a training learns from all, goes on bit-equal, and leaves a plain student."""

import json
from functools import partial

import pytest
import torch
from datasets import Dataset
from helpers.hashes import weight_hash
from helpers.library import DATA, EVERY_STEP, arguments, make, new_student, new_teacher
from helpers.models import tiny_llama
from helpers.other_tokens import ROWS
from helpers.outcomes import assert_same_step
from helpers.processes import Run
from helpers.programs import QUICKSTART, SHORT, summary_of, words
from helpers.several import make_reading, new_teachers, step
from helpers.small_tokenizers import byte_level, sentence_pieces
from helpers.trainers import loss_lines
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import run_kava
from kava_trainer import KavaTrainer, cli, encode, write_report
from kava_trainer.distillation.teachers.several import SeveralTeachers

byte_level_of_more = partial(byte_level, 40)

WAYS = {
    "fixed": {"teachers": [{"weight": 2}, {"layers": "uniform:2"}]},
    "routed, with logits": {"teacher_routing": "agreement", "kd_weight": 1.0},
    "relations": {"alignment_target": "relations", "layer_mapping": "uniform:2"},
    "kv": {"alignment_target": "kv", "layer_mapping": "all", "kd_weight": 0.5},
}


def trainer_of(folder, tokenizer, given=None, **changes):
    return make(folder, tokenizer, {"teacher": new_teachers(), **(given or {})}, **changes)


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


READERS = {
    "second": (byte_level, [byte_level, sentence_pieces]),
    "first": (byte_level, [sentence_pieces, byte_level]),
    "both": (byte_level, [sentence_pieces, byte_level_of_more]),
}


@pytest.mark.parametrize("readers", READERS.values(), ids=READERS)
def test_teachers_may_read_other_tokens(tmp_path, readers):
    student, others = readers[0](), [own() for own in readers[1]]
    ways = {"padded": {"max_tokens_per_batch": 0}, "packed": {}, "small": {"per_device_train_batch_size": 2}}
    lines = {}
    for name, changes in ways.items():
        steps = {"gradient_accumulation_steps": 4 if name == "small" else 2}
        trainer = make_reading(tmp_path / name, student, others, max_steps=3, **steps, **changes)
        trainer.train()
        lines[name] = loss_lines(trainer)
    for name in ("packed", "small"):
        for line, expected in zip(lines[name], lines["padded"], strict=True):
            for figure in ("loss", "mercator_loss", "cos_sim", "teacher1_cos_sim", "teacher2_cos_sim", "kd_loss"):
                assert line[figure] == pytest.approx(expected[figure], rel=1e-3), (name, figure)
    whole, again = (make_reading(tmp_path / "resumed", student, others, **EVERY_STEP) for _ in range(2))
    whole.train()
    again.train(str(tmp_path / "resumed" / "checkpoint-1"))
    assert weight_hash(again.model) == weight_hash(whole.model)


def test_a_teacher_of_other_tokens_counts_as_it_does_alone(tmp_path):
    """Beside one of the student's own tokens, at the tokens that both have something to say of."""
    student, other = byte_level(), sentence_pieces()
    settings = {"max_steps": 1, "learning_rate": 0.0, "projector_learning_rate": 0.0, "lm_weight": 0.0}
    both = make_reading(tmp_path / "both", student, [student, other], **settings)
    both.train()
    data = encode(Dataset.from_list(ROWS), student, 64, teacher_tokenizer=other)
    alone = KavaTrainer(
        new_student(),
        new_teachers()[1],
        both.target.parts[1],
        arguments(tmp_path / "alone", kd_weight=0.5, **settings),
        train_dataset=data,
        processing_class=student,
        teacher_tokenizer=other,
    )
    alone.train()
    assert loss_lines(both)[0]["teacher2_cos_sim"] == pytest.approx(loss_lines(alone)[0]["cos_sim"], rel=1e-4)


def test_two_ranks_take_the_step_of_one_process(tmp_path):
    steps = []
    for ranks, batch_size, accumulation in ((1, 8, 1), (2, 2, 2)):
        output = tmp_path / f"{ranks}x{batch_size}x{accumulation}"
        run = Run(step, tmp_path, str(output), str(batch_size), str(accumulation), ranks=ranks)
        assert run.wait() == [0] * ranks, run.output()
        steps.append(torch.load(f"{output}.pt", weights_only=True))
    whole_batch, split = steps
    assert split["world_size"] == 2
    assert_same_step(split, whole_batch)


def test_routing_by_logits_of_other_tokens_is_refused(tmp_path):
    with pytest.raises(ValueError, match="teacher_routing agreement beside kd_weight does not go with; write fixed"):
        make_reading(tmp_path, byte_level(), [byte_level(), sentence_pieces()], teacher_routing="agreement")


@pytest.fixture
def asked(tmp_path):
    """A run with the quickstart's teacher and another one, which reads other tokens."""
    folder = tmp_path / "second"
    tokenizer = byte_level(60, template=None)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(**{**tiny_llama(48, 3).config.to_dict(), "vocab_size": len(tokenizer)})
    LlamaForCausalLM(config).save_pretrained(folder)
    named = [{"model": "quickstart", "weight": 2}, {"model": str(folder), "layers": "uniform:2"}]
    asked = {name: value for name, value in QUICKSTART.items() if not name.startswith("teacher_")}
    places = {"output_dir": str(tmp_path / "out"), "final_dir": str(tmp_path / "out")}
    return {**asked, **SHORT, **places, "teachers": json.dumps(named), "kd_weight": 0.5}


def run(asked, **changes):
    return run_kava.main(words({**asked, **changes}))


def test_a_run_with_caches_tells_of_both_teachers_and_resumes_bit_equal(tmp_path, asked, capsys):
    asked |= {"teacher_cache_dir": tmp_path / "cache", "save_steps": 2, "max_steps": 4}
    assert run(asked) == 0
    told = capsys.readouterr().out
    assert "Teacher 2: d_model=48, 3 layers" in told
    assert "teacher 1: (3, 4); teacher 2: (1, 1), (3, 3)" in told
    assert "The tokenizers of teacher 2 and student differ" in told
    assert "The states of teacher and teacher 2 come from there" in told
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"teacher1", "teacher2"}
    summary = summary_of(tmp_path / "out")
    assert summary["token_alignment"] is None
    assert summary["other_token_alignments"]["teacher 2"]["tokens"] > 0
    assert {pair["part"] for pair in summary["final"]["pairs"]} == {"teacher 1", "teacher 2"}
    last = weight_hash(AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final_student"))
    assert run(asked, resume_from_checkpoint=tmp_path / "out" / "checkpoint-2") == 0
    assert weight_hash(AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final_student")) == last
    assert "0 of 72 examples are to be written" in capsys.readouterr().out


def test_one_teacher_may_run_beside_the_cache_of_the_other(tmp_path, asked, capsys):
    named = json.loads(asked["teachers"])
    named[0]["cached"] = False
    cache = tmp_path / "cache"
    assert run(asked, teachers=json.dumps(named), teacher_cache_dir=cache, run_control=True) == 0
    assert [path.name for path in cache.iterdir()] == ["teacher2"]
    assert "The states of teacher 2 come from there" in capsys.readouterr().out


def test_the_doctor_looks_at_both_teachers(asked, capsys):
    assert cli.main(["doctor", *words(asked)]) == 0
    assert "Other teachers" in capsys.readouterr().out
    named = json.loads(asked["teachers"])
    named[1]["layers"] = "[[1, 9]]"
    assert cli.main(["doctor", *words({**asked, "teachers": json.dumps(named)})]) == 2


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teachers": [{"weight": 5}, {}]}, "There is 1 teacher, but teachers has 2 entries"),
        ({"teacher_routing": "agreement"}, "chooses among several teachers, and there is one"),
    ],
)
def test_what_is_for_several_is_refused_beside_one(tmp_path, tokenizer, changes, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, tokenizer, **changes)


@pytest.mark.parametrize("given", [sentence_pieces(), [sentence_pieces()]])
def test_tokenizers_are_counted_against_teachers(tmp_path, given):
    with pytest.raises(ValueError, match="teacher_tokenizer is 1 for 2 teachers; give a list with one for each"):
        make_reading(tmp_path, byte_level(), given)


def test_none_stands_for_the_students_own_tokens(tmp_path):
    trainer = make_reading(tmp_path, byte_level(), [None, sentence_pieces()], max_steps=1)
    trainer.train()
    assert trainer.train_dataset.column_names == ["input_ids", "labels", "teacher2_input_ids", "teacher2_ranges"]


def test_routing_by_logits_of_other_tokens_is_refused_whatever_holds_the_examples(tmp_path):
    made = make_reading(tmp_path, byte_level(), [byte_level(), sentence_pieces()])
    args = arguments(tmp_path, kd_weight=0.5, teacher_routing="agreement")
    tokenizers = {"processing_class": byte_level(), "teacher_tokenizer": [byte_level(), sentence_pieces()]}
    with pytest.raises(ValueError, match="teacher_routing agreement beside kd_weight does not go with; write fixed"):
        KavaTrainer(new_student(), new_teachers(), args=args, train_dataset=list(made.train_dataset), **tokenizers)


def test_a_report_of_a_script_names_all_teachers(tmp_path, tokenizer):
    trainer = trainer_of(tmp_path, tokenizer, teachers=[{"weight": 2}, {}], max_steps=1)
    trainer.train()
    assert "LlamaForCausalLM + LlamaForCausalLM" in write_report(trainer).read_text()


def test_a_student_that_is_one_of_the_teachers_is_refused(tmp_path, tokenizer):
    student = new_student()
    with pytest.raises(ValueError, match="one model"):
        KavaTrainer(student, [new_teacher(), student], args=arguments(tmp_path), train_dataset=Dataset.from_list(DATA))
