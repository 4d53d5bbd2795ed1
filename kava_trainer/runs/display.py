"""What the user reads of a run's stages: environment, configuration, alignment, verdict."""

import math
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import cast

import datasets
import huggingface_hub
import psutil
import torch
import transformers

from ..config.alignment.teachers import other_teachers
from ..config.arguments import KavaArguments, KavaTrainingArguments
from ..config.data_arguments import DataArguments
from ..config.launcher import describe_engine
from ..data.encoding import Encoded
from ..data.retention import describe_retention
from ..data.row_locations import empty_problem
from ..data.rows.remarks import remark_problems
from ..distillation.teachers.several import role_of
from ..evaluation.diagnostics import COLLAPSED, alignment_status
from ..reports.findings.alignment import Measured, PairFigures, told_of_pairs, worst_first
from ..reports.summary import ModelFigures, RunSummary
from ..reports.tables import LONG_NAMES, NOT_MEASURED
from ..trainer.checkpoint import Resumption
from ..utils.console import Console, status_text
from ..utils.environment import device_name
from ..utils.memory import describe_memory


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
    console.stage("Configuration")
    for number, own in enumerate([model, *other_teachers(arguments)]):
        quantization = "" if own.teacher_quantization == "none" else f" ({own.teacher_quantization})"
        console.print(f"{role_of(number).capitalize()}: {own.teacher_model_name_or_path}{quantization}")
    quantized = [] if model.student_quantization == "none" else [model.student_quantization]
    how = ", ".join([model.student_init, *quantized, *(["LoRA"] if model.use_peft else [])])
    named = model.student_model_name_or_path or model.student_config_name or "cut out of the teacher"
    console.print(f"Student: {named} ({how})")
    if arguments.by_kind:
        chosen = ", ".join(f"{name} {value}" for name, value in arguments.by_kind.items())
        console.print(f"Defaults for a student that starts so: {chosen}")
    console.print(f"Data set: {arguments.data.dataset_name}")
    console.print(f"Device: {training.device}, processes: {describe_engine(training.world_size)}")
    console.print(f"Effective batch size: {math.prod(batch)} ({batch[0]} x {batch[1]} x {batch[2]})")
    for folder, reason in resumption.skipped:
        console.warn(f"Skipped {folder}: {reason}.")
    if training.resume_from_checkpoint not in (None, "false"):
        where = f"Resuming from {resumption.checkpoint}"
        console.print(f"{where if resumption.checkpoint else 'No checkpoint to resume from yet; starting afresh'}.")


def tell_encoding(console: Console, which: str, encoded: Encoded, total: int, asked: DataArguments) -> None:
    """Say what became of rows that were tokenised, and warn of what is left out."""
    console.print(
        f"{len(encoded.dataset)} {which} examples of {total}: {encoded.truncated} cut to {asked.max_length} tokens, "
        f"{encoded.dropped} dropped because {_why_dropped(asked, which)}"
    )
    if encoded.empty:
        console.warn(empty_problem(cast(str, asked.dataset_name), which, encoded.empty))
    for problem in remark_problems(encoded.remarks, cast(str, asked.dataset_name), which, total):
        console.warn(str(problem))


def _why_dropped(asked: DataArguments, which: str) -> str:
    """Why `training` or `held-out` rows are no examples, as words that go on."""
    if asked.accepts_prompts and which == "training":
        return "their prompt is empty or leaves no room for an answer"
    return "no answer was left"


def tell_retention(console: Console, asked: DataArguments, retention: datasets.Dataset | None) -> None:
    """Say on what text retained language is measured; why not, where it was not asked for otherwise."""
    if (of := describe_retention(asked, retention)) is not None:
        texts = f"{of['texts']} text{'' if of['texts'] == 1 else 's'}"
        console.print(f"Retained language: measured on {of['tokens']} tokens of {texts} ({of['source']})")
    elif asked.retention_dataset_name is None:
        console.print("Retained language: not measured, for there are no prompts; name a retention_dataset_name for it")


def tell_alignment(
    console: Console, metrics: dict[str, float], collapse: str | None, pairs: Sequence[PairFigures] = ()
) -> None:
    """Print the final CosSim beside the figures that tell whether it means anything, and what its mean does not."""
    if "eval_centred_cos_sim" not in metrics:
        return
    status = status_text(alignment_status(metrics["eval_cos_sim"], collapse is not None), console.emoji)
    others = {"centred": "centred_cos_sim", "margin": "margin", "CKA to the teacher": "cka"}
    figures = ", ".join(f"{word} {metrics[f'eval_{name}']:.4f}" for word, name in others.items())
    console.print(f"Alignment: CosSim {metrics['eval_cos_sim']:.4f} {status} ({figures})")
    if told := told_of_pairs(pairs):
        console.print(f"Margin: {told[0].lower()}{told[1:]}")


