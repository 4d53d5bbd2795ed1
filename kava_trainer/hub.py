"""The model card of a finished student, and sending the student to the hub."""

import logging
import shlex
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCardData
from huggingface_hub.errors import HFValidationError
from transformers.trainer_utils import HubStrategy

from .arguments import KavaArguments, KavaTrainingArguments
from .console import Console
from .errors import reason_of
from .redaction import without_secrets
from .source_arguments import QUICKSTART, ModelArguments

ANSWER_SECONDS, CHECKPOINT_SECONDS, STUDENT_SECONDS = 60, 600, 3600
"""How long the hub may take: to answer a question, to take the last checkpoints at the end of the training, and to
take the finished student. Its client waits for ever."""

FINAL_STUDENT = "final_student"
"""Folder of the finished student in `final_dir`."""

_CARD = """---
{metadata}
---

# {name}

Distilled with KAVA from `{teacher}` on `{dataset}`: a frozen teacher's hidden states are aligned with the student's
through a projector that is not part of this model.{trained}

```python
{loading}
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

| model | answer perplexity | exact match |
|---|---|---|
{rows}

Steps: {steps}. On held-out examples: CosSim {cos_sim}, centred {centred}, margin over other tokens' targets {margin},
CKA to the teacher {cka}.

Verdict of the run: {verdict}
"""

_PLAIN = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")"""

_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), "{name}")"""


_VERDICTS = {True: "success.", False: "**no success.**", None: "none."}


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


def _public_name(name: str | None) -> str | None:
    """A hub id as it is; a local path or the quickstart has no page on the hub."""
    return None if name is None or name == QUICKSTART or Path(name).exists() else name


def _training_of(model: ModelArguments) -> str:
    """What of the student was trained, where that is not all of it; a sentence with a space before it."""
    if not model.use_peft:
        return ""
    base = "" if model.student_quantization == "none" else f" in {model.student_quantization.replace('bit', ' bit')}"
    now = "this is the adapter alone" if model.exports_adapter else "it is merged into this model"
    return f" A LoRA adapter of rank {model.lora_r} was trained on the frozen student{base}; {now}."


def _loading(name: str, model: ModelArguments) -> str:
    """The code that loads the student."""
    if not model.exports_adapter:
        return _PLAIN.format(name=name)
    revision = f', revision="{model.student_revision}"' if model.student_revision else ""
    return _ADAPTER.format(name=name, base=f'"{model.student_model_name_or_path}"{revision}')


def render_model_card(name: str, arguments: KavaArguments, summary: dict[str, Any]) -> str:
    """The text of `README.md` for a finished student.

    Args:
        name: repository or folder of the student.
        arguments: what the run was asked for.
        summary: the content of `run_summary.json`.
    """
    measured = summary["evaluation"]["student_after"] or {}
    model, dataset = arguments.model, arguments.data.dataset_name
    results = [
        EvalResult("text-generation", dataset, Path(dataset).name, metric, value)
        for metric, value in measured.items()
        if value is not None
    ]
    student = _public_name(model.student_model_name_or_path)
    metadata = ModelCardData(
        model_name=name,
        base_model=student,
        base_model_relation=("adapter" if model.exports_adapter else "finetune") if student else None,
        datasets=[dataset] if _public_name(dataset) else None,
        library_name="peft" if model.exports_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["kava", "knowledge-distillation", *(["lora"] if model.use_peft else [])],
        eval_results=results or None,
    )
    rows = [
        f"| {who.replace('_', ' ')} | {_figure(figures['perplexity'])} | {_figure(figures['exact_match'])} |"
        for who, figures in summary["evaluation"].items()
        if figures is not None
    ]
    card = _CARD.format(
        metadata=metadata.to_yaml(),
        name=name,
        teacher=model.teacher_model_name_or_path,
        trained=_training_of(model),
        loading=_loading(name, model),
        dataset=dataset,
        rows="\n".join(rows) or "| none | not measured | not measured |",
        steps=summary["global_step"],
        cos_sim=_figure(summary["final"]["cos_sim"]),
        centred=_figure(summary["final"]["centred_cos_sim"]),
        margin=_figure(summary["final"]["margin"]),
        cka=_figure(summary["final"]["cka"]),
        verdict=" ".join([_VERDICTS[summary["verdict"]["success"]], *summary["verdict"]["reasons"]]),
    )
    return without_secrets(card)


_STATE_FILES = ["optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "trainer_state.json", "projector.pth"]


_THREAD = "kava-hub"


class _Quiet(logging.Filter):
    """Keeps the hub's client from logging each of its attempts in the background: the outcome is told in the end."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.threadName != _THREAD


logging.getLogger("huggingface_hub.utils._http").addFilter(_Quiet())

_STATUS_WORDS = {
    401: "the token is missing or not accepted",
    403: "the token may not write there",
    404: "there is no such repository",
    413: "it is too large",
    429: "there were too many requests",
    507: "no space is left there",
}


