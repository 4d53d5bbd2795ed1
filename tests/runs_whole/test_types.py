"""The types of the library, as a user's own type checker sees them."""

import importlib.util
import re
import subprocess
import sys

import pytest
from helpers.places import ROOT

pytestmark = [
    pytest.mark.slow,  # all of torch is read first
    pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed"),
]

USER = """
import torch
from torch.utils.data import Dataset
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

from kava_trainer import (
    DistillationCollator,
    ElasticBottleneck,
    HiddenStateCapture,
    KavaTrainer,
    KavaTrainingArguments,
    ProjectorConfig,
    build_target,
    load_projectors,
    mercator_loss,
    metric_path,
)


def how_many(prediction: EvalPrediction) -> dict[str, float]:
    return {"examples": float(len(prediction.predictions))}


def distil(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    data: Dataset[dict[str, list[int]]],
    tokenizer: PreTrainedTokenizerBase,
) -> PreTrainedModel:
    args = KavaTrainingArguments(output_dir="out", max_steps=2, mercator_weight=2.0)
    trainer = KavaTrainer(
        student,
        teacher,
        build_target(args, student, teacher),
        args,
        train_dataset=data,
        data_collator=DistillationCollator(tokenizer),
        compute_metrics=how_many,
    )
    output = trainer.train()
    reveal_type(output.training_loss)
    reveal_type(trainer.student)
    reveal_type(trainer.args.mercator_weight)
    reveal_type(trainer.throughput())
    return trainer.student


def by_hand(student: PreTrainedModel, teacher: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> float:
    projector = ElasticBottleneck(ProjectorConfig(64, 32))
    capture = HiddenStateCapture(teacher, [2])
    with capture as states:
        teacher(ids)
    reveal_type(states)
    loss = mercator_loss(projector(states[2]), states[2], mask)
    reveal_type(loss)
    reveal_type(load_projectors("final_projector.pth"))
    reveal_type(metric_path())
    return loss.item()


mercator_loss("left", "right", None)
KavaTrainingArguments(mercator_wieght=2.0)
KavaTrainer("student")
"""


def check(*arguments):
    return subprocess.run([sys.executable, "-m", "mypy", *arguments], cwd=ROOT, capture_output=True, text=True).stdout


def test_the_package_passes_as_its_configuration_asks():
    assert check().startswith("Success"), check()


def test_a_typed_script_of_a_user_is_checked_against_real_types(tmp_path):
    script = tmp_path / "user.py"
    script.write_text(USER)
    told = check(str(script))  # as strict as the package itself
    lines = USER.splitlines()
    revealed = dict(re.findall(r"user\.py:(\d+): note: Revealed type is \"(.*)\"", told))
    types = {lines[int(number) - 1].strip(): kind for number, kind in revealed.items()}
    assert len(types) == 8
    for expression, kind in types.items():
        assert not re.search(r"\bAny\b", kind), f"{expression} is {kind}"
    assert types["reveal_type(trainer.student)"].endswith("PreTrainedModel")
    assert types["reveal_type(loss)"].endswith("Tensor")
    wrong = {lines[int(number) - 1] for number in re.findall(r"user\.py:(\d+): error", told)}
    assert wrong == set(lines[-3:]), told
