import json

import pytest
from datasets import Dataset
from helpers.trainers import FILES

from kava_trainer.config.arguments import KavaArguments, KavaTrainingArguments
from kava_trainer.config.data_arguments import DataArguments
from kava_trainer.config.model_arguments import ModelArguments
from kava_trainer.runs.identity import check_output_dir, check_resumable, compare, data_digest, run_identity
from kava_trainer.trainer.checkpoint import write_manifest
from kava_trainer.utils.atomic_files import publish, stage
from kava_trainer.utils.errors import BadRequest


def identity(tmp_path, data="d", **changes):
    model = ModelArguments(teacher_model_name_or_path="quickstart", student_model_name_or_path="quickstart")
    for name in [name for name in changes if hasattr(model, name)]:
        setattr(model, name, changes.pop(name))
    training = KavaTrainingArguments(**{"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", **changes})
    return run_identity(KavaArguments(model, DataArguments(dataset_name="quickstart"), training), data)


def checkpoint(folder, run, step=2):
    staging = stage(folder / f"checkpoint-{step}")
    for file in FILES:
        (staging / file).write_text("x")
    write_manifest(staging, run)
    publish(folder / f"checkpoint-{step}")
    return folder / f"checkpoint-{step}"


@pytest.mark.parametrize(("launched", "asked"), [("bf16", {"bf16": True}), ("no", {})])
def test_it_is_the_same_who_asks_for_a_precision(tmp_path, monkeypatch, launched, asked):
    there = identity(tmp_path, **asked)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert compare(there, identity(tmp_path)).incompatible == []
    other = "no" if launched == "bf16" else "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", other)
    before, now = (str(name == "bf16") for name in (launched, other))
    assert compare(there, identity(tmp_path)).incompatible == [f"bf16 was {before}, is {now}"]


def test_a_checkpoint_that_knows_no_precision_of_the_launcher_is_compared_by_the_arguments(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    here = identity(tmp_path)
    before = {name: value for name, value in here.items() if name != "mixed_precision"}
    assert compare(before, here).incompatible == []
    assert compare({**before, "bf16": True}, here).incompatible == ["bf16 was True, is False"]


def test_an_identity_is_plain_json_without_secrets_and_equal_to_itself(tmp_path):
    here = identity(tmp_path, hub_token="hf_planted")
    assert json.loads(json.dumps(here)) == here
    assert "hf_planted" not in json.dumps(here)
    found = compare(here, identity(tmp_path, hub_token="hf_other"))
    assert (found.incompatible, found.training, found.harmless) == ([], [], [])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"layer_mapping": "uniform:2"}, "layer_mapping was last, is uniform:2"),
        ({"teacher_quantization": "4bit"}, "teacher_quantization was none, is 4bit"),
        ({"teacher_model_name_or_path": "some/other"}, "teacher differs"),
        ({"data": "other"}, "data differs"),
        ({"seed": 7}, "seed was 42, is 7"),
        ({"use_peft": True}, "use_peft was False, is True"),
        ({"lora_r": 8}, "lora_r was 16, is 8"),
        ({"lora_target_modules": ["q_proj"]}, "lora_target_modules was all-linear, is .*q_proj.*"),
        ({"student_quantization": "4bit"}, "student_quantization was none, is 4bit"),
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size was 2, is 4"),
        ({"bf16": True}, "bf16 was False, is True"),
    ],
)
def test_another_run_is_not_resumed(tmp_path, changes, told):
    path = checkpoint(tmp_path, identity(tmp_path))
    with pytest.raises(BadRequest, match=rf"checkpoint-2 was written by another run: {told}\."):
        check_resumable(path, identity(tmp_path, **changes))


def test_another_number_of_processes_is_not_resumed(tmp_path):
    path = checkpoint(tmp_path, identity(tmp_path) | {"world_size": 4})
    with pytest.raises(BadRequest, match="world_size was 4, is 1"):
        check_resumable(path, identity(tmp_path))


def test_a_run_goes_on_with_a_teacher_that_is_held_in_another_way(tmp_path):
    there = identity(tmp_path)
    found = compare(there, {**there, "teacher_sharding": "fsdp"})
    assert (found.incompatible, found.training) == ([], [])
    assert found.harmless == ["teacher_sharding was auto, is fsdp"]
    before = {name: value for name, value in there.items() if name != "teacher_sharding"}
    assert compare(before, there) == compare(there, there)