def show_figures(console: Console, measured: Mapping[str, ModelFigures]) -> None:
    """A line for each model that was measured, by the names in `LONG_NAMES`."""
    for who, figures in measured.items():
        shown = [
            "" if figures.perplexity is None else f"perplexity {figures.perplexity:<9.4g}",
            "" if figures.cross_entropy is None else f" cross-entropy {figures.cross_entropy:7.4f}",  # an older run's
            "" if figures.exact_match is None else f"   exact match {100 * figures.exact_match:5.1f} %",
            "" if (kept := figures.retention_cross_entropy) is None else f"   retained language {kept:7.4f}",
        ]
        console.print(f"{LONG_NAMES[who]:<32} {''.join(shown).rstrip() or NOT_MEASURED}")


def show_verdict(console: Console, summary: RunSummary) -> None:
    """The measured models side by side, then the verdict in sentences."""
    console.stage("Verdict")
    show_figures(console, summary.content.evaluation.measured())
    show_pairs(console, summary.content.final.pairs or [])
    verdict = summary.content.verdict
    console.print({True: "Success.", False: "No success.", None: "No verdict."}[verdict.success])
    for reason in verdict.reasons:
        console.print(f"- {reason}")
    if verdict.next_steps:
        console.print("What to try next:")
    for step in verdict.next_steps:
        console.print(f"- {step}")


MOST_PAIRS = 12
"""Of more pairs of layers than this, those with the lowest margins are printed."""


def show_pairs(console: Console, pairs: Sequence[PairFigures]) -> None:
    """A line for each pair of layers where there are several, in their order."""
    if len(pairs) < 2:
        return
    shown = worst_first(pairs)[:MOST_PAIRS]
    width = max(9, *(len(pair.layers) + 1 for pair in shown))
    console.print(f"{'Layers':<{width}}   CosSim   margin      CKA   rank of student, targets, teacher")
    for pair in (pair for pair in pairs if pair in shown):
        ranks = (pair.student_effective_rank, pair.target_effective_rank, pair.teacher_effective_rank)
        figures = "".join(f"{_figure(value, 4):>9}" for value in (pair.cos_sim, pair.margin, pair.cka))
        status = f"   {status_text(COLLAPSED, console.emoji)}" if pair.collapsed else ""
        console.print(f"{pair.layers:<{width}}{figures}   {', '.join(_figure(rank, 1) for rank in ranks)}{status}")
    if others := len(pairs) - len(shown):
        console.print(f"The margins of the other {others} are higher; the report has them all.")


def _figure(value: Measured, decimals: int) -> str:
    return "-" if value is None else f"{value:.{decimals}f}"


def shows_bars(training: KavaTrainingArguments) -> bool:
    """Whether this process may show progress bars: the main one, on a terminal, where nobody has asked for none."""
    wanted = not training.plain_output and not training.disable_tqdm
    return wanted and training.process_index == 0 and sys.stderr.isatty()


def quieten(bars: bool) -> None:
    """Leave the screen to KAVA's own stages and, if so wished, the bars for reading, tokenising and downloading.

    Warnings of the libraries still come through.
    """
    transformers.utils.logging.disable_progress_bar()  # of loading weights, and of the hub as well
    if not bars:
        datasets.disable_progress_bars()
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a variable of the environment that wants none, and is obeyed
        datasets.enable_progress_bars()
        huggingface_hub.utils.enable_progress_bars()


def own_cores() -> set[int]:
    """The cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


MUCH_BUSY = 0.5
"""So many busy cores are worth a line."""


def busy_cores(seconds: float = 0.2) -> float:
    """How many of the cores that this process may use are busy while it looks, for so long, and does nothing itself."""
    shares = psutil.cpu_percent(interval=seconds, percpu=True)
    return sum(shares[core] for core in own_cores() if core < len(shares)) / 100


def use_all_cores(training: KavaTrainingArguments) -> None:
    """Undo the single thread that `accelerate launch` gives a lone process on a CPU (read in accelerate 1.15.0).

    It stays where `OMP_THREAD_LIMIT` is set: only that tells that somebody wants few threads.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if launched and "OMP_THREAD_LIMIT" not in os.environ and training.world_size == 1 and training.device.type == "cpu":
        torch.set_num_threads(len(own_cores()))


def tell_busy_cores(console: Console, training: KavaTrainingArguments) -> None:
    """Say that a run on the CPU will be slow where other processes keep cores busy. Its threads wait asleep then."""
    if training.device.type != "cpu" or training.world_size > 1:
        return
    if (busy := busy_cores()) >= MUCH_BUSY:
        console.print(f"Other processes keep {busy:.1f} of {len(own_cores())} cores busy, so this will take longer.")
