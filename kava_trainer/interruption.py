"""What the user reads after a signal: what was saved, and the command that goes on."""

from pathlib import Path

from .callbacks.emergency import EMERGENCY_PROJECTOR
from .console import Console
from .environment import resume_command
from .trainer import KavaTrainer


def last_checkpoint(trainer: KavaTrainer) -> Path:
    """Where the checkpoint of the last step is, if it was written."""
    return Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"


def was_interrupted(trainer: KavaTrainer) -> bool:
    """Whether a signal ended the training."""
    return trainer.emergency.received is not None


def tell_interruption(console: Console, stopped: KavaTrainer, main: KavaTrainer, argv: list[str]) -> None:
    """Say what was saved and how to go on.

    Args:
        console: prints.
        stopped: the trainer that the signal ended: the run's own or its control's.
        main: the run's own, whose checkpoint the command names.
        argv: the command line without the program.
    """
    saved = [last_checkpoint(stopped), Path(stopped.args.output_dir) / EMERGENCY_PROJECTOR]
    saved = [str(path) for path in saved if path.exists()]
    console.stage("Interrupted")
    if last_checkpoint(stopped).is_dir():
        console.print(f"Saved after step {stopped.state.global_step}: {' and '.join(saved)}")
    if last_checkpoint(main).is_dir():
        console.print(f"Resume with: {resume_command(argv, last_checkpoint(main))}")
    elif main.state.global_step == 0:
        console.print(f"No step was done. Start again with: {resume_command(argv, None)}")
    else:
        console.print(f"There is no checkpoint of step {main.state.global_step}. {main.advice()}")
