"""What a repository on the hub receives of a finished run, and sending it in one commit."""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import are_progress_bars_disabled, get_session, hf_raise_for_status, tqdm, validate_repo_id

from ..distillation.projector_files import export_projector_file
from ..trainer.final_student import FINAL_PROJECTOR
from ..utils.console import Console, size_text
from ..utils.errors import BadRequest, Interrupted, RunFailed, exit_code
from ..utils.hub import ANSWER_SECONDS, Place, check_private, hub_reason, in_time, make_branch, push_command, show_bars
from ..utils.redaction import without_secrets
from ..utils.signals import WATCH
from .card_snippets import PROJECTOR_FOLDER
from .model_card import is_untouched, render_model_card
from .recipe import RECIPE_FILE, recipe_text
from .summary import REPORT_PAGE, REPORT_PICTURE, SUMMARY_FILE, Summary, write_text

CARD_FILE = "README.md"

STUDENT_SECONDS, SLOWEST_BYTES = 3600, 10**6
"""How long the hub may take for a finished student: an hour, and as long as it takes at so many bytes a second."""

_REPLACED = (
    "*.safetensors", "*.safetensors.index.json", "pytorch_model*", "adapter_config.json", f"{PROJECTOR_FOLDER}/*",
    REPORT_PAGE, REPORT_PICTURE,
)  # fmt: skip
"""What an earlier push has left is deleted where this one does not bring it: transformers would load a student's old
weights, or put an old adapter on it."""


@dataclass(frozen=True)
class Repository:
    """A repository on the hub."""

    place: Place
    """With the repository's full name."""
    url: str
    was_there: bool
    """Whether it was there before."""


def make_repository(place: Place, student: Path, output_dir: str | Path) -> Repository:
    """Make the repository where it is missing. A name without an owner is that of the token's user.

    Raises:
        BadRequest: if the name cannot be that of a repository, or a public one is there and a private one is wanted.
        RunFailed: if the hub does not make it.
    """

    def make() -> Repository:
        api = HfApi(token=place.token)
        name = place.repo_id if "/" in place.repo_id else f"{api.whoami()['name']}/{place.repo_id}"
        was_there = api.repo_exists(name)
        made = api.create_repo(name, private=place.private, exist_ok=True)
        found = replace(place, repo_id=made.repo_id)
        check_private(found)
        url = f"{made}/tree/{quote(place.revision, safe='')}" if place.revision else str(made)
        return Repository(found, url, was_there)

    try:
        validate_repo_id(place.repo_id)
        return in_time(make, ANSWER_SECONDS)
    except BadRequest:
        raise
    except HFValidationError as error:
        raise BadRequest(
            f"{place.repo_id!r} cannot be the name of a repository; write owner/name, of letters, digits, '-', '_' and "
            "'.'."
        ) from error
    except Exception as error:  # the network fails in many ways
        raise RunFailed(not_sent(place, student, output_dir, error)) from error


def write_card(student: Path, name: str, summary: Summary, revision: str | None = None) -> bool:
    """Write the model card into the student's folder; False where somebody has changed the one that is there."""
    path = student / CARD_FILE
    if path.is_file() and not is_untouched(path.read_text(encoding="utf-8")):
        return False
    write_text(path, render_model_card(name, summary, revision))
    return True


def gather(output_dir: str | Path, student: Path, summary: Summary, place: Place, staging: Path) -> dict[str, Path]:
    """The files that a repository receives, by their paths in it. Nothing local is changed.

    Args:
        output_dir: of the run.
        student: the folder of the finished student; its `final_projector.pth` is beside it.
        summary: of the run.
        place: where they go.
        staging: an empty folder for what is made for the hub alone.
    """
    files = {
        path.relative_to(student).as_posix(): path
        for path in sorted(student.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(student).parts)
    }
    for name in (SUMMARY_FILE, REPORT_PAGE):
        if (path := Path(output_dir) / name).is_file():
            files[name] = _clean(path, staging)
    if (picture := Path(output_dir) / REPORT_PICTURE).is_file():
        files[REPORT_PICTURE] = picture
    projector, folder = student.parent / FINAL_PROJECTOR, staging / PROJECTOR_FOLDER
    has_projector = projector.is_file() and export_projector_file(projector, folder)
    if has_projector:
        files |= {f"{PROJECTOR_FOLDER}/{path.name}": path for path in sorted(folder.iterdir())}
    files[RECIPE_FILE] = _staged(staging / RECIPE_FILE, without_secrets(recipe_text(summary)))
    own = files.get(CARD_FILE)
    if own is None or is_untouched(own.read_text(encoding="utf-8")):
        card = render_model_card(place.repo_id, summary, place.revision, REPORT_PICTURE in files, has_projector)
        files[CARD_FILE] = _staged(staging / CARD_FILE, card)
    return files


