"""Whether the folders of a run can be written to and hold what it will save, found out before anything is loaded."""

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from transformers.trainer_utils import SaveStrategy

from .arguments import KavaTrainingArguments
from .console import size_text
from .engines import is_fsdp_asked
from .errors import BadRequest


def make_folder(name: str, path: str | Path) -> Path:
    """Make the folder that an argument names, and write to it to see whether that works.

    Permissions alone do not tell: root has all of them on a disk that is read-only. What is written is gone at once.

    Raises:
        BadRequest: if it cannot be made or written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadRequest(f"{name} {folder} cannot be made: {error.strerror}. Choose another folder.") from error
    _try_to_write(folder, f"{name} {folder} cannot be written to")
    return folder


def _try_to_write(folder: Path, problem: str) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"KAVA")
            file.flush()
    except OSError as error:
        raise BadRequest(f"{problem}: {error.strerror}. Choose another folder.") from error


def existing_folder(path: str | Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    absolute = Path(path).absolute()
    return next(folder for folder in (absolute, *absolute.parents) if folder.exists())


def check_folder(name: str, path: str | Path) -> None:
    """Find out what `make_folder` would, without making the folder.

    Raises:
        BadRequest: if it cannot be made or written to.
    """
    there, folder = existing_folder(path), Path(path)
    what = "be written to" if there == folder.absolute() else "be made"
    if not there.is_dir():
        raise BadRequest(f"{name} {folder} cannot be made: {there} is a file. Choose another folder.")
    _try_to_write(there, f"{name} {folder} cannot {what}")


def check_output_file(path: Path, is_own: Callable[[str], bool]) -> None:
    """Make sure, before any work is done, that the file of `--output` can be made and replaces nothing of the user's.

    Args:
        path: of the file.
        is_own: whether a text is what an earlier run of the same command has written; it may be replaced.

    Raises:
        BadRequest: if there is no folder for it, or something else is there.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise BadRequest(f"--output {path} cannot be written; name a file in a folder that exists.")
    _try_to_write(path.absolute().parent, f"--output {path} cannot be written")
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise BadRequest(f"--output {path} is no plain file, so it cannot be replaced; name another file.")
    if not path.exists() or is_own(_text_of(path)):
        return
    raise BadRequest(
        f"--output {path} is there already, and this command did not write it, so it is not replaced. Name another "
        "file, or delete it."
    )


def _text_of(path: Path) -> str:
    """The text of a file; nothing that is not UTF-8 is any command's own."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise BadRequest(f"--output {path} cannot be read: {error.strerror}. Name another file.") from error


@contextmanager
def no_empty_folders_if_refused(*paths: str | Path) -> Iterator[None]:
    """Where the request is refused, delete the folders that were not there before and are empty, and those above."""
    folders = _missing(paths)
    try:
        yield
    except BadRequest:
        _delete_empty(folders)
        raise


@contextmanager
def no_empty_folders(*paths: str | Path) -> Iterator[None]:
    """In the end delete the folders that were not there before and are empty, and those above, in any case."""
    folders = _missing(paths)
    try:
        yield
    finally:
        _delete_empty(folders)


def _missing(paths: Iterable[str | Path]) -> set[Path]:
    """Folders that are not there yet, among these and those above them."""
    return {folder for path in paths for folder in (Path(path), *Path(path).parents) if not folder.exists()}


def _delete_empty(folders: Iterable[Path]) -> None:
    for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
        if folder.is_dir() and not any(folder.iterdir()):
            with suppress(OSError):  # another process was quicker
                folder.rmdir()


def checkpoint_bytes(parts: Mapping[str, int], training: KavaTrainingArguments) -> int:
    """What one checkpoint takes on disk: student or its adapters, projectors, and optimizer where it is saved.

    Args:
        parts: of `estimate_memory`.
        training: says with `save_only_model` whether a checkpoint can be resumed from.
    """
    student = "adapter" if "adapter" in parts else "student"
    weights, optimizer = parts[student] + parts["projector"], 0 if training.save_only_model else parts["optimizer"]
    if is_fsdp_asked():  # the parts are one rank's, and the weights are written in shards and, once more, whole
        return training.world_size * (2 * weights + optimizer)
    return weights + optimizer


def check_space(parts: Mapping[str, int], training: KavaTrainingArguments) -> None:
    """Make sure that the disk of `output_dir` holds one more checkpoint, where any will be written.

    Args:
        parts: of `estimate_memory`.
        training: names `output_dir`, which need not exist yet.

    Raises:
        BadRequest: with both sizes, if it does not.
    """
    if training.save_strategy == SaveStrategy.NO:
        return
    needed, free = checkpoint_bytes(parts, training), shutil.disk_usage(existing_folder(training.output_dir)).free
    if needed <= free:
        return
    alone = needed - parts["optimizer"]
    all_is_needed = training.save_only_model or is_fsdp_asked()  # Trainer keeps save_only_model from sharded weights
    smaller = "" if all_is_needed or alone > free else f", set save_only_model true ({size_text(alone)})"
    raise BadRequest(
        f"One checkpoint takes {size_text(needed)}, but the disk of output_dir {training.output_dir} has only "
        f"{size_text(free)} free. Make room there, name an output_dir on a larger disk{smaller}, or write "
        "save_strategy no."
    )


def check_cache_space(folder: Path, needed: int) -> None:
    """Make sure that the disk of a cache, which need not exist yet, holds so many bytes. Raises `BadRequest` if not."""
    free = shutil.disk_usage(existing_folder(folder)).free
    if needed > free:
        raise BadRequest(
            f"The teacher cache would take {needed / 1e9:.2f} GB in {folder}, where {free / 1e9:.2f} GB are free. Name "
            "a folder on a larger disk, write teacher_cache_dtype int8, or map fewer layers."
        )
