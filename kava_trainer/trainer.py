"""`KavaTrainer`: a `transformers.Trainer` whose loss aligns the student's hidden states with a frozen teacher's."""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, TrainerState
from transformers.integrations.liger import apply_liger_kernel
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, has_length

from .alignment import collapse_remedy
from .arguments import KavaTrainingArguments
from .calibration import calibrate, check_enough_tokens
from .callbacks.emergency import EmergencyCheckpointCallback
from .callbacks.guard import guard_trackers
from .callbacks.probe import ProbeCallback
from .callbacks.projector_save import ProjectorSaveCallback
from .callbacks.status import StatusCallback
from .checkpoint_io import TRAINER_STATE_FILE
from .collating import DistillationCollator
from .console import Console
from .heads import vocabulary_size
from .losses import IGNORED
from .metrics import TokenMeans
from .probe import MINIMUM_SHARE, AlignmentProbe, ProbeResult, ShareWatch, choose_examples
from .stepping import SteppingTrainer
from .student import DistillationModel
from .targets import HiddenStateTarget
from .teacher import OnlineTeacher, TeacherSource
from .teacher_cache import CachedTeacher
from .terms import LossTerms


class KavaTrainer(SteppingTrainer):
    """Distils a frozen teacher into a student.

    The model that Trainer sees is a `DistillationModel`: student and projectors in one module, so that wrappers,
    clipping and accumulation treat them as one. `trainer.student` is the plain student.

    Args:
        student: the `PreTrainedModel` to train.
        teacher: where the teacher's states come from; None where no term needs them (only `lm_weight` above 0).
        target: what is aligned, with its projectors.
        args: `KavaTrainingArguments`.
        kwargs: as for `Trainer`: `train_dataset`, `eval_dataset`, `data_collator`, `processing_class`, `callbacks`,
            `optimizers`, `compute_metrics`, ...
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: TeacherSource | None,
        target: HiddenStateTarget,
        args: KavaTrainingArguments,
        **kwargs: Any,
    ) -> None:
        target.requires_grad_(args.aligns)
        super().__init__(model=DistillationModel(student, target), args=args, **kwargs)
        self.terms = LossTerms(args, target, teacher, vocabulary_size(student), self.accelerator.autocast)
        self.train_means, self.eval_means = TokenMeans(), TokenMeans()
        self.forget_throughput()
        self.emergency = EmergencyCheckpointCallback()
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        self._console = Console(args.plain_output)
        self.problems: list[dict[str, Any]] = []
        guard_trackers(self.callback_handler.callbacks, args.report_to, self._console, self.problems)
        self._choose_packing()
        self.probe: AlignmentProbe | None = None
        if isinstance(teacher, CachedTeacher):
            self.read_cache(teacher)
        else:
            self.probe = self._make_probe()
        self.last_probe: ProbeResult | None = None
        fading = {"mercator", "mse"} if args.alignment_schedule != "constant" else set()
        self._shares = ShareWatch({"anchor", *fading})
        self.add_callback(self.emergency)
        self.add_callback(StatusCallback(args.plain_output))
        if args.aligns:
            self.add_callback(ProbeCallback(self._log_first_probe, self._log_probe))
            self.add_callback(ProjectorSaveCallback())

    @property
    def teacher(self) -> TeacherSource | None:
        """Where the teacher's states come from."""
        return self.terms.teacher

    def read_cache(self, teacher: CachedTeacher) -> None:
        """From now on take the teacher's states from a cache, in place of a model that ran so far.

        Raises:
            ValueError: if the data collator is not KAVA's, which alone puts the states into the batches.
        """
        if not isinstance(self.data_collator, DistillationCollator):
            raise ValueError("A cached teacher needs DistillationCollator as data_collator: it reads the states.")
        self.terms.teacher = teacher
        self.data_collator = self.data_collator.reading(teacher.read)
        self.probe = self._make_probe()

    def _choose_packing(self) -> None:
        """Pack where both models can; else say why in one line."""
        models = {"student": self.student}
        if isinstance(self.teacher, OnlineTeacher):
            models["teacher"] = self.teacher.model
        if reason := self.choose_packing(models):
            self._console.print(f"No packing, because {reason}; micro-batches are padded to their longest example.")

    def _make_probe(self) -> AlignmentProbe | None:
        """The fixed probe, where something is aligned and there is one set of held-out examples."""
        if self.teacher is None or not self.args.aligns or not has_length(self.eval_dataset):
            return None
        if isinstance(self.eval_dataset, dict):
            return None
        sizes = (self.args.per_device_eval_batch_size, self.args.per_device_train_batch_size)
        return AlignmentProbe(choose_examples(self.eval_dataset), self.data_collator, *sizes)

    def run_probe(self) -> ProbeResult | None:
        """Measure the alignment on the probe; None where there is no probe. Terms that do nothing are named once."""
        if self.probe is None:
            return None
        result = self.probe.measure(self.model, self.terms, self.progress)
        for name in self._shares.without_effect(result.gradient_shares):
            self._console.warn(
                f"The term {name} gives less than {MINIMUM_SHARE:.0%} of the student's gradient; raise {name}_weight, "
                "or set it to 0 to save its cost."
            )
        return result

    def _log_first_probe(self) -> None:
        """Log where the run starts. It is not called collapsed: an untrained pair has nothing to agree on."""
        result = self.run_probe()
        if result is not None:
            self.log(result.metrics("probe"))

    def _log_probe(self) -> None:
        """Log the alignment so far, and call a collapse."""
        result = self.run_probe()
        if result is not None:
            self._note_probe(result)
            self.log(result.metrics("probe"))

    def calibration_examples(self) -> list[dict[str, Any]]:
        """The training examples that the projectors start from: drawn with the run's seed where the data can be.

        Raises:
            BadRequest: if they hold too few tokens for a fit.
        """
        data = self.train_dataset
        data = data.shuffle(seed=self.args.seed) if hasattr(data, "shuffle") else data
        examples = choose_examples(data, self.args.calibration_tokens)
        check_enough_tokens(self.target, sum(len(example["input_ids"]) for example in examples))
        return examples

    def calibrate(self) -> None:
        """Start the projectors from training examples, as `projector_anchor` and `projector_init` ask.

        Raises:
            BadRequest: as `calibration_examples`.
        """
        size, fit = self.args.per_device_eval_batch_size, self.args.projector_init == "least_squares"
        examples = self.calibration_examples()
        calibrate(self.model, self.teacher, examples, self.data_collator, size, self._sum_over_ranks, fit)

    def release(self) -> None:
        """Give the memory of the optimizer and of the wrapped model back; the trainer cannot train any more."""
        self.optimizer = self.lr_scheduler = None
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        self.model.to("cpu")

    @property
    def collapse(self) -> str | None:
        """Why the alignment counted as collapsed at the last evaluation; None where it did not."""
        return None if self.last_probe is None else self.last_probe.collapse

    def _note_probe(self, probed: ProbeResult) -> None:
        """Keep a measurement; say once why the alignment counts as collapsed, and what to change."""
        if probed.collapse is not None and self.collapse is None:
            trained, held = self.args.projector_direction == "teacher_to_student", bool(self.target.decoders)
            supervised = self.args.lm_weight > 0 or self.args.kd_weight > 0
            remedy = collapse_remedy(trained and self.args.projector_anchor != "pca", held, supervised)
            self._console.warn(f"{probed.collapse} CosSim says nothing here. {remedy}")
        self.last_probe = probed

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The weighted sum of the loss terms on one micro-batch.

        Args:
            model: the wrapped student and projectors.
            inputs: a batch of `collating`.
            return_outputs: also return the student's `last_hidden_state` [B, T, d_s].
            num_items_in_batch: real tokens and answer tokens [2] of the whole optimizer step; by default this batch's.
        """
        training = torch.is_grad_enabled()
        means, progress = (self.train_means, self.progress) if training else (self.eval_means, 0.0)
        weights = self.terms.weights(progress)
        with self.stopwatch.measure("teacher") if training else nullcontext():
            teacher_states = self.terms.teacher_states(inputs)
        outputs = self.terms.student_outputs(model, inputs, teacher_states, weights)
        loss = self.terms.loss(outputs, inputs, weights, num_items_in_batch, means)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the ranks' gradients will be averaged
        return (loss, {"last_hidden_state": outputs.last_hidden_state}) if return_outputs else loss

    @property
    def progress(self) -> float:
        """Share of the optimizer steps that are done, from 0 to 1."""
        return self.state.global_step / max(self.state.max_steps, 1)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as `Trainer.train` does; the signal handlers in force before are back however it ends.

        A checkpoint that is already at the last step is loaded, and nothing is trained.
        """
        self.forget_throughput()
        if self.args.use_liger_kernel:  # Trainer would look at the wrapped model and find no PreTrainedModel
            apply_liger_kernel(self.student, self.args.liger_kernel_config)
        if isinstance(resume_from_checkpoint, str) and (state := self.finished_state(resume_from_checkpoint)):
            self._load_from_checkpoint(resume_from_checkpoint)
            self.state = state
            return TrainOutput(state.global_step, 0.0, {})
        if self.args.calibrates and not resume_from_checkpoint:
            self.calibrate()
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.emergency.restore_handlers()

    def finished_state(self, checkpoint: str) -> TrainerState | None:
        """The state of a checkpoint with no step left to train, else None."""
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_FILE))
        *_, max_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        return state if state.global_step >= max_steps else None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer that `args.optim` names, with the projectors in groups of their own learning rate.

        Trainer's decay and no-decay groups are kept; each is split into student and projectors.
        """
        if self.optimizer is not None:
            return super().create_optimizer(model)
        optimizer = super().create_optimizer(model)
        own = {id(parameter) for parameter in self.target.parameters()}
        for group in list(optimizer.param_groups):
            projector = [parameter for parameter in group["params"] if id(parameter) in own]
            if projector:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
                rest = {name: value for name, value in group.items() if name != "params"}
                rest |= {"params": projector, "lr": self.args.projector_learning_rate}
                optimizer.add_param_group(rest)
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the token means since the last line to a training log line.

        Raises:
            RunFailed: if the loss is no finite number any more, before anything else is saved.
        """
        if "loss" in logs:
            means = self.train_means.drain(self._sum_over_ranks)
            logs |= means
            self.stopwatch.seconds()  # the line has waited for the device anyway, and events need not pile up
            logs["projector_learning_rate"] = self._projector_learning_rate()
            logs["collapsed"] = float(self.collapse is not None)
            broken = [name for name in ("loss", *means) if not math.isfinite(logs[name])]
            if broken:
                raise self.not_finite(" and ".join(broken))
        super().log(logs, start_time)

    def _projector_learning_rate(self) -> float:
        own = {id(parameter) for parameter in self.target.parameters()}
        rates = [g["lr"] for g in self.optimizer.param_groups if any(id(p) in own for p in g["params"])]
        return float(rates[0]) if rates else 0.0

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Loss on one evaluation batch; also logits at every position and labels where they are asked for."""
        inputs = self._without_repeated(self._prepare_inputs(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            if prediction_loss_only:
                return loss, None, None
            return loss, self.model.head(outputs["last_hidden_state"]), inputs["labels"]

    def _without_repeated(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Take the examples out of every mean that accelerate repeats to give all ranks equally many."""
        state, rows = self.accelerator.gradient_state, len(inputs["input_ids"])
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return inputs
        first = self.args.process_index * self.args.eval_batch_size
        repeated = torch.arange(first, first + rows, device=inputs["input_ids"].device) >= state.remainder
        counted = inputs["attention_mask"].bool() & ~repeated.unsqueeze(1)
        ignored = ~counted.flatten()[inputs["answer_index"]]
        return {
            **inputs,
            "counted": counted,
            "labels": inputs["labels"].masked_fill(~counted, IGNORED),
            "next_tokens": inputs["next_tokens"].masked_fill(ignored, IGNORED),
        }

    def evaluation_loop(
        self, dataloader: DataLoader, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Trainer's loop, plus `cos_sim`, each term's `<term>_loss` and `perplexity` as exact token means.

        `loss` is the sum of the terms with the weights of the first step, so that a schedule does not lower it. An
        evaluation also runs the probe; its figures have the same prefix.
        """
        prefix = metric_key_prefix
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=prefix, **kwargs)
        means = self.eval_means.drain(self._sum_over_ranks)
        output.metrics[f"{prefix}_loss"] = sum(value for name, value in means.items() if name.endswith("_weighted"))
        output.metrics.update({f"{prefix}_{name}": value for name, value in means.items()})
        if "lm_loss" in means:
            output.metrics[f"{prefix}_perplexity"] = math.exp(min(means["lm_loss"], 700))
        if description == "Evaluation" and (probed := self.run_probe()) is not None:
            self._note_probe(probed)
            output.metrics.update({k: v for k, v in probed.metrics(prefix).items() if k not in output.metrics})
        return output
