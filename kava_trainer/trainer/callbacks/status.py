"""The progress bars and the status lines of a training run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, has_length

from ...evaluation.diagnostics import alignment_status
from ...utils.console import Console, status_text
from ...utils.progress_bar import Progress, progress_bar
from . import ALWAYS_LOGGED_STEPS


class StatusCallback(TrainerCallback):
    """Shows `Loss | CosSim | Status` on a progress bar and as a line at every logging step; a bar of evaluations too.

    Args:
        plain: no emoji and no progress bar.
    """

    def __init__(self, plain: bool = False) -> None:
        self._console = Console(plain)
        self._bar: Progress | None = None
        self._evaluation: Progress | None = None
        self._micro_batches, self._last_line = 0, ""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Open the bar at the step the run starts from."""
        self.close()
        steps, done = state.max_steps, state.global_step
        self._bar = progress_bar(steps, "Training", "step", initial=done, leave=True, told=True)
        self._micro_batches, self._last_line = 0, ""

    def on_substep_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show how far the step is, which may take minutes."""
        self._micro_batches += 1
        if self._bar is not None:
            parts = [f"micro-batch {self._micro_batches} of {args.gradient_accumulation_steps}", self._last_line]
            self._bar.note(" | ".join(filter(None, parts)))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance the bar; of a distillation have the last step logged, and those that the summary names."""
        self._micro_batches = 0
        if self._bar is not None:
            self._bar.note(self._last_line)
            self._bar.update()
        if not args.reads_teacher or args.logging_strategy == IntervalStrategy.NO:
            return
        ends = state.global_step >= state.max_steps and args.logging_strategy == IntervalStrategy.STEPS
        control.should_log |= ends or state.global_step in ALWAYS_LOGGED_STEPS

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print one line for each training log."""
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        parts = [f"Loss: {logs['loss']:.4f}"]
        if "cos_sim" in logs:
            status = alignment_status(logs["cos_sim"], collapsed=bool(logs.get("collapsed")))
            parts.append(f"CosSim: {logs['cos_sim']:.4f} {status_text(status, self._console.emoji)}")
        self._console.print(f"[Step {state.global_step:04d}] {' | '.join(parts)}")
        self._last_line = " | ".join(parts)
        if self._bar is not None:
            self._bar.set_postfix_str(self._last_line)
            self._bar.lines_begin_anew()

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Close the bars."""
        self.close()

    @contextmanager
    def evaluating(self, loader: Any) -> Iterator[None]:
        """Within the `with` block the batches of a loader are evaluated."""
        self._open_evaluation(loader)
        try:
            yield
        finally:
            self._close_evaluation()

    def on_prediction_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance the bar of the evaluation, of whose batches all ranks have equally many."""
        if self._evaluation is not None:
            self._evaluation.update()

    def _open_evaluation(self, loader: Any) -> None:
        self._close_evaluation()
        self._evaluation = progress_bar(len(loader) if has_length(loader) else None, "Evaluating", "batch")

    def _close_evaluation(self) -> None:
        if self._evaluation is not None:
            self._evaluation.close()
            self._evaluation = None

    def close(self) -> None:
        """Close the bars, however far they are."""
        self._close_evaluation()
        if self._bar is not None:
            self._bar.close()
            self._bar = None
