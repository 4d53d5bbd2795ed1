import pytest

from kava_trainer.checkpoint_io import (
    find_newest_checkpoint,
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
