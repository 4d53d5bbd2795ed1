"""The alignment on a fixed probe: measured at the start, beside every checkpoint and with every evaluation."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import has_length

from ...config.arguments import KavaTrainingArguments
from ...config.checks import heaviest_alignment
from ...data.selection import choose_examples
from ...distillation.loss_terms import SCHEDULED_TERMS, LossTerms
from ...distillation.model import DistillationModel
from ...evaluation.diagnostics import Circumstances, Diagnostics, collapse_remedy
from ...evaluation.probe import MINIMUM_SHARE, PROBE_TOKENS, AlignmentProbe, ProbeResult, ShareWatch, worst_pair
from ...utils.memory import needs_memory
from ..incidents import Incidents


class ProbeCallback(TrainerCallback):
    """Measures the alignment, logs it, calls a collapse, and remembers what was seen.

    Args:
        args: of the run.
        incidents: warns, and advises where memory runs out.
        log: writes a log line.
    """

    def __init__(
        self, args: KavaTrainingArguments, incidents: Incidents, log: Callable[[dict[str, float]], None]
    ) -> None:
        self._args, self._incidents, self._log = args, incidents, log
        self.fixed: AlignmentProbe | None = None
        """The probe, where something is aligned and there are held-out examples."""
        self.sparing = False
        """Whether the gradient of each term is measured at the start alone, on one batch: the training is short."""
        self._set = ""
        self.forget()

    def forget(self) -> None:
        """Begin a training without what an earlier one has shown."""
        self.last: ProbeResult | None = None
        self._probed_at, self._whole_before = -1, False
        fading = set(SCHEDULED_TERMS) if self._args.alignment_schedule != "constant" else set()
        rising = {"kd"} if self._args.kd_schedule != "constant" else set()
        self._shares = ShareWatch({"anchor", *fading, *rising})

    def choose(self, held_out: Any, collator: Callable[[list[Any]], dict[str, Any]], terms: LossTerms) -> None:
        """Fix the examples: the first ones that are held out, of several sets the first one's.

        Args:
            held_out: `eval_dataset` of the trainer.
            collator: pads them.
            terms: run the models and compute the losses.
        """
        self._set, self._terms, self.fixed = "", terms, None
        if isinstance(held_out, dict) and held_out:
            name, held_out = next(iter(held_out.items()))
            self._set = f"eval_{name}"
        if terms.teacher is not None and self._args.aligns and has_length(held_out):
            sizes = (self._args.per_device_eval_batch_size, self._args.per_device_train_batch_size)
            self.fixed = AlignmentProbe(choose_examples(held_out, PROBE_TOKENS), collator, *sizes)

    def belongs_to(self, prefix: str) -> bool:
        """Whether an evaluation, told by the prefix of its metrics, runs the probe: of several sets only the first."""
        return self._set in ("", prefix)

    @property
    def collapse(self) -> str | None:
        """Why the alignment counted as collapsed at the last measurement; None where it did not."""
        return None if self.last is None else self.last.collapse

    def measure(self, model: DistillationModel, progress: float) -> ProbeResult | None:
        """Measure the alignment; None where there is no probe. Terms that do nothing are named once.

        Args:
            model: student and projectors, not wrapped.
            progress: share of the training that is done, for the weights of the terms.
        """
        if self.fixed is None or not self._args.aligns:
            return None
        with needs_memory("while the probe measured the alignment", self._incidents.smaller_evaluation):
            batches = None if not self.sparing else int(progress == 0)
            result = self.fixed.measure(model, self._terms, progress, batches)
        for name in self._shares.without_effect(result.gradient_shares):
            self._incidents.console.warn(
                f"The term {name} gives less than {MINIMUM_SHARE:.0%} of the student's gradient; raise {name}_weight, "
                "or set it to 0 to save its cost."
            )
        return result

    def note(self, probed: ProbeResult, step: int) -> None:
        """Keep a measurement; say once why the alignment counts as collapsed, and what to change."""
        if probed.collapse is not None and self.collapse is None:
            args = self._args
            case = Circumstances(
                direction=args.projector_direction if args.projects else "none",
                anchor=args.projector_anchor,
                supervised=args.learns_next_tokens or args.kd_weight > 0,
                step=step,
                whole_before=self._whole_before,
                cos_sim=probed.pairs[worst_pair(probed.reasons, probed.pairs)].cos_sim,
                weight=heaviest_alignment(vars(args)),
            )
            remedy = collapse_remedy(case)
            self._incidents.console.warn(f"{probed.collapse} CosSim says nothing here. {remedy}")
        self.last, self._probed_at = probed, step

    def log_measured(self, model: DistillationModel, state: TrainerState) -> None:
        """Log the alignment so far, and call a collapse, unless an evaluation has just done so."""
        if self._probed_at == state.global_step:
            return
        result = self.measure(model, progress_of(state))
        if result is not None:
            self.note(result, state.global_step)
            self._log(result.metrics("probe"))

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log where a run starts. It is not called collapsed: an untrained pair has nothing to agree on."""
        if state.global_step > 0:  # it is resumed
            return
        result = self.measure(kwargs["model"], progress_of(state))
        if result is not None:
            self._whole_before = result.collapse is None
            self._log(result.metrics("probe"))

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure what was saved, unless the training ends here."""
        if not control.should_training_stop:
            self.log_measured(kwargs["model"], state)

    def state_dict(self) -> dict[str, Any]:
        """What the probe has shown so far, for a checkpoint."""
        last = self.last
        return {
            "collapse": last and [[pair.to_dict() for pair in last.pairs], last.shares, last.collapse],
            "shares": self._shares.state(),
            "probed_at": self._probed_at,
            "whole_before": self._whole_before,
            "probed_pairs": last and [[*map(list, last.layers)], last.reasons],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what a checkpoint knows."""
        if state["collapse"] is not None:
            pairs, shares, collapse = state["collapse"]
            layers, reasons = state.get("probed_pairs") or ([], [])  # one of before does not tell
            found = [Diagnostics(**pair) for pair in pairs]
            self.last = ProbeResult(found, shares, collapse, layers=[tuple(own) for own in layers], reasons=reasons)
        self._shares.restore(state["shares"])
        self._probed_at = state["probed_at"]
        self._whole_before = state.get("whole_before", False)


def progress_of(state: TrainerState) -> float:
    """Share of the optimizer steps that are done, from 0 to 1."""
    return state.global_step / max(state.max_steps, 1)
