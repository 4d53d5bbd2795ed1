"""The list of several teachers, and what does not go with it."""

import json

import pytest
from helpers.programs import words

from kava_trainer.config.alignment.teachers import TeacherChoice, cache_folders, other_teachers, read_teachers
from kava_trainer.config.parser import parse_arguments
from kava_trainer.utils.errors import BadRequest, WrongArguments

BASE = {"student_model_name_or_path": "quickstart", "dataset_name": "quickstart", "use_cpu": True}
TWO = [{"model": "quickstart", "weight": 2}, {"model": "org/b", "layers": [[1, 2]], "quantization": "4bit"}]


def parsed(tmp_path, **changes):
    file = tmp_path / "args.json"
    file.write_text(json.dumps({**BASE, "output_dir": str(tmp_path), **changes}))
    return parse_arguments([str(file)])


def test_the_first_stands_in_the_place_of_the_one_teacher(tmp_path):
    arguments = parsed(tmp_path, teachers=TWO)
    assert arguments.model.teacher_model_name_or_path == "quickstart"
    assert arguments.training.choices == [
        TeacherChoice("quickstart", 2),
        TeacherChoice("org/b", quantization="4bit", layers="[[1, 2]]"),
    ]
    (other,) = other_teachers(arguments)
    assert (other.teacher_name, other.teacher_quantization) == ("org/b", "4bit")
    assert other.student_model_name_or_path == arguments.model.student_model_name_or_path
    assert json.loads(arguments.to_dict()["teachers"]) == TWO


def test_the_record_of_a_run_is_read_again(tmp_path):
    """It has the list, and what the first of it stands for."""
    once = parsed(tmp_path, teachers=TWO)
    again = parsed(tmp_path, teachers=json.loads(once.to_dict()["teachers"]), teacher_model_name_or_path="quickstart")
    assert again.to_dict() == once.to_dict()


def test_null_in_an_entry_is_its_default(tmp_path):
    first, other = ({**own, "quantization": None, "dtype": None, "weight": None} for own in TWO)
    arguments = parsed(tmp_path, teachers=[first, other])
    assert arguments.training.choices == [TeacherChoice("quickstart"), TeacherChoice("org/b", layers="[[1, 2]]")]
    assert arguments.model.teacher_quantization == "none"


def test_a_command_line_gives_the_list_as_text(tmp_path):
    options = words({**BASE, "output_dir": tmp_path, "teachers": json.dumps(TWO)})
    assert len(parse_arguments(options).training.choices) == 2


def test_each_teacher_has_a_cache_of_its_own_unless_it_is_left_out(tmp_path):
    left = [{**TWO[0], "cached": False}, TWO[1]]
    for teachers, folders in ((TWO, {0: "teacher1", 1: "teacher2"}), (left, {1: "teacher2"})):
        training = parsed(tmp_path, teachers=teachers, teacher_cache_dir=str(tmp_path / "c")).training
        assert cache_folders(training) == {number: tmp_path / "c" / name for number, name in folders.items()}
    alone = parsed(tmp_path, teacher_model_name_or_path="quickstart", teacher_cache_dir=str(tmp_path / "c")).training
    assert cache_folders(alone) == {0: tmp_path / "c"}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "a"}, "Number 2 of teachers has the unknown key name; write one of model, weight"),
        ({"model": "a", "weight": 0}, "Number 2 of teachers has the weight 0; write a number above 0"),
        ({"model": "a", "weight": "2"}, 'Number 2 of teachers has the weight "2"; write a number above 0'),
        ({"model": "a", "weight": True}, "Number 2 of teachers has the weight true"),
        ({"model": 7}, "Number 2 of teachers has the model 7; write it in quotes"),
        ({"model": "a", "quantization": "3bit"}, "has the quantization 3bit; write one of none, 8bit, 4bit"),
        ({"model": "a", "dtype": "half"}, "has the dtype half; write one of auto"),
        ({"model": "a", "cached": "no"}, 'has cached "no"; write true or false'),
        ({"model": "a", "layers": "cka"}, 'has the layers "cka"; write last'),
        ({"model": "a", "layers": [[0, 1]]}, "has the layers [[0, 1]]; write last"),
        ({"model": "a", "layers": 5}, "has the layers 5; write last"),
        ({"model": "./nowhere"}, "teachers names"),
        ({}, "Number 2 of teachers names no model"),
    ],
)
def test_an_entry_that_is_wrong_is_named(tmp_path, entry, message):
    with pytest.raises(BadRequest) as refused:
        parsed(tmp_path, teachers=[TWO[0], entry])
    assert message in str(refused.value)


@pytest.mark.parametrize("given", ["quickstart", "[1, 2]", '[{"model": "a"}]', "{}", "[]"])
def test_what_is_no_list_of_two_is_refused(given):
    with pytest.raises(WrongArguments, match="write a list of two or more"):
        read_teachers(given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"teachers": TWO, "teacher_model_name_or_path": "org/c"},
            "is for one teacher, and teachers names several",
        ),
        ({"teachers": TWO, "teacher_quantization": "4bit"}, "teacher_quantization is for one teacher"),
        ({"teachers": TWO, "layer_mapping": "cka"}, "layer_mapping cka chooses the layers of one teacher"),
        ({"teachers": TWO, "layer_weights": [1]}, "layer_weights weighs the pairs of one teacher"),
        ({"teachers": TWO, "projector_rank": 4}, "projector_rank fits a bridge between a student and one teacher"),
        ({"teachers": TWO, "teacher_routing_temperature": 0}, "teacher_routing_temperature"),
        ({"teachers": TWO, "teacher_routing_temperature": 1e-9}, "write 0.0001 or more"),
        (
            {"teachers": [{**own, "cached": False} for own in TWO], "teacher_cache_dir": "c"},
            "teacher_cache_dir is given, but all of the teachers have cached false",
        ),
        (
            {"teachers": TWO, "on_policy_fraction": 0.5, "kd_weight": 1, "teacher_cache_dir": "c"},
            "teacher_cache_dir holds no states of what the student writes",
        ),
        (
            {"teacher_model_name_or_path": "quickstart", "teacher_routing": "agreement"},
            "teacher_routing agreement chooses among several teachers, and there is one; write teachers",
        ),
    ],
)
def test_what_does_not_go_with_several_teachers_is_refused(tmp_path, changes, message):
    with pytest.raises(BadRequest) as refused:
        parsed(tmp_path, **changes)
    assert message in str(refused.value)
