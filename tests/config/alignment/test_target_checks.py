"""Weights and shapes that do not go with what is aligned are refused in a sentence each, whoever wrote them."""

import pytest
from helpers.programs import QUICKSTART, words

from kava_trainer.config.arguments import KavaTrainingArguments
from kava_trainer.config.parser import parse_arguments
from kava_trainer.utils.errors import BadRequest, WrongArguments


def asked(tmp_path, **options):
    return parse_arguments(words({**QUICKSTART, "output_dir": tmp_path, "use_cpu": True, **options}))


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"relations_weight": 5}, "relations_weight"),
        ({"alignment_target": "relations", "attention_weight": 5}, "attention_weight"),
        ({"alignment_target": "kv", "attention_weight": 5}, "attention_weight"),
        ({"alignment_target": "attention", "mercator_weight": 3}, "mercator_weight"),
    ],
)
def test_a_written_weight_that_nothing_reads_is_refused(tmp_path, options, refused):
    with pytest.raises(BadRequest, match=rf"{refused} is above 0, but alignment_target .* write alignment_target"):
        asked(tmp_path, **options)


@pytest.mark.parametrize("options", [{"relations_weight": 0}, {"alignment_target": "relations", "mercator_weight": 0}])
def test_a_written_weight_of_zero_asks_for_nothing(tmp_path, options):
    assert asked(tmp_path, **options).training.aligns


@pytest.mark.parametrize("target", ["relations", "attention", "kv"])
def test_a_rank_is_refused_once_for_what_are_no_hidden_states(tmp_path, target):
    with pytest.raises(WrongArguments) as caught:
        KavaTrainingArguments(str(tmp_path), use_cpu=True, alignment_target=target, projector_rank=4)
    assert [(problem.argument, problem.remedy) for problem in caught.value.problems] == [
        ("projector_rank", "leave it out.")
    ]
