"""Where the doctor advises a student's own answers, and where it advises against them."""

import json
import re

import pytest
from helpers.data import write_dataset
from helpers.programs import QUICKSTART, SHORT, words

from kava_trainer.cli import main
from kava_trainer.config.arguments import KavaTrainingArguments
from kava_trainer.runs.doctor.on_policy import OFTEN, SELDOM, own_answers_advice

NEXT_TOKENS = {"mercator_weight": 0.0, "kd_weight": 0.0}


@pytest.mark.parametrize(
    ("changes", "times", "said"),
    [
        ({}, OFTEN, "try on_policy_fraction 0.5"),
        ({}, OFTEN - 1, None),
        (NEXT_TOKENS, OFTEN, None),
        ({"on_policy_fraction": 0.5}, SELDOM, "write on_policy_fraction 0,"),
        ({"on_policy_fraction": 0.5}, SELDOM + 1, None),
        ({"on_policy_fraction": 0.5}, OFTEN, None),
        ({"on_policy_fraction": 1.0}, SELDOM, None),
        ({"on_policy_fraction": 0.5, "rollouts_from": "answers.jsonl"}, SELDOM, None),
    ],
)
def test_what_is_advised_follows_from_how_often_an_example_is_read(tmp_path, changes, times, said):
    training = KavaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **changes)
    problem = own_answers_advice(training, times)
    assert (problem is None) == (said is None)
    assert said is None or problem.remedy.startswith(said)


@pytest.mark.parametrize(
    ("rows", "advised"),
    [
        ([{"question": f"{n} + 1?", "answer": f"{n + 1}"} for n in range(60)], True),
        ([{"text": f"{n} and one are {n + 1}."} for n in range(60)], False),
    ],
    ids=["answers", "plain text"],
)
def test_only_rows_with_prompts_are_advised_on(tmp_path, capsys, rows, advised):
    data = write_dataset(tmp_path, "".join(json.dumps(row) + "\n" for row in rows))
    options = {**QUICKSTART, **SHORT, "dataset_name": data, "max_steps": 200, "max_length": 128, "warmup_steps": 1}
    main(["doctor", *words({**options, "output_dir": tmp_path / "out"})])
    assert bool(re.search(r"^Warning +Own answers: Each example is read", capsys.readouterr().out, re.M)) == advised
