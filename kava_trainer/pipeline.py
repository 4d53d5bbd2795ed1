"""One run from arguments to files, stage by stage, with what the user sees of each."""

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
import transformers
from huggingface_hub.errors import HTTPError
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from .alignment import alignment_status
from .arguments import KavaArguments
from .callbacks.emergency import EMERGENCY_PROJECTOR, exit_code
from .capture import context_length, hidden_size, number_of_layers, resolve_layer_pairs
from .checkpoint_io import list_checkpoints, resolve_checkpoint, write_folder_atomically
from .console import Console, status_text
from .data import DistillationCollator, Encoded, encode_dataset, load_splits
from .environment import (
    describe_environment,
    describe_memory,
    device_name,
    peak_memory_bytes,
    quieten,
    resume_command,
    use_all_cores,
)
from .errors import BadRequest
from .evaluation import answer_cross_entropy, evaluate_model, longest_answer
from .hub import push_student, render_model_card
from .loading import check_tokenizers_agree, check_vocabulary_fits, load_tokenizer
from .projector import ProjectorConfig
from .student import load_student
from .summary import RunSummary
from .targets import HiddenStateTarget
from .teacher import OnlineTeacher, load_teacher
from .trainer import KavaTrainer

FINAL_STUDENT, FINAL_PROJECTOR = "final_student", "final_projector.pth"


@dataclass
class Data:
    """Tokenised examples and what pads them."""

    train: datasets.Dataset
    evaluation: datasets.Dataset | None
    collator: DistillationCollator


@dataclass
class Models:
    """The pair and their one tokenizer."""

    teacher: PreTrainedModel
    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def run(arguments: KavaArguments, argv: list[str]) -> int:
    """Distil as asked and write everything a run leaves behind.

    Args:
        arguments: the checked arguments.
        argv: the command line without the program, to print the command that resumes.

    Returns:
        The exit code: 0 when the run completed, 130 or 143 when a signal ended it during training.

    Raises:
        BadRequest: if models or data are not there or do not fit; nothing has been trained by then.
        RunFailed: if the training broke.
    """
    training = arguments.training
    console = Console(training.plain_output)
    quieten(training.plain_output or not console.emoji)
    use_all_cores(training)
    summary = RunSummary(arguments.to_dict(), describe_environment(training.device))
    checkpoint = resolve_checkpoint(training.resume_from_checkpoint, training.output_dir)
    _prepare_folders(arguments)
    _show_environment(console, training.device)
    _show_configuration(console, arguments, checkpoint)
    tokenizer = _load_tokenizers(arguments)
    data = _load_data(console, arguments, tokenizer)
    models = _load_models(console, arguments, tokenizer)
    trainer = _build_trainer(console, arguments, models, data)
    _check_teacher(console, models, data, training.per_device_eval_batch_size)
    _evaluate(console, arguments, models, data, summary, ("teacher", "student_before"))
    console.stage("Training")
    status = "failed"  # from here on the output folder is this run's, and its summary is written however it ends
    try:
        _train(console, trainer, checkpoint, summary)
        if trainer.emergency.received is not None and _last_checkpoint(trainer).is_dir():
            status = "interrupted"
            return _tell_interruption(console, trainer, argv)
        _finish(console, arguments, models, data, trainer, summary)
        status = "completed"
        return 0
    except BadRequest:
        status = None
        raise
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        if training.should_save and status is not None:
            summary.content["checkpoints"] = [str(folder) for folder in list_checkpoints(training.output_dir)]
            path = summary.write(training.output_dir, status)
            console.print(f"Summary: {path}")


def _prepare_folders(arguments: KavaArguments) -> None:
    for name in ("output_dir", "final_dir"):
        folder = Path(getattr(arguments.training, name))
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadRequest(f"{name} {folder} cannot be made: {error.strerror}.") from error
        if not os.access(folder, os.W_OK):
            raise BadRequest(f"{name} {folder} cannot be written to; choose another folder.")
    student = Path(arguments.training.final_dir) / FINAL_STUDENT
    if student.exists() and not student.is_dir():
        raise BadRequest(f"{student} is a file, but the student's folder goes there; move it or set final_dir.")


def _show_environment(console: Console, device: torch.device) -> None:
    console.stage("Environment")
    versions = (sys.version.split()[0], torch.__version__, transformers.__version__)
    console.print("Python {}, PyTorch {}, Transformers {}".format(*versions))
    console.print(f"Accelerator: {device_name(device)}")
    console.print(f"Memory: {describe_memory(device)}")


def _show_configuration(console: Console, arguments: KavaArguments, checkpoint: Path | None) -> None:
    model, training = arguments.model, arguments.training
    batch = (training.per_device_train_batch_size, training.gradient_accumulation_steps, training.world_size)
    quantization = "" if model.teacher_quantization == "none" else f" ({model.teacher_quantization})"
    console.stage("Configuration")
    console.print(f"Teacher: {model.teacher_model_name_or_path}{quantization}")
    console.print(f"Student: {model.student_model_name_or_path or model.student_config_name} ({model.student_init})")
    console.print(f"Data set: {arguments.data.dataset_name}")
    console.print(f"Device: {training.device}, processes: {training.world_size}")
    console.print(f"Effective batch size: {math.prod(batch)} ({batch[0]} x {batch[1]} x {batch[2]})")
    if training.resume_from_checkpoint not in (None, "false"):
        where = f"Resuming from {checkpoint}" if checkpoint else "No checkpoint to resume from yet; starting afresh"
        console.print(f"{where}.")


