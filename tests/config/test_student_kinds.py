"""The defaults that depend on where a student comes from stand aside for whatever somebody wrote."""

import json
from typing import Any

import pytest
from helpers.programs import words
from transformers import LlamaConfig

from kava_trainer.config.arguments import KavaTrainingArguments
from kava_trainer.config.parser import parse_arguments
from kava_trainer.config.student_kinds import BY_START, defaults_for
from kava_trainer.reports.recipe import recipe_of
from kava_trainer.reports.summary import Summary

PLAIN = KavaTrainingArguments("out")


def parsed(tmp_path: Any, **given: Any) -> Any:
    base = {"teacher_model_name_or_path": "quickstart", "dataset_name": "quickstart", "output_dir": str(tmp_path)}
    return parse_arguments(words({**base, **given}))


def test_a_cut_student_is_compared_with_the_layers_it_came_from(tmp_path: Any) -> None:
    arguments = parsed(tmp_path, student_num_layers=3)
    for name, value in BY_START["teacher_layers"].items():
        assert getattr(arguments.training, name) == value
    assert arguments.by_kind == BY_START["teacher_layers"]
    assert not arguments.given & BY_START["teacher_layers"].keys()


def test_what_somebody_wrote_stays_also_where_it_is_the_plain_default(tmp_path: Any) -> None:
    training = parsed(tmp_path, student_num_layers=3, kd_weight=0.0, layer_mapping="last").training
    assert (training.kd_weight, training.layer_mapping) == (0.0, "last")
    assert training.relative_mse_weight == BY_START["teacher_layers"]["relative_mse_weight"]


@pytest.mark.parametrize("name", ["mercator_weight", "mse_weight", "relative_mse_weight"])
def test_beside_a_written_weight_of_the_alignment_there_is_no_other(tmp_path: Any, name: str) -> None:
    training = parsed(tmp_path, student_num_layers=3, **{name: 2.0}).training
    for other in {"mercator_weight", "mse_weight", "relative_mse_weight"} - {name}:
        assert getattr(training, other) == 0
    assert getattr(training, name) == 2.0
    assert training.layer_mapping == "inherited"


def test_a_weight_of_0_turns_the_alignment_off(tmp_path: Any) -> None:
    assert not parsed(tmp_path, student_num_layers=3, relative_mse_weight=0.0).training.aligns


def test_a_written_part_of_a_projector_brings_the_projector_with_its_own_defaults(tmp_path: Any) -> None:
    training, plain = parsed(tmp_path, student_num_layers=3, projector_init="random").training, PLAIN
    for name in ("projector_direction", "layer_mapping", "mercator_weight", "relative_mse_weight"):
        assert getattr(training, name) == getattr(plain, name)
    assert parsed(tmp_path, student_num_layers=3, projector_direction="none").training.layer_mapping == "inherited"


@pytest.mark.parametrize(
    "written",
    [
        {},
        {"kd_weight": 0.0, "layer_mapping": "last"},
        {"mercator_weight": 3.0, "projector_direction": "student_to_teacher"},
        {"projector_init": "random"},
    ],
)
def test_the_recipe_of_a_run_is_that_run(tmp_path: Any, written: dict[str, Any]) -> None:
    arguments = parsed(tmp_path, student_num_layers=3, **written)
    summary = Summary(arguments=json.loads(json.dumps(arguments.to_dict(), default=str)))
    again = parse_arguments(words({**recipe_of(summary), "output_dir": str(tmp_path)}))
    for name in (*BY_START["teacher_layers"], "projector_init", "projector_dropout", "student_num_layers"):
        assert (again.to_dict()[name], name) == (arguments.to_dict()[name], name)


def test_random_weights_learn_from_the_divergence_more_than_from_states(tmp_path: Any) -> None:
    config = tmp_path / "config"
    LlamaConfig().save_pretrained(config)
    for written in ({}, {"layer_mapping": "uniform:2"}, {"projector_init": "random"}):
        arguments = parsed(tmp_path, student_config_name=str(config), **written)
        assert arguments.by_kind == BY_START["random"]
        assert {name: getattr(arguments.training, name) for name in BY_START["random"]} == BY_START["random"]
    training = parsed(tmp_path, student_config_name=str(config), mse_weight=1.0).training
    assert (training.mercator_weight, training.mse_weight, training.kd_weight) == (PLAIN.mercator_weight, 1.0, 0.0)
    training = parsed(tmp_path, student_config_name=str(config), kd_weight=0.0).training
    assert (training.mercator_weight, training.kd_weight) == (PLAIN.mercator_weight, 0.0)
    training = parsed(tmp_path, student_config_name=str(config), kd_weight=0.5).training
    assert (training.mercator_weight, training.kd_weight) == (BY_START["random"]["mercator_weight"], 0.5)


def test_the_embedded_student_keeps_its_alignment(tmp_path: Any) -> None:
    arguments = parsed(tmp_path, student_model_name_or_path="quickstart")
    assert arguments.model.student_init == "random"
    assert arguments.by_kind == {}
    assert arguments.training.aligns


def test_each_default_names_an_argument() -> None:
    for defaults in BY_START.values():
        KavaTrainingArguments("out", **defaults)


def test_an_unknown_start_has_none() -> None:
    assert defaults_for("", {}) == {}
