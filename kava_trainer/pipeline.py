"""One run from arguments to files, stage by stage, with what the user sees of each."""

import math
import sys
from pathlib import Path

import torch
import transformers

from .alignment import alignment_status
from .arguments import KavaArguments
from .callbacks.emergency import EMERGENCY_PROJECTOR, exit_code
from .capture import context_length
from .checkpoint_io import is_whole, list_checkpoints, resolve_checkpoint, write_folder_atomically
from .console import Console, status_text
from .control import build_control, forget_control, train_control
from .disk import make_folder
from .environment import (
    describe_environment,
    describe_memory,
    device_name,
    peak_memory_bytes,
    quieten,
    resume_command,
    use_all_cores,
)
from .errors import BadRequest, RunFailed
from .evaluation import evaluate_model, longest_answer
from .hub import push_student, render_model_card
from .preparation import (
    Data,
    Models,
    build_trainer,
    check_teacher,
    fill_cache,
    load_data,
    load_models,
    load_tokenizers,
    open_cache,
    tell_memory,
)
from .summary import RunSummary
from .trainer import KavaTrainer
from .verdict import CONTROL_FAILED, judge

_WHO = {
    "teacher": "Teacher",
    "student_before": "Student before",
    "student_after": "Student after",
    "control_sft": "Control (next-token loss alone)",
}
FINAL_STUDENT, FINAL_PROJECTOR = "final_student", "final_projector.pth"


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
    tokenizer = load_tokenizers(arguments)
    data = load_data(console, arguments, tokenizer)
    summary.content["throughput"]["estimated_memory_bytes"] = tell_memory(console, arguments)
    models = load_models(console, arguments, tokenizer)
    trainer = build_trainer(console, arguments, models, data)
    cache = open_cache(arguments, models, trainer)
    check_teacher(console, models, data, training.per_device_eval_batch_size)
    console.stage("Evaluation")
    _evaluate(console, arguments, models, data, summary, ("teacher", "student_before"))
    if cache is not None:
        fill_cache(console, arguments, cache, models, data, trainer)
    status = "failed"  # from here on the output folder is this run's, and its summary is written however it ends
    try:
        status, code = _train_and_judge(console, arguments, models, data, trainer, checkpoint, summary, argv)
        return code
    except BadRequest:
        status = None
        raise
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        if training.should_save and status is not None:
            if status == "failed":
                summary.content["verdict"] |= {"success": False, "reasons": ["The run did not complete."]}
            summary.content["checkpoints"] = [str(folder) for folder in list_checkpoints(training.output_dir)]
            path = summary.write(training.output_dir, status)
            console.print(f"Summary: {path}")


def _train_and_judge(
    console: Console,
    arguments: KavaArguments,
    models: Models,
    data: Data,
    trainer: KavaTrainer,
    checkpoint: Path | None,
    summary: RunSummary,
    argv: list[str],
) -> tuple[str, int]:
    """Everything from the first step on; the status and the exit code of the run."""
    console.stage("Training")
    finished_before = checkpoint is not None and trainer.finished_state(str(checkpoint)) is not None
    if not finished_before:
        forget_control(arguments.training)
    _train(console, trainer, checkpoint, summary)
    if _was_interrupted(trainer):
        return "interrupted", _tell_interruption(console, trainer, trainer, argv)
    collapse = _finish(console, arguments, models, data, trainer, summary)
    if arguments.training.run_control:
        trainer.release()
        control = _run_control(console, arguments, models, data, summary, resume=finished_before)
        if control is not None and _was_interrupted(control):
            return "interrupted", _tell_interruption(console, control, trainer, argv)
    _conclude(console, arguments, trainer, summary, collapse)
    return "completed", 0


def _prepare_folders(arguments: KavaArguments) -> None:
    for name in ("output_dir", "final_dir"):
        make_folder(name, getattr(arguments.training, name))
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
        console.print(f"{_WHO[name]}: perplexity {figures['perplexity']:.4g}{shown}")


def _train(console: Console, trainer: KavaTrainer, checkpoint: Path | None, summary: RunSummary) -> None:
    try:
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if not result.metrics:
            console.print("The checkpoint is at the last step already; nothing is left to train.")
        if (peak := peak_memory_bytes(trainer.args.device)) is not None:
            whose = "on the device" if trainer.args.device.type == "cuda" else "of the whole process"
            console.print(f"Peak memory so far, {whose}: {peak / 1e9:.2f} GB")
    finally:
        summary.add_training(trainer.state.log_history, trainer.state.global_step)
        summary.content["throughput"] |= {"peak_memory_bytes": peak_memory_bytes(trainer.args.device)}
        summary.content["throughput"] |= trainer.throughput()


