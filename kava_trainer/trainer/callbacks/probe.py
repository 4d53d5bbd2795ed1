"""What a trainer does with the alignment probe: measures, logs, calls a collapse, and remembers."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from ...data.selection import choose_examples
from ...distillation.loss_terms import LossTerms
from ...evaluation.diagnostics import Diagnostics, collapse_remedy
from ...evaluation.probe import MINIMUM_SHARE, PROBE_TOKENS, AlignmentProbe, ProbeResult, ShareWatch
from ...utils.memory import needs_memory
from ..batches import SteppingTrainer


class ProbingTrainer(SteppingTrainer):
    """The part of `KavaTrainer` that measures the alignment on a fixed probe."""

    terms: LossTerms
    resumed_from: str | None = None
    """The checkpoint that the training goes on from, or None."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.probe: AlignmentProbe | None = None
        self.forget()

    def forget(self) -> None:
        """Also what the probe has shown."""
        super().forget()
        self.last_probe: ProbeResult | None = None
        self._probed_at = -1
        fading = {"mercator", "mse"} if self.args.alignment_schedule != "constant" else set()
        self._shares = ShareWatch({"anchor", *fading})

    @property
    def progress(self) -> float:
        """Share of the optimizer steps that are done, from 0 to 1."""
        return self.state.global_step / max(self.state.max_steps, 1)

    def smaller_evaluation(self) -> str:
        """What to write where memory runs out in an evaluation, as a sentence with the checkpoint to resume from."""
        return f"Lower per_device_eval_batch_size (now {self.args.per_device_eval_batch_size}). {self.advice()}"

    def make_probe(self) -> AlignmentProbe | None:
        """The fixed probe, where something is aligned and there are held-out examples; of several sets the first's."""
        held_out, self._probed_set = self.eval_dataset, ""
        if isinstance(held_out, dict) and held_out:
            name, held_out = next(iter(held_out.items()))
            self._probed_set = f"eval_{name}"
        if self.terms.teacher is None or not self.args.aligns or not has_length(held_out):
            return None
        sizes = (self.args.per_device_eval_batch_size, self.args.per_device_train_batch_size)
        return AlignmentProbe(choose_examples(held_out, PROBE_TOKENS), self.data_collator, *sizes)

    def probe_belongs_to(self, prefix: str) -> bool:
        """Whether an evaluation, told by the prefix of its metrics, runs the probe: of several sets only the first."""
        return self._probed_set in ("", prefix)

    def run_probe(self) -> ProbeResult | None:
        """Measure the alignment on the probe; None where there is no probe. Terms that do nothing are named once."""
        if self.probe is None:
            return None
        with needs_memory("while the probe measured the alignment", self.smaller_evaluation):
            result = self.probe.measure(self.model, self.terms, self.progress)
        for name in self._shares.without_effect(result.gradient_shares):
            self.console.warn(
                f"The term {name} gives less than {MINIMUM_SHARE:.0%} of the student's gradient; raise {name}_weight, "
                "or set it to 0 to save its cost."
            )
        return result

    def log_first_probe(self) -> None:
        """Log where the run starts. It is not called collapsed: an untrained pair has nothing to agree on."""
        if self.resumed_from is not None:
            return
        result = self.run_probe()
        if result is not None:
            self.log(result.metrics("probe"))

    def log_probe(self) -> None:
        """Log the alignment so far, and call a collapse, unless an evaluation has just done so."""
        if self._probed_at == self.state.global_step:
            return
        result = self.run_probe()
        if result is not None:
            self.note_probe(result)
            self.log(result.metrics("probe"))

    @property
    def collapse(self) -> str | None:
        """Why the alignment counted as collapsed at the last evaluation; None where it did not."""
        return None if self.last_probe is None else self.last_probe.collapse

    def note_probe(self, probed: ProbeResult) -> None:
        """Keep a measurement; say once why the alignment counts as collapsed, and what to change."""
        if probed.collapse is not None and self.collapse is None:
            trained, held = self.args.projector_direction == "teacher_to_student", bool(self.target.decoders)
            supervised = self.args.lm_weight > 0 or self.args.kd_weight > 0
            remedy = collapse_remedy(trained and self.args.projector_anchor != "pca", held, supervised)
            self.console.warn(f"{probed.collapse} CosSim says nothing here. {remedy}")
        self.last_probe, self._probed_at = probed, self.state.global_step

    def progress_state(self) -> dict[str, Any]:
        """Also what the probe has shown so far."""
        probed = self.last_probe
        return super().progress_state() | {
            "collapse": probed and [[pair.to_dict() for pair in probed.pairs], probed.shares, probed.collapse],
            "shares": self._shares.state(),
            "probed_at": self._probed_at,
            "probe_due": self.emergency.received is None or self.emergency.save_was_due,
        }

    def restore_progress(self, state: dict[str, Any]) -> None:
        """Undo `progress_state`."""
        if state["collapse"] is not None:
            pairs, shares, collapse = state["collapse"]
            self.last_probe = ProbeResult([Diagnostics(**pair) for pair in pairs], shares, collapse)
        self._shares.restore(state["shares"])
        self._probed_at = state["probed_at"]
        super().restore_progress(state)

    def catch_up(self, state: dict[str, Any], checkpoint: str) -> None:
        """Do what was due at a checkpoint."""
        super().catch_up(state, checkpoint)
        if state["probe_due"] and self.args.aligns:  # it follows the save
            self.log_probe()


class ProbeCallback(TrainerCallback):
    """Runs the probe when training begins and whenever a checkpoint was saved; evaluations run it themselves.

    Args:
        first_probe: measures and logs where the run starts.
        probe: measures and logs the run so far.
    """

    def __init__(self, first_probe: Callable[[], Any], probe: Callable[[], Any]) -> None:
        self._first_probe, self._probe = first_probe, probe

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the start."""
        self._first_probe()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure what was saved, unless the training ends here."""
        if not control.should_training_stop:
            self._probe()
