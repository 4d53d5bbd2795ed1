"""What to warn of before a run, and what to write where it would not fit or not learn."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from ..config.arguments import KavaArguments, KavaTrainingArguments
from ..config.launcher import is_fsdp_asked, may_shard
from ..config.model_arguments import ModelArguments
from ..config.optimizer_names import TORCHAO_OPTIMIZERS, missing_package, optimizer_name, parse_optim_args
from ..data.formats import find_format, prompt_kind, unread_columns
from ..data.rows.template import DATE, ChatTemplate
from ..data.text_files import CHECKED_ROWS
from ..models.loading import load_tokenizer
from ..utils.console import apart, size_text
from ..utils.errors import BadRequest, Problem
from ..utils.memory import free_memory_bytes
from .pair.tokenizers import teacher_readings


def precision_problems(
    arguments: KavaArguments, teacher: PreTrainedModel, student: PreTrainedModel, trained: Iterable[torch.dtype]
) -> list[Problem]:
    """What is wrong with the precision that was asked for. No remedy undoes another, and none is told twice.

    Args:
        arguments: of the run.
        teacher: which may be without storage, as the student.
        student: before the training.
        trained: the data types of the weights that are trained.
    """
    slow, training = slow_half_precision(arguments, teacher, student), arguments.training
    if slow is not None and student.dtype != torch.float32:  # whose remedy makes the student float32
        return [slow]
    rounding = rounding_problem(training.optim, training.optim_args, trained, training.device)
    return [*filter(None, (rounding, slow))]


def is_slow_at_half_precision(device: torch.device) -> bool:
    """Whether PyTorch has no fast way to multiply matrices of bfloat16 or float16 on a device."""
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"


def slow_half_precision(arguments: KavaArguments, teacher: PreTrainedModel, student: PreTrainedModel) -> Problem | None:
    """What to write where models compute in bfloat16 or float16 and PyTorch has no fast way for it; None elsewhere.

    Without AVX-512 products of bfloat16 matrices take from 3 to 100 times as long as those of float32 (measured with
    PyTorch 2.13.0 at Qwen2.5's shapes; PyTorch's issue 146508 has up to 500 times, for float16 as well).
    """
    training, model = arguments.training, arguments.model
    if not is_slow_at_half_precision(training.device):
        return None
    remedies = {
        "bf16 false": training.bf16,
        "fp16 false": training.fp16,
        "--mixed_precision no for accelerate launch": os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no",
        "teacher_quantization none": model.teacher_quantization == "4bit",
        "teacher_dtype float32": teacher.dtype != torch.float32,
        "student_quantization none": model.student_quantization == "4bit",
        "student_dtype float32": student.dtype != torch.float32,
    }
    if not (needed := [remedy for remedy, needs in remedies.items() if needs]):
        return None
    return Problem(
        None,
        "PyTorch uses no AVX-512 on this processor, and without it multiplies in half precision up to a hundred times "
        "slower than in float32.",
        f"Write {', '.join(needed)}, where the memory suffices, or train on a GPU.",
    )


def smaller_models(arguments: KavaArguments) -> str:
    """What to write where teacher and student do not fit together, as a sentence."""
    model = arguments.model
    remedies = [
        "write teacher_quantization 4bit" if model.teacher_quantization != "4bit" else "",
        "write student_dtype bfloat16" if model.student_dtype != "bfloat16" else "",
        "choose smaller models",
        "let nothing else use the device",
    ]
    return f"Do one of these: {'; '.join(filter(None, remedies))}."


def smaller_batches(arguments: KavaArguments) -> str:
    """What to write where an evaluation takes too much, as a sentence."""
    training = arguments.training
    less = " or generation_max_new_tokens" if training.evaluate_generation else ""
    return f"Lower per_device_eval_batch_size (now {training.per_device_eval_batch_size}){less}."


def smaller_rows(arguments: KavaArguments) -> str:
    """What to write where the teacher reads too much at once for its cache, as a sentence."""
    training = arguments.training
    if budget := training.max_tokens_per_batch:
        return f"Lower max_tokens_per_batch (now {budget})."
    return f"Lower per_device_eval_batch_size (now {training.per_device_eval_batch_size})."


REMEDY = "optim adamw_torch_8bit with optim_args bf16_stochastic_round=True,block_size=64"
"""What to write for weights in bfloat16; measured in `docs/numbers.md`."""

_SWITCHES = {
    **dict.fromkeys(TORCHAO_OPTIMIZERS, "bf16_stochastic_round"),
    "adamw_anyprecision": "use_kahan_summation",
}
"""The word in `optim_args` that makes an optimizer keep small updates of bfloat16 weights."""

_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
"""Values of `lr_scheduler_type` that have none (read in transformers 5.23.0)."""


def rounding_problem(
    optim: Any, optim_args: str | None, dtypes: Iterable[torch.dtype], device: torch.device | None = None
) -> Problem | None:
    """Whether small updates of the weights will be lost.

    A bfloat16 holds 8 significant bits. A step smaller than about 1/512 of a weight is rounded away, unless the
    optimizer rounds at random (torchao) or carries what was lost (Kahan: `stable_adamw`, which does so of itself, and
    `adamw_anyprecision`). The data types are those of the weights that are trained; None where nothing is lost. The
    remedy is one that can be followed on the device, a GPU by default.
    """
    name = optimizer_name(optim)
    switch = parse_optim_args(optim_args).get(_SWITCHES.get(name, ""), "false")
    switched_on = switch.lower() in ("true", "1", "yes", "y", "on", "t")
    if torch.bfloat16 not in set(dtypes) or switched_on or name == "stable_adamw":
        return None
    what = f"The student's weights are bfloat16, and optim {name} rounds away most updates at a low learning rate."
    whole = "student_dtype float32"  # bf16 wants a GPU, or a CPU that is fast at it
    if device is None or device.type != "cpu":
        whole += " with bf16 true"
    if missing_package(TORCHAO_OPTIMIZERS[0]) is None:
        return Problem("optim", what, f"Write {REMEDY}, or {whole}.")
    return Problem("optim", what, f"Write {whole}; or install torchao, and write {REMEDY}.")


def planned_steps(training: TrainingArguments, examples: int, processes: int) -> int:
    """The optimizer steps of a training on so many examples, which so many processes share.

    Where its `max_steps` is above 0, that decides.
    """
    if training.max_steps > 0:
        return training.max_steps
    return math.ceil(training.num_train_epochs * steps_per_epoch(training, examples, processes))


def steps_per_epoch(training: TrainingArguments, examples: int, processes: int) -> int:
    """The optimizer steps of one pass over so many examples, which so many processes share; at least one."""
    batches = examples / (training.per_device_train_batch_size * processes)
    whole = math.floor(batches) if training.dataloader_drop_last else math.ceil(batches)
    return max(math.ceil(whole / training.gradient_accumulation_steps), 1)


FEWEST_HELD_OUT = 64
"""Fewer held-out examples are never chosen: under 50 the verdict warns that they say little."""

FEW_STEPS = 50
"""In a training of fewer steps the gradients of the terms, which take as long as some steps, are measured once."""

TOKENS_AN_INPUT = 16
"""Where a short training reads fewer tokens than the projectors are fitted to, so many for each input of a fit do."""


def examples_read(training: TrainingArguments, examples: int, processes: int) -> int:
    """The examples that all steps of a training read, each as often as it is read."""
    steps = planned_steps(training, examples, processes)
    return steps * training.gradient_accumulation_steps * training.per_device_train_batch_size * processes


def fewer_held_out(arguments: KavaArguments, read: int, held_out: int) -> int | None:
    """How many held-out examples a short run measures on where nobody says how many; None where it is all of them.

    As many as it trains on: each is read six times and more, by teacher, student and control.

    Args:
        arguments: of the run.
        read: training examples that it reads.
        held_out: examples that are held out.
    """
    number = max(FEWEST_HELD_OUT, read)
    asked = arguments.data.max_eval_samples is not None or "max_eval_samples" in arguments.given
    return None if asked or number >= held_out else number


def fewer_calibration_tokens(arguments: KavaArguments, read: float, inputs: int) -> int | None:
    """How many tokens a short run's projectors are fitted to where nobody says how many; None where that stays.

    Args:
        arguments: of the run.
        read: training tokens that it reads.
        inputs: of the largest fit.
    """
    training = arguments.training
    number = math.ceil(max(read, TOKENS_AN_INPUT * inputs))
    asked = "calibration_tokens" in arguments.given or not training.calibrates
    return None if asked or number >= training.calibration_tokens else number


def long_warmup(training: TrainingArguments, steps: int) -> Problem | None:
    """What is wrong with a warm-up that a training of so many steps does not come out of; None where it does."""
    warmup = training.get_warmup_steps(steps)
    if warmup < steps or training.lr_scheduler_type in _WITHOUT_WARMUP:
        return None
    share_helps = training.warmup_steps >= 1 and steps > 1
    remedy = ", or write a share of all steps, such as 0.1" if share_helps else "; 0 leaves the warm-up out"
    what = (
        f"warmup_steps comes to {warmup} and the whole training to {steps} (optimizer steps), so the learning rates "
        "reach their full values only when it ends, or never."
    )
    return Problem("warmup_steps", what, f"Lower warmup_steps{remedy}.")


def memory_shortage(needed: int, arguments: KavaArguments) -> Problem | None:
    """What to write where the device of a run has not so many bytes free; None where it has.

    What has been written already is not advised, nor what another advice would undo.
    """
    device = arguments.training.device
    free = free_memory_bytes(device)
    if needed <= free:
        return None
    remedies = ", ".join([*_memory_remedies(arguments), "or choose smaller models."])
    what = f"That is more than the {apart(needed, free, 2, size_text)[1]} that are free."
    return Problem(None, what, f"{remedies[0].upper()}{remedies[1:]}")


def _memory_remedies(arguments: KavaArguments) -> Iterator[str]:
    training, model = arguments.training, arguments.model
    if training.per_device_train_batch_size > 1:
        yield "lower per_device_train_batch_size (and raise gradient_accumulation_steps)"
    else:
        yield f"lower max_length (now {arguments.data.max_length})"
    if not training.gradient_checkpointing:
        yield "set gradient_checkpointing"
    may_spread = training.world_size > 1 and may_shard(training.device.type) and not model.is_cut
    if may_spread and model.teacher_quantization == "none" and not _spreads_teacher(model):
        yield "write teacher_sharding fsdp"
    elif model.teacher_quantization != "4bit" and not is_slow_at_half_precision(training.device):
        asked = model.teacher_sharding == "fsdp"
        yield "choose teacher_quantization 4bit" + (" and teacher_sharding none" if asked else "")
    if training.teacher_cache_dir is None and not training.samples:
        yield "name a teacher_cache_dir"
    if not any(bits in optimizer_name(training.optim) for bits in ("8bit", "4bit")):
        ready = missing_package(TORCHAO_OPTIMIZERS[0]) is None
        yield f"choose an optim with 8-bit states such as {'adamw_torch_8bit' if ready else 'adamw_8bit'}"


def _spreads_teacher(model: ModelArguments) -> bool:
    """Whether a teacher that is large is spread over the processes."""
    return model.teacher_sharding == "fsdp" or (model.teacher_sharding == "auto" and is_fsdp_asked())


def check_processes(training: KavaTrainingArguments) -> None:
    """Make sure that there is a process for each GPU. Raises `BadRequest` if not."""
    if training.n_gpu > 1:
        raise BadRequest(
            f"One process sees {training.n_gpu} GPUs.",
            f"Start one process for each with accelerate launch --num_processes {training.n_gpu}, or choose "
            "one with CUDA_VISIBLE_DEVICES=0.",
        )


def check_evaluation(training: KavaTrainingArguments, held_out: bool) -> None:
    """Make sure that there are held-out examples for what was asked for. Raises `BadRequest` if not."""
    if not held_out and training.eval_strategy != "no":
        raise BadRequest("eval_strategy asks for evaluation, but there are no held-out examples;", "write no.")
    if not held_out and training.run_control:
        raise BadRequest("run_control compares two students on held-out examples, and there are none;", "write false.")


def loose_projector(training: KavaTrainingArguments) -> Problem | None:
    """What to write where nothing holds the projector of the teacher's states; None where something does."""
    if (
        not training.projects
        or training.projector_direction != "teacher_to_student"
        or training.projector_anchor != "none"
    ):
        return None
    return Problem(
        "projector_anchor",
        "Nothing holds the projector of the teacher's states, so both sides may agree on next to nothing.",
        "Write projector_anchor pca or reconstruction, or projector_direction student_to_teacher, to rule that out.",
    )


