"""What the user reads of a run's stages: environment, configuration, alignment, verdict."""

import math
import sys
from collections.abc import Mapping

import torch
import transformers

from .alignment import alignment_status
from .arguments import KavaArguments
from .checkpoint_io import Resumption
from .console import Console, status_text
from .engines import describe_engine
from .environment import describe_memory, device_name
from .figures import WHO as SHORT_NAMES
from .summary import RunSummary

WHO = {**SHORT_NAMES, "student": "Student", "control_sft": "Control (next-token loss alone)"}
"""How the models are called that are evaluated: by their names in the summary, and `student` outside of a run."""


def show_environment(console: Console, device: torch.device) -> None:
    """Versions and device."""
    console.stage("Environment")
    versions = (sys.version.split()[0], torch.__version__, transformers.__version__)
    console.print("Python {}, PyTorch {}, Transformers {}".format(*versions))
    console.print(f"Accelerator: {device_name(device)}")
    console.print(f"Memory: {describe_memory(device)}")


def show_configuration(console: Console, arguments: KavaArguments, resumption: Resumption) -> None:
    """Which models, data and batch, and where the run goes on from."""
    model, training = arguments.model, arguments.training
    batch = (training.per_device_train_batch_size, training.gradient_accumulation_steps, training.world_size)
    quantization = "" if model.teacher_quantization == "none" else f" ({model.teacher_quantization})"
    console.stage("Configuration")
    console.print(f"Teacher: {model.teacher_model_name_or_path}{quantization}")
    quantized = [] if model.student_quantization == "none" else [model.student_quantization]
    how = ", ".join([model.student_init, *quantized, *(["LoRA"] if model.use_peft else [])])
    console.print(f"Student: {model.student_model_name_or_path or model.student_config_name} ({how})")
    console.print(f"Data set: {arguments.data.dataset_name}")
    console.print(f"Device: {training.device}, processes: {describe_engine(training.world_size)}")
    console.print(f"Effective batch size: {math.prod(batch)} ({batch[0]} x {batch[1]} x {batch[2]})")
    for folder, reason in resumption.skipped:
        console.warn(f"Skipped {folder}: {reason}.")
    if training.resume_from_checkpoint not in (None, "false"):
        where = f"Resuming from {resumption.checkpoint}"
        console.print(f"{where if resumption.checkpoint else 'No checkpoint to resume from yet; starting afresh'}.")


def tell_alignment(console: Console, metrics: dict[str, float], collapse: str | None) -> None:
    """Print the final CosSim beside the figures that tell whether it means anything."""
    if "eval_centred_cos_sim" not in metrics:
        return
    status = status_text(alignment_status(metrics["eval_cos_sim"], collapse is not None), console.emoji)
    others = {"centred": "centred_cos_sim", "margin": "margin", "CKA to the teacher": "cka"}
    figures = ", ".join(f"{word} {metrics[f'eval_{name}']:.4f}" for word, name in others.items())
    console.print(f"Alignment: CosSim {metrics['eval_cos_sim']:.4f} {status} ({figures})")


def show_figures(console: Console, evaluation: Mapping[str, dict[str, float | None] | None]) -> None:
    """A line for each model that was measured.

    Args:
        console: prints.
        evaluation: figures of `evaluate_model` by the names in `WHO`; None for what was not measured.
    """
    for name, figures in ((name, figures) for name, figures in evaluation.items() if figures is not None):
        match = "" if figures["exact_match"] is None else f"   exact match {100 * figures['exact_match']:5.1f} %"
        console.print(
            f"{WHO[name]:<32} perplexity {figures['perplexity']:<9.4g} cross-entropy {figures['cross_entropy']:7.4f}"
            f"{match}"
        )


def show_verdict(console: Console, summary: RunSummary) -> None:
    """The measured models side by side, then the verdict in sentences."""
    console.stage("Verdict")
    show_figures(console, summary.content["evaluation"])
    verdict = summary.content["verdict"]
    console.print({True: "Success.", False: "No success.", None: "No verdict."}[verdict["success"]])
    for reason in verdict["reasons"]:
        console.print(f"- {reason}")
