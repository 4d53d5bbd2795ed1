"""What goes wrong in a training: what is survived is told and noted, and what is not has a sentence that helps."""

from collections.abc import Callable
from typing import Any

from ..config.arguments import KavaTrainingArguments
from ..utils.console import Console
from ..utils.errors import RunFailed
from .checkpoint import find_newest_checkpoint

NO_LABELS = "no_labels"
"""Kind of the problem that no token of some steps had a label."""


class Incidents:
    """Tells of what went wrong, and keeps a list of what was survived.

    Args:
        args: of the run.
        step: tells the last finished step.
    """

    def __init__(self, args: KavaTrainingArguments, step: Callable[[], int]) -> None:
        self._args, self._step = args, step
        self.console = Console(args.plain_output)
        self.problems: list[dict[str, Any]] = []
        """What went wrong and was survived: the step, the kind, and what was done."""

    @property
    def step(self) -> int:
        """The last finished step."""
        return self._step()

    def note(self, kind: str, action: str, step: int | None = None) -> None:
        """Add to `problems`; the step is the last finished one by default."""
        self.problems.append({"step": self.step if step is None else step, "kind": kind, "action": action})

    def tell_no_labels(self) -> None:
        """Say once that a line of the log stands for steps without a next token to learn."""
        if all(problem["kind"] != NO_LABELS for problem in self.problems):
            self.console.warn(
                f"Up to step {self.step} every label since the last line was -100, so no next token was learned. Give "
                "the answers labels, or set lm_weight to 0."
            )
            self.note(NO_LABELS, "went on without a next token to learn")

    def advice(self, otherwise: str = "There is no checkpoint yet; start afresh.") -> str:
        """What to resume from after the training went wrong, as a sentence; `otherwise` where there is nothing."""
        newest = find_newest_checkpoint(str(self._args.output_dir)).checkpoint
        return f"Resume from {newest}, which is sound." if newest else otherwise

    def smaller_evaluation(self) -> str:
        """What to write where memory runs out in an evaluation, as a sentence with the checkpoint to resume from."""
        return f"Lower per_device_eval_batch_size (now {self._args.per_device_eval_batch_size}). {self.advice()}"

    def not_finite(self, what: str) -> RunFailed:
        """The error for losses or weights that are no finite numbers any more."""
        return RunFailed(
            f"At step {self.step} {what} stopped being finite numbers. {self.advice()} Lower the learning rates."
        )

    def state_dict(self) -> dict[str, Any]:
        """The list, for a checkpoint."""
        return {"problems": self.problems}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put what a checkpoint lists before what has happened since."""
        self.problems[:] = [*state["problems"], *self.problems]