def on_format(
    arguments: KavaArguments, tokenizer: PreTrainedTokenizerBase, columns: Sequence[str], row: Mapping[str, Any]
) -> tuple[list[str], list[Problem]]:
    """What of the data is not read and what of the tokenizer is not used.

    Args:
        arguments: of the run.
        tokenizer: of both models.
        columns: of the data set.
        row: its first one.

    Returns:
        What is as it may be, in sentences, and what may be wrong.
    """
    kind, unread = prompt_kind(row, find_format(columns)), unread_columns(columns, row)
    notes = [f"Nothing reads the column{'s' if len(unread) > 1 else ''} {', '.join(unread)}."] if unread else []
    if kind == "messages":
        dated = bool(tokenizer.chat_template) and ChatTemplate(tokenizer).dated()
        today = f"The chat template writes today's date, for which {DATE:%d %b %Y} stands on any day."
        return [*notes, *([today] if dated else [])], _without_effect(arguments, tokenizer)
    problems = _without_effect(arguments, tokenizer)
    if _has_chat_template(arguments.model, tokenizer):
        problems.append(
            Problem(
                None,
                "The teacher's chat template is not used, for the data is no chat: an instruct teacher is asked "
                "otherwise than it was taught.",
                "Give the data as messages where the teacher is one.",
            )
        )
    if arguments.data.assistant_turns != "last":
        what = "assistant_turns has no effect on data that is no chat."
        problems.append(Problem("assistant_turns", what, "Leave it out, or give the data as messages."))
    return notes, problems


