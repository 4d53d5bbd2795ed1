"""What the log of a run says of its data."""

import copy
import json

import pytest
from helpers.programs import words

from kava_trainer.config.arguments import KavaTrainingArguments
from kava_trainer.config.parser import parse_arguments
from kava_trainer.runs import setup
from kava_trainer.utils.console import Console

TEMPLATE = "{{ strftime_now('%Y') }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture
def log(tmp_path, tokenizer, capsys):
    """What `load_data` prints for some rows."""

    def load(rows, template=TEMPLATE, **changes):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        asked = {
            "teacher_model_name_or_path": "quickstart",
            "student_model_name_or_path": "quickstart",
            "use_cpu": True,
        }
        asked |= {"dataset_name": path, "output_dir": tmp_path / "out", "max_steps": 1, **changes}
        own = copy.deepcopy(tokenizer)
        own.chat_template = template
        setup.load_data(Console(plain=True), parse_arguments(words(asked)), own)
        return capsys.readouterr().out

    return load


def talk(**more):
    return {"messages": [{"role": "user", "content": "2+3?", **more}, {"role": "assistant", "content": "5"}]}


@pytest.mark.parametrize("changes", [{}, {"streaming": True, "max_eval_samples": 5}])
def test_what_is_not_read_is_told(log, changes):
    shown = log([talk() | {"id": 1, "source": "x"} for _ in range(20)] + [talk(name="Ann") | {"id": 1}], **changes)
    assert "\nNothing reads the columns id, source.\n" in shown
    assert "\nThe chat template writes today's date, for which 26 Jul 2024 stands on any day.\n" in shown
    assert f"Warning: In 1 of {16 if changes else 20} training rows the chat template leaves out" in shown
    assert "name of user messages. Line 21 of" in shown
    assert "The teacher's chat template" not in shown


@pytest.mark.parametrize("changes", [{}, {"streaming": True, "max_eval_samples": 5}])
def test_a_template_that_is_not_used_is_told(log, changes):
    rows = [{"question": f"{n}+1?", "answer": f"{n + 1}"} for n in range(20)]
    told = "Warning: The teacher's chat template is not used, for the data is no chat: an instruct teacher is asked"
    assert told in log(rows, **changes)
    assert told not in log(rows, None, **changes)
    told = "Warning: assistant_turns has no effect on data that is no chat."
    assert told in log(rows, None, assistant_turns="all", **changes)
    assert told not in log([talk()] * 20, assistant_turns="all", **changes)


@pytest.mark.parametrize(("changes", "told"), [
    ({}, ""),
    ({"alignment_schedule": "linear"}, " (alignment: linear to 0)"),
    ({"kd_schedule": "linear"}, ""),
    ({"kd_schedule": "cosine", "kd_weight": 1.0}, " (kd: cosine from 0)"),
    (
        {"alignment_schedule": "stage", "kd_schedule": "stage", "kd_weight": 1.0},
        " (alignment: the first half, kd: the second half)",
    ),
])  # fmt: skip
def test_what_becomes_of_the_weights_is_told(tmp_path, changes, told):
    training = KavaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **changes)
    assert setup._describe_schedules(training) == told