def _load_tokenizers(arguments: KavaArguments) -> PreTrainedTokenizerBase:
    """The student's tokenizer, which agrees with the teacher's; the teacher's own where the student has none."""
    model = arguments.model
    teacher = load_tokenizer(model.teacher_model_name_or_path, "teacher", model.teacher_revision, model)
    if model.student_model_name_or_path is None:
        return teacher
    student = load_tokenizer(model.student_model_name_or_path, "student", model.student_revision, model)
    check_tokenizers_agree(teacher, student)
    return student


def _load_data(console: Console, arguments: KavaArguments, tokenizer: PreTrainedTokenizerBase) -> Data:
    console.stage("Data")
    with arguments.training.main_process_first(desc="loading the data"):
        train, test, total = load_splits(arguments.data)
        console.print(f"Dataset loaded: {total} samples")
        encoded = encode_dataset(train, tokenizer, arguments.data.max_length, "Tokenizing the training data")
        held_out = test and encode_dataset(test, tokenizer, arguments.data.max_length, "Tokenizing the held-out data")
    _tell_encoding(console, "training", encoded, len(train), arguments.data.max_length)
    if held_out:
        _tell_encoding(console, "held-out", held_out, len(test), arguments.data.max_length)
    else:
        console.warn("There are no held-out examples, so nothing will be evaluated.")
    batches = math.ceil(len(encoded.dataset) / arguments.training.per_device_train_batch_size)
    console.print(f"{batches} batches prepared")
    return Data(encoded.dataset, held_out.dataset if held_out else None, DistillationCollator(tokenizer))


def _tell_encoding(console: Console, which: str, encoded: Encoded, total: int, max_length: int) -> None:
    console.print(
        f"{len(encoded.dataset)} {which} examples of {total}: {encoded.truncated} cut to {max_length} tokens, "
        f"{encoded.dropped} dropped because no answer was left"
    )


def _load_models(console: Console, arguments: KavaArguments, tokenizer: PreTrainedTokenizerBase) -> Models:
    console.stage("Models")
    teacher = load_teacher(arguments.model, arguments.training.device)
    set_seed(arguments.training.seed)
    student = load_student(arguments.model, teacher)
    for role, model in (("teacher", teacher), ("student", student)):
        check_vocabulary_fits(model, role, tokenizer)
        limit = context_length(model)
        if limit is not None and arguments.data.max_length > limit:
            raise BadRequest(f"max_length is {arguments.data.max_length}, but the {role} reads {limit} tokens at most.")
        width, depth = hidden_size(model), number_of_layers(model)
        console.print(
            f"{role.capitalize()}: d_model={width}, {depth} layers, {model.num_parameters() / 1e6:.2f} M parameters, "
            f"{str(model.dtype).removeprefix('torch.')}"
        )
    return Models(teacher, student, tokenizer)


def _build_trainer(console: Console, arguments: KavaArguments, models: Models, data: Data) -> KavaTrainer:
    training = arguments.training
    if training.n_gpu > 1:
        raise BadRequest(
            f"One process sees {training.n_gpu} GPUs. Start one process for each with "
            f"accelerate launch --num_processes {training.n_gpu}, or choose one with CUDA_VISIBLE_DEVICES=0."
        )
    if data.evaluation is None and training.eval_strategy != "no":
        raise BadRequest("eval_strategy asks for evaluation, but there are no held-out examples; write no.")
    pairs = resolve_layer_pairs(
        training.layer_mapping, number_of_layers(models.student), number_of_layers(models.teacher)
    )
    shape = ProjectorConfig(
        teacher_size=hidden_size(models.teacher),
        student_size=hidden_size(models.student),
        mlp_ratio=training.projector_mlp_ratio,
        dropout=training.projector_dropout,
    )
    target = HiddenStateTarget(pairs, shape, training.mercator_alpha, training.mercator_beta)
    try:
        trainer = KavaTrainer(
            student=models.student,
            teacher=OnlineTeacher(models.teacher, target.teacher_layers),
            target=target,
            args=training,
            train_dataset=data.train,
            eval_dataset=data.evaluation,
            data_collator=data.collator,
            processing_class=models.tokenizer,
        )
        trainer.create_optimizer()
    except (ValueError, ImportError, KeyError, OSError, HTTPError) as error:
        raise BadRequest(f"Trainer cannot be set up with these arguments: {error}") from error
    console.print(f"Projector: {shape.teacher_size} -> {shape.student_size}")
    console.print(f"Aligned layers (student, teacher): {', '.join(map(str, pairs))}")
    console.print(f"Loss: Mercator (alpha={training.mercator_alpha}, beta={training.mercator_beta})")
    return trainer