def _without_effect(arguments: KavaArguments, tokenizer: PreTrainedTokenizerBase) -> list[Problem]:
    """What is asked for of tokenizers that differ, where they are the same."""
    asked = arguments.data.token_alignment
    if asked == "overlap" or teacher_readings(arguments, tokenizer):
        return []
    what = f"token_alignment {asked} has no effect, for teacher and student read the same tokens."
    return [Problem("token_alignment", what, "Leave it out.")]


def _has_chat_template(model: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the teacher's tokenizer has one; it is read only where that of the pair has none."""
    if tokenizer.chat_template or model.student_model_name_or_path is None:
        return bool(tokenizer.chat_template)
    return bool(load_tokenizer(model.teacher_name, "teacher", model.teacher_revision, model).chat_template)


def held_out_of_a_small_stream(held_out: int, skipped: int, checked: int) -> str | None:
    """The sentence for a stream of whose few rows many are held out; None for any other.

    Args:
        held_out: rows that are held out.
        skipped: how many of them are rows of the training split.
        checked: rows that are left to train on, as far as they were looked at.
    """
    if not skipped or checked >= CHECKED_ROWS or checked >= 4 * held_out:
        return None
    return (
        f"Of the {skipped + checked} rows of the stream the first {skipped} are held out, and {checked} are left to "
        "train on. Lower max_eval_samples, name a dataset_test_split, or leave streaming out, which holds out 5 %."
    )
