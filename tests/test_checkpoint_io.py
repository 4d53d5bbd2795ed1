import json

import pytest
import torch
from safetensors.torch import save_file

from kava_trainer.checkpoint_io import (
    PROJECTOR_FILE,
    TRAINER_STATE_FILE,
    find_newest_checkpoint,
    is_whole,
    list_checkpoints,
    resolve_checkpoint,
    write_atomically,
    write_folder_atomically,
)
from kava_trainer.errors import BadRequest


def make_checkpoint(folder, step, files=("trainer_state.json", "projector.pth")):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    for file in files:
        (path / file).write_text('{"global_step": 1}')
    return path


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, lambda temporary: temporary.write_text("old"))

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_failed_folder_leaves_the_old_folder(tmp_path):
    path = tmp_path / "folder"
    write_folder_atomically(path, lambda staging: (staging / "a").write_text("old"))

    def fail(staging):
        (staging / "a").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_folder_atomically(path, fail)
    assert (path / "a").read_text() == "old"
    write_folder_atomically(path, lambda staging: (staging / "b").write_text("new"))
    assert [entry.name for entry in path.iterdir()] == ["b"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_the_newest_complete_checkpoint_is_found(tmp_path):
    assert find_newest_checkpoint(tmp_path) is None
    for step in (9, 10):
        make_checkpoint(tmp_path, step)
    make_checkpoint(tmp_path, 11, files=("projector.pth",))
    make_checkpoint(tmp_path, "final")
    assert find_newest_checkpoint(tmp_path).name == "checkpoint-10"
    assert [folder.name for folder in list_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in (9, 10, 11)]
    assert resolve_checkpoint("true", tmp_path).name == "checkpoint-10"


def test_resuming_from_nothing_starts_afresh_but_a_wrong_name_is_refused(tmp_path):
    assert resolve_checkpoint("true", tmp_path) is None
    assert resolve_checkpoint(None, tmp_path) is None
    assert resolve_checkpoint("false", tmp_path) is None
    with pytest.raises(BadRequest, match="not a folder"):
        resolve_checkpoint(str(tmp_path / "gone"), tmp_path)
    with pytest.raises(BadRequest, match="lacks"):
        resolve_checkpoint(str(make_checkpoint(tmp_path, 1, files=())), tmp_path)


def whole(folder):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"w": torch.zeros(2)}, folder / "model.safetensors")
    (folder / TRAINER_STATE_FILE).write_text('{"global_step": 1}')
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", PROJECTOR_FILE):
        torch.save({}, folder / name)
    return folder


def test_a_checkpoint_with_all_its_parts_is_whole(tmp_path):
    assert is_whole(whole(tmp_path))
    index = {"weight_map": {"w": "model-1.safetensors"}}
    (tmp_path / "model.safetensors").rename(tmp_path / "model-1.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert is_whole(tmp_path)
    (tmp_path / "model-1.safetensors").unlink()
    assert not is_whole(tmp_path)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", PROJECTOR_FILE, TRAINER_STATE_FILE]
)
def test_a_checkpoint_that_lacks_a_part_or_was_cut_short_is_not_whole(tmp_path, name):
    path = whole(tmp_path) / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert not is_whole(tmp_path)
    path.unlink()
    assert not is_whole(tmp_path)