def hub_reason(error: BaseException) -> str:
    """Why the hub did not do what it was asked, in one line without secrets."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None:
        return reason_of(error).rstrip(".")
    words = _STATUS_WORDS.get(status, "the hub itself failed" if status >= 500 else "the hub refused it")
    return f"{words}, HTTP {status}"


def no_repository(error: BaseException, arguments: KavaTrainingArguments) -> str:
    """The sentences for a hub that did not make the run's repository before the training.

    Args:
        error: what it or the network answered.
        arguments: of the run, with `push_to_hub`.
    """
    if isinstance(error, HFValidationError):
        return f"hub_model_id is {arguments.hub_model_id!r}; write it as owner/name ({reason_of(error).rstrip('.')})."
    answered = getattr(error, "response", None) is not None
    what = "did not make the run's repository" if answered else "cannot be reached"
    login = " Log in with hf auth login, or set HF_TOKEN." if answered else ""
    folder = shlex.quote(str(Path(arguments.final_dir) / FINAL_STUDENT))
    return (
        f"push_to_hub true needs the hub, which {what} ({hub_reason(error)}).{login} Or write push_to_hub false, and "
        f"send the student afterwards: hf upload {arguments.hub_model_id or 'NAME'} {folder}"
    )


def in_background(work: Callable[[], Any], after: Iterable[Future] = ()) -> Future:
    """Do work on a thread of its own, once other jobs are done.

    The thread does not keep the program from ending, as that of an executor would: the hub may never answer.
    """
    job: Future = Future()

    def run() -> None:
        wait(after)
        try:
            job.set_result(work())
        except BaseException as error:
            job.set_exception(error)

    threading.Thread(target=run, name=_THREAD, daemon=True).start()
    return job


def in_time(work: Callable[[], Any], seconds: float) -> Any:
    """The result of work that asks the hub. Raises `TimeoutError` where it takes longer, and whatever `work` raises."""
    job = in_background(work)
    if not wait([job], timeout=seconds).done:
        raise TimeoutError(f"the hub has not answered within {seconds:g} seconds")
    return job.result()


class CheckpointPusher:
    """Sends checkpoints to the hub in the background. What fails is told and noted, and harms nothing.

    Args:
        repo_id: where to.
        arguments: `every_save` sends the student alone, `checkpoint` all of a checkpoint as `last-checkpoint`,
            `all_checkpoints` all of it under its own name. A checkpoint is left out while another is on its way,
            unless `hub_always_push` is set.
        problems: takes a note of each failure.
    """

    def __init__(self, repo_id: str, arguments: KavaTrainingArguments, problems: list[dict[str, Any]]) -> None:
        self._repo_id, self._arguments, self._problems = repo_id, arguments, problems
        self._console = Console(arguments.plain_output)
        self._running: dict[Future, tuple[Path, int]] = {}
        self._told: set[str] = set()

    def push(self, folder: Path, step: int) -> None:
        """Begin to send a checkpoint, which must be complete."""
        self._note_done()
        if self._running and not self._arguments.hub_always_push:
            return
        self._running[in_background(lambda: self._upload(folder), after=list(self._running))] = (folder, step)

    def finish(self) -> None:
        """Wait for what is on its way, `CHECKPOINT_SECONDS` at most; what takes longer is told and left alone."""
        if not all(job.done() for job in self._running):
            self._console.print(f"Waiting for the hub, {CHECKPOINT_SECONDS:g} seconds at most.")
            wait(self._running, timeout=CHECKPOINT_SECONDS)
        self._note_done()
        for folder, step in self._running.values():
            self._tell(folder, step, f"the hub has not taken it within {CHECKPOINT_SECONDS:g} seconds")
        self._running.clear()

    def _note_done(self) -> None:
        """Tell of the failures since the last time, from the thread that trains."""
        for job in [job for job in self._running if job.done()]:
            folder, step = self._running.pop(job)
            if error := job.exception():
                self._tell(folder, step, hub_reason(error))

    def _upload(self, folder: Path) -> None:
        strategy = self._arguments.hub_strategy
        names = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: folder.name}
        HfApi(token=self._arguments.hub_token).upload_folder(
            repo_id=self._repo_id,
            folder_path=folder,
            path_in_repo=names.get(strategy),
            ignore_patterns=None if strategy in names else list(_STATE_FILES),
            revision=self._arguments.hub_revision,
            commit_message=f"Training in progress, {folder.name}",
        )

    def _tell(self, folder: Path, step: int, reason: str) -> None:
        self._problems.append({"step": step, "kind": "hub", "action": f"did not send {folder.name}: {reason}"})
        if reason not in self._told:
            kept = f" It is whole in {folder}." if folder.is_dir() else ""  # save_total_limit may have deleted it
            self._console.warn(f"{folder.name} was not sent to the hub ({reason}).{kept}")
        self._told.add(reason)


def push_student(folder: Path, repo_id: str, arguments: KavaArguments) -> str | None:
    """Send a finished student to its hub repository.

    A failure never harms the run: everything is on disk by now.

    Returns:
        None if it worked, else one sentence with the reason and the command that tries again.
    """
    training = arguments.training
    try:
        in_time(
            lambda: HfApi(token=training.hub_token).upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=training.hub_revision,
                commit_message="Distilled student",
            ),
            STUDENT_SECONDS,
        )
    except Exception as error:  # the network fails in many ways; all of them are told, none may harm the run
        return (
            f"The student could not be sent to {repo_id} ({hub_reason(error)}). It is whole in {folder}; try again "
            f"with: hf upload {shlex.quote(repo_id)} {shlex.quote(str(folder))}"
        )
    return None