def _run_control(
    console: Console, arguments: KavaArguments, models: Models, data: Data, summary: RunSummary, resume: bool
) -> KavaTrainer | None:
    """Train and measure the control. Where it breaks the run goes on without it: the student is safe already."""
    console.stage("Control: the same start, data and steps with the next-token loss alone")
    try:
        control = build_control(arguments, models, data)
        train_control(control, resume)
        if not _was_interrupted(control):
            own = Models(models.teacher, control.student, models.tokenizer)
            _evaluate(console, arguments, own, data, summary, ("control_sft",))
        return control
    except (RunFailed, BadRequest, torch.OutOfMemoryError) as error:
        console.warn(f"The control broke off, so there is nothing to compare with: {error}")
        action = "went on without the control"
        summary.content["problems"].append({"step": None, "kind": CONTROL_FAILED, "action": action})
        return None


def _tell_alignment(console: Console, metrics: dict[str, float], collapse: str | None) -> None:
    """Print the final CosSim beside the figures that tell whether it means anything."""
    if "eval_centred_cos_sim" not in metrics:
        return
    status = status_text(alignment_status(metrics["eval_cos_sim"], collapse is not None), console.emoji)
    others = {"centred": "centred_cos_sim", "margin": "margin", "CKA to the teacher": "cka"}
    figures = ", ".join(f"{word} {metrics[f'eval_{name}']:.4f}" for word, name in others.items())
    console.print(f"Alignment: CosSim {metrics['eval_cos_sim']:.4f} {status} ({figures})")


def _last_checkpoint(trainer: KavaTrainer) -> Path:
    return Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"


def _was_interrupted(trainer: KavaTrainer) -> bool:
    """Whether a signal ended the training and a checkpoint was written for it."""
    return trainer.emergency.received is not None and _last_checkpoint(trainer).is_dir()


def _tell_interruption(console: Console, stopped: KavaTrainer, main: KavaTrainer, argv: list[str]) -> int:
    """Say what was saved and how to go on.

    Args:
        stopped: the trainer that the signal ended: the run's own or its control's.
        main: the run's own, whose checkpoint the command names.
    """
    saved = [_last_checkpoint(stopped)]
    if stopped.args.aligns:
        saved.append(Path(stopped.args.output_dir) / EMERGENCY_PROJECTOR)
    console.stage("Interrupted")
    console.print(f"Saved after step {stopped.state.global_step}: {' and '.join(map(str, saved))}")
    console.print(f"Resume with: {resume_command(argv, _last_checkpoint(main))}")
    return exit_code(stopped.emergency.received)


def _finish(
    console: Console, arguments: KavaArguments, models: Models, data: Data, trainer: KavaTrainer, summary: RunSummary
) -> str | None:
    """Save the finals and measure the student; why the alignment counts as collapsed, if it does."""
    training = arguments.training
    student_folder, projector = Path(training.final_dir) / FINAL_STUDENT, Path(training.final_dir) / FINAL_PROJECTOR
    if training.should_save:
        write_folder_atomically(student_folder, trainer.save_student)
    trainer.save_projector(projector)
    console.stage("Saved")
    console.print(f"Student: {student_folder}")
    console.print(f"Projector: {projector}")
    if data.evaluation is None:
        return None
    console.stage("Evaluation")
    metrics = trainer.evaluate()
    summary.add_final(metrics)
    _evaluate(console, arguments, models, data, summary, ("student_after",))
    _tell_alignment(console, metrics, trainer.collapse)
    return trainer.collapse


def _conclude(
    console: Console, arguments: KavaArguments, trainer: KavaTrainer, summary: RunSummary, collapse: str | None
) -> None:
    """Judge the run, write the student's card, and send it to the hub if asked."""
    training = arguments.training
    supervised = training.lm_weight > 0 or training.kd_weight > 0
    broken = [str(folder) for folder in list_checkpoints(training.output_dir) if not is_whole(folder)]
    summary.content["verdict"] = judge(summary.content, collapse, supervised, broken)
    _show_verdict(console, summary)
    if not training.should_save:
        return
    student_folder = Path(training.final_dir) / FINAL_STUDENT
    card = render_model_card(trainer.hub_model_id or FINAL_STUDENT, arguments, summary.content)
    (student_folder / "README.md").write_text(card, encoding="utf-8")
    if training.push_to_hub:
        summary.write(training.output_dir, "completed")  # all that is local comes before the network
        problem = push_student(student_folder, trainer.hub_model_id, arguments)
        if problem is None:
            console.print(f"Pushed to {trainer.hub_model_id}")
        else:
            console.warn(problem)
            summary.content["problems"].append({"step": None, "kind": "hub", "action": problem})


def _show_verdict(console: Console, summary: RunSummary) -> None:
    """The measured models side by side, then the verdict in sentences."""
    console.stage("Verdict")
    measured = {name: figures for name, figures in summary.content["evaluation"].items() if figures is not None}
    for name, figures in measured.items():
        match = "" if figures["exact_match"] is None else f"   exact match {100 * figures['exact_match']:5.1f} %"
        console.print(
            f"{_WHO[name]:<32} perplexity {figures['perplexity']:<9.4g} cross-entropy {figures['cross_entropy']:7.4f}"
            f"{match}"
        )
    verdict = summary.content["verdict"]
    console.print({True: "Success.", False: "No success.", None: "No verdict."}[verdict["success"]])
    for reason in verdict["reasons"]:
        console.print(f"- {reason}")