def _staged(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def _clean(path: Path, staging: Path) -> Path:
    """A text file as it is; a copy of it where it holds what is a secret here."""
    text = path.read_text(encoding="utf-8")
    clean = without_secrets(text)
    return path if clean == text else _staged(staging / path.name, clean)


def publish(
    console: Console, output_dir: str | Path, student: Path, summary: Summary, place: Place, bars: bool = True
) -> str | None:
    """Send a finished run to its repository, which must be there, in one commit.

    A failure harms nothing: all of it is on disk, and the repository is as it was.

    Args:
        console: says what is sent.
        output_dir: of the run.
        student: the folder of the finished student.
        summary: of the run.
        place: where to.
        bars: show progress bars.

    Returns:
        None if it worked, else sentences with the reason and the command that tries again.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="kava-push-") as staging, _bars(bars):
            files = gather(output_dir, student, summary, place, Path(staging))
            size = sum(path.stat().st_size for path in files.values())
            console.print(f"Sending {len(files)} files, {size_text(size)}, to {place.repo_id}")
            if files[CARD_FILE].parent == student:
                console.print(f"{student / CARD_FILE} was changed by hand, so it is sent as it is.")
            in_time(lambda: _commit(files, size, place), STUDENT_SECONDS + size // SLOWEST_BYTES)
    except Exception as error:  # the network fails in many ways; all of them are told, none may harm the run
        return not_sent(place, student, output_dir, error)
    return None


def push_run(output_dir: str, student: Path, summary: Summary, place: Place) -> int:
    """Send the student of a run that was completed to the hub, and tell of it.

    Args:
        output_dir: of the run.
        student: the folder of the finished student.
        summary: of the run.
        place: where it is sent.

    Returns:
        0 when it was sent, 130, 143 or 138 when Ctrl-C, SIGTERM or SIGUSR1 ended it.

    Raises:
        BadRequest: as `make_repository`.
        RunFailed: if the hub did not take it; what is on disk is as it was.
    """
    console = Console()
    try:
        with WATCH:
            repository = make_repository(place, student, output_dir)
            place = repository.place
            if repository.was_there:
                console.print(f"{place.repo_id} is there already: files of the same names are replaced in it.")
            problem = publish(console, output_dir, student, summary, place)
    except Interrupted as interruption:
        print(f"Interrupted. Push again with: {push_command(output_dir, place)}", file=sys.stderr)
        return exit_code(interruption.number)
    if problem is not None:
        raise RunFailed(problem)
    console.print(f"Pushed to {place.repo_id}{' (private)' if place.private else ''}: {repository.url}")
    return 0


def not_sent(place: Place, student: Path, output_dir: str | Path, error: Exception) -> str:
    """The sentences for a student that the hub did not take."""
    return (
        f"The student could not be sent to {place.repo_id} ({hub_reason(error)}). It is whole in {student}; push it "
        f"again with: {push_command(output_dir, place)}"
    )


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Show the bars of the hub's client within the `with` block, or do not."""
    were_on = show_bars(shown)
    try:
        yield
    except BaseException:
        if not are_progress_bars_disabled():
            print(file=sys.stderr)  # whatever is said next would stand behind a bar that was broken off
        raise
    finally:
        show_bars(were_on)


def check_card(path: Path) -> None:
    """Let the hub look at a card's metadata before anything is uploaded. Raises `ValueError` for what it refuses.

    `ModelCard.validate` asks huggingface.co for it, whatever hub is meant (read in huggingface_hub 1.33).
    """
    asked = {"repoType": "model", "content": path.read_text(encoding="utf-8")}
    answer = get_session().post(f"{HfApi().endpoint}/api/validate-yaml", json=asked)
    if answer.status_code == 400:
        said = "; ".join(str(error.get("message")) for error in answer.json().get("errors", []))
        raise ValueError(f"it does not take the metadata of {path.name}: {said or 'it does not say why'}")
    hf_raise_for_status(answer)


def _commit(files: dict[str, Path], size: int, place: Place) -> None:
    """Upload the large files one by one, then bring everything into the repository at once.

    `upload_folder` would make several commits of a large folder, and its threads would keep a process whose hub never
    answers from ending.
    """
    api = HfApi(token=place.token)
    check_card(files[CARD_FILE])
    make_branch(place)
    additions = [CommitOperationAdd(name, path) for name, path in files.items()]
    there = api.list_repo_files(place.repo_id, revision=place.revision)
    deletions = [CommitOperationDelete(name) for name in there if name not in files and _is_replaced(name)]
    with cast(Any, tqdm)(total=size, unit="B", unit_scale=True, desc="Sent") as bar:
        for addition in additions:
            api.preupload_lfs_files(place.repo_id, [addition], revision=place.revision, free_memory=False)
            bar.update(addition.upload_info.size)
        api.create_commit(
            place.repo_id, [*deletions, *additions], commit_message="Distilled student", revision=place.revision
        )


def _is_replaced(name: str) -> bool:
    return any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in _REPLACED)