def test_harmless_and_other_differences_are_named(tmp_path):
    path = checkpoint(tmp_path, identity(tmp_path))
    found = check_resumable(path, identity(tmp_path, logging_steps=5, max_steps=70, learning_rate=1e-4))
    assert found.harmless == ["logging_steps was 50, is 5"]
    assert found.training == ["learning_rate was 5e-05, is 0.0001", "max_steps was -1, is 70"]


def test_a_checkpoint_of_before_says_what_the_defaults_of_its_kind_of_student_would_change(tmp_path):
    before = identity(tmp_path)
    for name in ("relative_mse_weight", "kd_tokens", "lm_tokens"):
        assert before.pop(name) in (0.0, "answers")
    path = checkpoint(tmp_path, before)
    assert check_resumable(path, identity(tmp_path)).training == []
    found = check_resumable(path, identity(tmp_path, relative_mse_weight=15.0, kd_tokens="all"))
    assert found.training == ["kd_tokens was answers, is all", "relative_mse_weight was 0.0, is 15.0"]


def test_a_folder_with_checkpoints_of_a_different_run_is_left_alone(tmp_path):
    checkpoint(tmp_path, identity(tmp_path))
    (tmp_path / "checkpoint-9").mkdir()
    check_output_dir(tmp_path, identity(tmp_path, logging_steps=5), resuming=False)
    with pytest.raises(BadRequest, match=r"holds checkpoint-2 of a different run: learning_rate was 5e-05, is 0.01\."):
        check_output_dir(tmp_path, identity(tmp_path, learning_rate=0.01), resuming=False)
    check_output_dir(tmp_path, identity(tmp_path, learning_rate=0.01), resuming=True)
    with pytest.raises(BadRequest, match="different run: seed"):
        check_output_dir(tmp_path, identity(tmp_path, seed=1), resuming=True)


def test_a_trainer_used_as_a_library_writes_no_identity_and_is_resumed(tmp_path):
    found = check_resumable(checkpoint(tmp_path, None), identity(tmp_path))
    assert (found.incompatible, found.training, found.harmless) == ([], [], [])


def rows(*lengths):
    return [{"input_ids": list(range(n)), "labels": [-100] * (n - 1) + [n - 1], "answer_text": "x"} for n in lengths]


def test_the_digest_knows_tokens_labels_order_and_where_examples_end():
    data = Dataset.from_list(rows(3, 4, 5))
    assert data_digest(data) == data_digest(Dataset.from_list(rows(3, 4, 5)))
    assert data_digest(data) == data_digest(Dataset.from_list(rows(9, 3, 4, 5)).select([1, 2, 3]))
    others = [rows(4, 3, 5), rows(3, 4), [*rows(3, 4), {**rows(5)[0], "labels": [-100] * 5}]]
    assert len({data_digest(Dataset.from_list(other)) for other in (rows(3, 4, 5), *others)}) == 4
    joined = [{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3], "labels": [3]}]
    apart = [{"input_ids": [1], "labels": [1]}, {"input_ids": [2, 3], "labels": [2, 3]}]
    assert data_digest(Dataset.from_list(joined)) != data_digest(Dataset.from_list(apart))


def test_the_digest_knows_whose_tokens_they_are_where_a_student_wrote_some():
    written, sampled = ([{**row, "origins": [own] * len(row["input_ids"])} for row in rows(3, 4)] for own in (0, 2))
    digests = {data_digest(Dataset.from_list(own)) for own in (rows(3, 4), written, sampled)}
    assert len(digests) == 3


def test_the_name_of_a_file_of_answers_is_no_matter_but_their_share_is(tmp_path):
    there = identity(tmp_path, rollouts_from="own.jsonl", on_policy_fraction=0.5)
    moved = identity(tmp_path, rollouts_from="moved/own.jsonl", on_policy_fraction=0.5)
    assert compare(there, moved).harmless == ["rollouts_from was own.jsonl, is moved/own.jsonl"]
    assert compare(there, moved).training == compare(there, moved).incompatible == []
    other = identity(tmp_path, "other", rollouts_from="own.jsonl", on_policy_fraction=0.5)
    assert compare(there, other).incompatible == ["data differs"]
