"""The model card of a finished student, and sending the student to the hub."""

import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCardData
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from .arguments import KavaArguments, KavaTrainingArguments
from .errors import reason_of
from .source_arguments import QUICKSTART

logger = logging.get_logger(__name__)

_CARD = """---
{metadata}
---

# {name}

Distilled with KAVA from `{teacher}` on `{dataset}`: a frozen teacher's hidden states are aligned with the student's
through a projector that is not part of this model.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

| model | answer perplexity | exact match |
|---|---|---|
{rows}

Steps: {steps}. On held-out examples: CosSim {cos_sim}, centred {centred}, margin over other tokens' targets {margin},
CKA to the teacher {cka}.

Verdict of the run: {verdict}
"""


_VERDICTS = {True: "success.", False: "**no success.**", None: "none."}


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


def _public_name(name: str | None) -> str | None:
    """A hub id as it is; a local path or the quickstart has no page on the hub."""
    return None if name is None or name == QUICKSTART or Path(name).exists() else name


def render_model_card(name: str, arguments: KavaArguments, summary: dict[str, Any]) -> str:
    """The text of `README.md` for a finished student.

    Args:
        name: repository or folder of the student.
        arguments: what the run was asked for.
        summary: the content of `run_summary.json`.
    """
    measured = summary["evaluation"]["student_after"] or {}
    teacher, dataset = arguments.model.teacher_model_name_or_path, arguments.data.dataset_name
    results = [
        EvalResult("text-generation", dataset, Path(dataset).name, metric, value)
        for metric, value in measured.items()
        if value is not None
    ]
    student = _public_name(arguments.model.student_model_name_or_path)
    metadata = ModelCardData(
        model_name=name,
        base_model=student,
        base_model_relation="finetune" if student else None,
        datasets=[dataset] if _public_name(dataset) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["kava", "knowledge-distillation"],
        eval_results=results or None,
    )
    rows = [
        f"| {who.replace('_', ' ')} | {_figure(figures['perplexity'])} | {_figure(figures['exact_match'])} |"
        for who, figures in summary["evaluation"].items()
        if figures is not None
    ]
    return _CARD.format(
        metadata=metadata.to_yaml(),
        name=name,
        teacher=teacher,
        dataset=dataset,
        rows="\n".join(rows) or "| none | not measured | not measured |",
        steps=summary["global_step"],
        cos_sim=_figure(summary["final"]["cos_sim"]),
        centred=_figure(summary["final"]["centred_cos_sim"]),
        margin=_figure(summary["final"]["margin"]),
        cka=_figure(summary["final"]["cka"]),
        verdict=" ".join([_VERDICTS[summary["verdict"]["success"]], *summary["verdict"]["reasons"]]),
    )


_STATE_FILES = ["optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "trainer_state.json", "projector.pth"]


def push_checkpoint(folder: Path, repo_id: str, arguments: KavaTrainingArguments) -> PushInProgress:
    """Begin to send a checkpoint to the hub, as `hub_strategy` asks, and return the running job.

    Args:
        folder: the checkpoint.
        repo_id: where to.
        arguments: `every_save` sends the student alone, `checkpoint` all of it as `last-checkpoint`,
            `all_checkpoints` all of it under its own name.
    """
    strategy = arguments.hub_strategy
    names = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: folder.name}
    job = HfApi(token=arguments.hub_token).upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        path_in_repo=names.get(strategy),
        ignore_patterns=None if strategy in names else _STATE_FILES,
        revision=arguments.hub_revision,
        commit_message=f"Training in progress, {folder.name}",
        run_as_future=True,
    )
    job.add_done_callback(lambda done: done.exception() and logger.warning("%s was not sent to the hub.", folder))
    return PushInProgress([job])


def push_student(folder: Path, repo_id: str, arguments: KavaArguments) -> str | None:
    """Send a finished student to its hub repository.

    A failure never harms the run: everything is on disk by now.

    Returns:
        None if it worked, else one sentence with the reason and the command that tries again.
    """
    training = arguments.training
    try:
        HfApi(token=training.hub_token).upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=training.hub_revision,
            commit_message="Distilled student",
        )
    except Exception as error:  # the network fails in many ways; all of them are told, none may harm the run
        return (
            f"The student could not be sent to {repo_id} ({reason_of(error)}). It is whole in {folder}; try again "
            f"with: hf upload {shlex.quote(repo_id)} {shlex.quote(str(folder))}"
        )
    return None
