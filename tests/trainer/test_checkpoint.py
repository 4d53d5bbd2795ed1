import os

import pytest
from helpers.trainers import FILES

from kava_trainer.trainer import checkpoint
from kava_trainer.trainer.checkpoint import (
    MANIFEST_FILE,
    broken_reason,
    find_newest_checkpoint,
    list_checkpoints,
    read_manifest,
    resolve_checkpoint,
    rotate,
    sweep,
    write_manifest,
)
from kava_trainer.utils.atomic_files import discard, publish, stage, write_atomically, write_folder_atomically
from kava_trainer.utils.errors import BadRequest


def make_checkpoint(folder, step, files=FILES):
    path = folder / f"checkpoint-{step}"
    staging = stage(path)
    for file in files:
        (staging / file).write_text(f'{{"global_step": {step}}} {file}')
    write_manifest(staging, {"seed": 1})
    publish(path)
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


def test_the_newest_sound_checkpoint_is_found_and_the_broken_ones_are_named(tmp_path):
    assert find_newest_checkpoint(tmp_path).checkpoint is None
    for step in (9, 10, 11):
        make_checkpoint(tmp_path, step)
    make_checkpoint(tmp_path, "final")
    (tmp_path / "checkpoint-12").mkdir()
    (tmp_path / "checkpoint-11" / "optimizer.pt").unlink()
    found = resolve_checkpoint("true", tmp_path)
    assert found.checkpoint == tmp_path / "checkpoint-10"
    assert found.skipped == [
        (tmp_path / "checkpoint-12", f"it has no {MANIFEST_FILE}, so its save was cut off"),
        (tmp_path / "checkpoint-11", "optimizer.pt is missing"),
    ]
    assert [folder.name for folder in list_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in (9, 10, 11, 12)]


def test_resuming_from_nothing_starts_afresh_but_a_wrong_name_is_refused(tmp_path):
    for asked in ("true", "false", None):
        assert resolve_checkpoint(asked, tmp_path).checkpoint is None
    with pytest.raises(BadRequest, match="not a folder"):
        resolve_checkpoint(str(tmp_path / "gone"), tmp_path)
    with pytest.raises(BadRequest, match=r"cannot be resumed: it was saved without optimizer.pt and scheduler.pt\."):
        resolve_checkpoint(str(make_checkpoint(tmp_path, 1, files=FILES[:2])), tmp_path)


def test_the_manifest_lists_every_file_and_what_the_run_was(tmp_path):
    path = make_checkpoint(tmp_path, 3)
    content = read_manifest(path)
    assert content["run"] == {"seed": 1}
    assert set(content["files"]) == set(FILES)
    assert content["files"]["optimizer.pt"]["size"] == (path / "optimizer.pt").stat().st_size
    assert broken_reason(path) is None


@pytest.mark.parametrize("name", [*FILES, MANIFEST_FILE])
def test_a_flipped_bit_or_a_cut_in_any_file_is_found(tmp_path, name):
    path = make_checkpoint(tmp_path, 3) / name
    content = path.read_bytes()
    for position in range(0, len(content), max(1, len(content) // 97)):
        for bit in (0, 7):
            broken = bytearray(content)
            broken[position] ^= 1 << bit
            path.write_bytes(broken)
            assert broken_reason(path.parent) is not None, (position, bit)
    for length in (0, 1, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        assert broken_reason(path.parent) is not None, length
    path.unlink()
    assert broken_reason(path.parent) is not None
    path.write_bytes(content)
    assert broken_reason(path.parent) is None


def test_rotation_deletes_the_oldest_and_never_what_is_to_be_kept(tmp_path):
    for number, step in enumerate((7, 2, 3, 4)):
        os.utime(make_checkpoint(tmp_path, step), (number, number))
    rotate(tmp_path, None, [])
    rotate(tmp_path, 0, [])
    assert len(list_checkpoints(tmp_path)) == 4
    rotate(tmp_path, 2, [tmp_path / "checkpoint-7"])
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-7"]
    rotate(tmp_path, 1, [tmp_path / "checkpoint-7", tmp_path / "checkpoint-4"])
    assert len(list_checkpoints(tmp_path)) == 2
    assert not list(tmp_path.glob(".*"))


class Killed(BaseException):
    pass


def killed_at(monkeypatch, names, moment):
    """Count the calls of these functions and die in place of one of them; the number of calls where none died."""
    calls = []
    for owner, name in names:
        original = getattr(owner, name)

        def call(*args, original=original, **kwargs):
            calls.append(original)
            if len(calls) == moment:
                raise Killed
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)
    return calls


def test_a_process_that_dies_at_any_moment_of_a_save_leaves_the_former_or_the_new_one_whole(tmp_path, monkeypatch):
    import shutil

    points = [(os, "replace"), (os, "fsync"), (shutil, "rmtree"), (checkpoint, "write_manifest")]
    moment, died = 0, True
    while died:
        moment += 1
        folder = tmp_path / str(moment)
        make_checkpoint(folder, 1, FILES)
        make_checkpoint(folder, 2, FILES)
        with monkeypatch.context() as patch:
            calls = killed_at(patch, points, moment)
            try:  # checkpoint-2 is written once more, and checkpoint-1 goes
                path = folder / "checkpoint-2"
                staging = stage(path)
                for file in FILES:
                    (staging / file).write_text("newer")
                checkpoint.write_manifest(staging, None)
                publish(path)
                rotate(folder, 1, [path])
                died = False
            except Killed:
                pass
        sweep(folder)
        assert not list(folder.glob(".*"))
        found = find_newest_checkpoint(folder)
        assert found.checkpoint == folder / "checkpoint-2"
        assert not found.skipped
        assert all(broken_reason(left) is None for left in list_checkpoints(folder))
        if not died:
            assert read_manifest(folder / "checkpoint-2")["run"] is None
            assert not (folder / "checkpoint-1").exists()
    assert moment == len(calls) + 1 > 10


def test_sweeping_leaves_what_is_not_ours(tmp_path):
    names = (".git", ".my.previous", ".notes.12.tmp", ".checkpoint-x.staging", "checkpoint-1.staging")
    for name in names:
        (tmp_path / name).mkdir()
    for name in ("run_summary.json", "log_history.json", "report.html", "report.png"):
        (tmp_path / f".{name}.77.tmp").write_text("half")
    sweep(tmp_path)
    assert {entry.name for entry in tmp_path.iterdir()} == set(names)


def test_what_was_staged_can_be_given_up(tmp_path):
    stage(tmp_path / "checkpoint-1")
    discard(tmp_path / "checkpoint-1")
    discard(tmp_path / "checkpoint-1")
    assert not list(tmp_path.iterdir())