def _check_teacher(console: Console, models: Models, data: Data, batch_size: int) -> None:
    """Warn of a teacher that knows no more about the answers than chance."""
    examples = data.train.select(range(min(batch_size, len(data.train))))
    loss = answer_cross_entropy(models.teacher, examples, data.collator, batch_size)
    chance = math.log(models.teacher.get_input_embeddings().num_embeddings)
    console.print(f"Teacher's cross-entropy on one batch: {loss:.2f} nats (chance: {chance:.2f})")
    if not loss < 0.95 * chance:
        console.warn(
            "The teacher is no better than chance on these answers. Look at its weights, its tokenizer and the data."
        )


def _evaluate(
    console: Console,
    arguments: KavaArguments,
    models: Models,
    data: Data,
    summary: RunSummary,
    names: tuple[str, ...],
) -> None:
    """Measure the teacher or the student on the held-out examples, and print and note the figures."""
    if data.evaluation is None:
        return
    training = arguments.training
    console.stage("Evaluation")
    models.student.to(training.device)
    new_tokens = training.generation_max_new_tokens or 2 * longest_answer(data.evaluation)
    limits = [limit for model in (models.teacher, models.student) if (limit := context_length(model)) is not None]
    new_tokens = min([new_tokens, *(limit - max(data.evaluation["prompt_length"]) for limit in limits)])
    for name in names:
        figures = evaluate_model(
            models.teacher if name == "teacher" else models.student,
            models.tokenizer,
            data.evaluation,
            data.collator,
            training.per_device_eval_batch_size,
            new_tokens if training.evaluate_generation else None,
        )
        summary.add_evaluation(name, figures)
        match = figures["exact_match"]
        shown = "" if match is None else f", exact match {100 * match:.1f} %"
        console.print(f"{name.replace('_', ' ').capitalize()}: perplexity {figures['perplexity']:.4g}{shown}")


def _train(console: Console, trainer: KavaTrainer, checkpoint: Path | None, summary: RunSummary) -> None:
    try:
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if not result.metrics:
            console.print("The checkpoint is at the last step already; nothing is left to train.")
    finally:
        summary.add_training(trainer.state.log_history, trainer.state.global_step)
        summary.content["throughput"] |= {"peak_memory_bytes": peak_memory_bytes(trainer.args.device)}
        summary.content["throughput"] |= trainer.throughput()


def _tell_alignment(console: Console, metrics: dict[str, float], collapse: str | None) -> None:
    """Print the final CosSim beside the figures that tell whether it means anything."""
    if "eval_centred_cos_sim" not in metrics:
        return
    status = status_text(alignment_status(metrics["eval_cos_sim"], collapse is not None), console.emoji)
    others = {"centred": "centred_cos_sim", "margin": "margin", "CKA to the teacher": "cka"}
    figures = ", ".join(f"{word} {metrics[f'eval_{name}']:.4f}" for word, name in others.items())
    console.print(f"Alignment: CosSim {metrics['eval_cos_sim']:.4f} {status} ({figures})")
    if collapse is not None:
        console.warn(
            f"{collapse} CosSim says nothing here. Raise lm_weight, lower projector_learning_rate or use more data."
        )


def _last_checkpoint(trainer: KavaTrainer) -> Path:
    return Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"


def _tell_interruption(console: Console, trainer: KavaTrainer, argv: list[str]) -> int:
    output = Path(trainer.args.output_dir)
    checkpoint = _last_checkpoint(trainer)
    console.stage("Interrupted")
    console.print(f"Saved after step {trainer.state.global_step}: {checkpoint} and {output / EMERGENCY_PROJECTOR}")
    console.print(f"Resume with: {resume_command(argv, checkpoint)}")
    return exit_code(trainer.emergency.received)


def _finish(
    console: Console, arguments: KavaArguments, models: Models, data: Data, trainer: KavaTrainer, summary: RunSummary
) -> None:
    """Save the finals, measure the student, write its card, and send it to the hub if asked."""
    training = arguments.training
    student_folder, projector = Path(training.final_dir) / FINAL_STUDENT, Path(training.final_dir) / FINAL_PROJECTOR
    if training.should_save:
        write_folder_atomically(student_folder, trainer.save_student)
    trainer.save_projector(projector)
    console.stage("Saved")
    console.print(f"Student: {student_folder}")
    console.print(f"Projector: {projector}")
    if data.evaluation is not None:
        metrics = trainer.evaluate()
        summary.add_final(metrics, trainer.collapse)
        _evaluate(console, arguments, models, data, summary, ("student_after",))
        _tell_alignment(console, metrics, trainer.collapse)
    if training.should_save:
        name = trainer.hub_model_id or FINAL_STUDENT
        card = render_model_card(name, arguments, summary.content)
        (student_folder / "README.md").write_text(card, encoding="utf-8")
        if training.push_to_hub:
            problem = push_student(student_folder, trainer.hub_model_id, arguments)
            console.print(f"Pushed to {trainer.hub_model_id}") if problem is None else console.warn(problem)
