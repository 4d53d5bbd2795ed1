"""`KavaTrainer`: a `transformers.Trainer` whose loss aligns the student's hidden states with a frozen teacher's."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, set_seed
from transformers.integrations.liger import apply_liger_kernel
from transformers.trainer_utils import HubStrategy, TrainOutput

from ..config.arguments import KavaTrainingArguments
from ..data.collators import choose_collator, completed
from ..data.streaming import ExampleStream
from ..data.token_alignment.pair_encoder import TeacherTokenizers
from ..distillation.calibration import calibrate, calibration_examples
from ..distillation.loss_terms import LossTerms
from ..distillation.model import DistillationModel
from ..distillation.pairing import GivenTeacher, Pairing, features_given
from ..distillation.rollouts.sampling import RolloutFn
from ..distillation.targets import AlignmentTarget
from ..distillation.targets.mapping import LayerChooser
from ..distillation.teacher_cache import CachedTeacher
from ..distillation.teachers.given import check_cache, check_given
from ..distillation.teachers.several import by_role, online_teachers, states_readers
from ..distillation.token_alignment.divergence import shared_with_each
from ..models.lm_head import vocabulary_size
from ..models.routers import router_note
from ..models.student import mend_generation_config
from ..models.teacher import OnlineTeacher, TeacherSource
from ..utils.distributed import from_main_process, is_sharded
from ..utils.errors import BadRequest
from ..utils.memory import needs_memory
from ..utils.progress_bar import show_progress_bars
from ..utils.signals import WATCH
from .batches import StepBatches, with_spared_workers
from .callbacks.emergency import EmergencyCheckpointCallback
from .callbacks.hub import CheckpointPusher
from .callbacks.probe import ProbeCallback, progress_of
from .callbacks.projector_save import ProjectorSaveCallback
from .callbacks.status import StatusCallback
from .callbacks.trackers import guard_trackers
from .checkpoint import resolve_checkpoint
from .incidents import Incidents
from .run_state import Part, RunState
from .step import StepRunner
from .student_trainer import StudentTrainer
from .throughput import Throughput


class KavaTrainer(StudentTrainer):
    """Distils a frozen teacher into a student.

    The model that Trainer sees is a `DistillationModel`: student and projectors in one module, so that wrappers,
    clipping and accumulation treat them as one. `trainer.student` is the plain student.

    Args:
        student: the `PreTrainedModel` to train, or its adapters alone where `lora.add_adapter` gave it any.
        teacher: a model, or another source of the teacher's states, or a list of several, which `args.teachers` weighs;
            None where no term needs them.
        target: what is aligned, with its projectors; made as `args` ask where the teacher is a model. Projectors that
            need no gradient stay as they are.
        args: `KavaTrainingArguments`; their defaults by default.
        model_init: in place of `student`, a function of nothing or of a trial that makes one. Every `train()` begins
            with a new student and new projectors then, as `hyperparameter_search` needs.
        inherited_layers: the teacher layer that each student layer was cut from, for `layer_mapping` inherited; for cka
            the one that an earlier run chose, by default chosen on training examples.
        rollout_fn: writes the student's own answers where `on_policy_fraction` is above 0, not `sample_answers`.
        teacher_tokenizer: of a teacher that reads other tokens than `processing_class`, for `kd_weight` above 0; of
            several a list.
        kwargs: as for `Trainer`: `train_dataset` and `eval_dataset` with `input_ids` and `labels`, `processing_class`,
            `data_collator` (a `DistillationCollator` by default), `callbacks`, `compute_metrics`, `optimizers` (which
            hold the target's parameters too), ...

    Raises:
        BadRequest, ValueError: as `pairing.pair_up`, and for a student that cannot be trained as it is.
    """

    def __init__(
        self,
        student: PreTrainedModel | None = None,
        teacher: GivenTeacher = None,
        target: AlignmentTarget | None = None,
        args: KavaTrainingArguments | None = None,
        *,
        model_init: Callable[..., PreTrainedModel] | None = None,
        inherited_layers: Sequence[int] | None = None,
        rollout_fn: RolloutFn | None = None,
        teacher_tokenizer: TeacherTokenizers = None,
        **kwargs: Any,
    ) -> None:
        args = KavaTrainingArguments() if args is None else args
        check_given(args, student, model_init, (teacher, target), kwargs | {"teacher_tokenizer": teacher_tokenizer})
        if student is None:
            self.model_init = cast(Any, model_init)
            set_seed(args.seed)
            student = cast(PreTrainedModel, super().call_model_init())
        self._shared = shared_with_each(kwargs.get("processing_class"), teacher_tokenizer)
        kwargs["data_collator"] = choose_collator(kwargs.get("data_collator"), kwargs.get("processing_class"))
        choose = LayerChooser(args, kwargs.get("train_dataset"), kwargs["data_collator"])
        self._pairing = Pairing(args, teacher, target, model_init is not None, inherited_layers, choose)
        model, source = self._pairing.pair(student)
        super().__init__(model=model, args=args, **kwargs)
        self.model_init = cast(Any, model_init)
        self._make_parts()
        own = [c for c in self.callback_handler.callbacks if type(c) in (ProgressCallback, PrinterCallback)]
        for callback in own[-1:]:  # Trainer adds its own last; one that the user gave stays
            self.remove_callback(callback)
        self.trackers = guard_trackers(self.callback_handler.callbacks, self.args, self.console, self.problems)
        self._take_up(source)
        self.rollouts = self.make_rollouts(rollout_fn)
        self._add_parts()

    def _make_parts(self) -> None:
        """What does the work of a training; each can be tried without a trainer."""
        args = self.args
        show_progress_bars(not (args.plain_output or args.disable_tqdm))
        self.incidents = Incidents(args, lambda: self.state.global_step)
        self.console, self.problems = self.incidents.console, self.incidents.problems
        self.clock = Throughput(args.device)
        self.batches = StepBatches(args, self.incidents)
        self.steps = StepRunner(args, self.accelerator, self.incidents, super().training_step)
        self.status = StatusCallback(args.plain_output)
        self.emergency = EmergencyCheckpointCallback(self.try_to_save_projector)
        self.probe = ProbeCallback(args, self.incidents, self.log)
        parts: list[Part] = [self, self.incidents, self.clock, self.batches, self.steps, self.probe, self.emergency]
        self.run_state = RunState(parts, self.evaluate_late, self.probe.log_measured)
        if args.push_to_hub and args.hub_strategy != HubStrategy.END and self.is_world_process_zero():
            self.pusher = CheckpointPusher(str(self.hub_model_id), args, self.incidents, self._announce_push)

    def _add_parts(self) -> None:
        """Let Trainer call the parts, those first that begin anew with a training, then what a checkpoint holds."""
        # The bar of the training begins after the first probe, which would count as a part of its first step.
        parts = [self.clock, self.batches, self.steps, self.run_state, self.emergency, self.probe, self.status]
        saving = ProjectorSaveCallback(self.try_to_save_projector, self._folder_of_trial)
        for callback in (*parts, saving, *filter(None, [self.pusher])):
            self.add_callback(callback)

    def _take_up(self, source: TeacherSource | None) -> None:
        """Make what depends on student and teacher."""
        size = vocabulary_size(self.student)
        self.terms = LossTerms(self.args, self.target, source, size, lambda: self.accelerator.autocast())
        self.terms.shared = self._shared
        if told := mend_generation_config(self.student):
            self.console.warn(told)
        if told := router_note(self.student):
            self.console.print(told)
        self.batches.teachers = len(self.target.parts)
        models = {"student": self.student}
        models |= {role: own.model for role, own in by_role(source) if isinstance(own, OnlineTeacher)}
        if reason := self.batches.choose_packing(models, self.data_collator):
            self.console.print(f"No packing, because {reason}; micro-batches are padded to their longest example.")
        if source is not None and states_readers(source):
            self.read_cache(source)
        else:
            self.choose_probe()

    def call_model_init(self, trial: Any = None) -> DistillationModel:
        """A new student of `model_init`, beside new projectors, as the trial's arguments ask.

        Trainer calls it when a training begins.

        Raises:
            BadRequest: if the trial's arguments are not sound, or do not fit the models.
        """
        self._hp_search_setup(trial)  # Trainer does so too, but only afterwards
        if found := self.args.problems():
            raise BadRequest.of(*found)
        student = cast(PreTrainedModel, super().call_model_init(trial))
        for teacher in online_teachers(self.teacher):
            teacher.close()
        self.model, source = self._pairing.pair(student)
        self.model_wrapped = self.model
        self._take_up(source)
        self._make_ready()
        return self.model

    @property
    def has_own_loss(self) -> bool:
        """Whether a subclass computes another loss, which is then the one that is evaluated."""
        return type(self).compute_loss is not KavaTrainer.compute_loss

    @property
    def teacher(self) -> TeacherSource | None:
        """Where the teacher's states come from."""
        return self.terms.teacher

    def read_cache(self, teacher: TeacherSource) -> None:
        """From now on take the teacher's states from a cache, in place of a model that ran so far; or of several.

        Raises:
            ValueError: as `given.check_cache`, and if attention is read.
        """
        layers = features_given(self.args, self.target, teacher)
        collator = check_cache(self.args, teacher, self.data_collator)
        if self.args.samples:
            self.beside_cache = self.running_teacher or OnlineTeacher(cast(CachedTeacher, teacher).model, layers)
        self.terms.teacher = teacher
        self.data_collator = collator.reading(states_readers(teacher))
        self.choose_probe()

    def calibration_examples(self) -> list[dict[str, Any]]:
        """The training examples that the projectors start from. Raises as `calibration.calibration_examples`."""
        return calibration_examples(self.train_dataset, self.args.calibration_tokens, self.args.seed, self.target)

    def calibrate(self) -> None:
        """Start the projectors from training examples, as `projector_anchor` and `projector_init` ask.

        Raises:
            BadRequest: as `calibration_examples`.
        """
        if not getattr(self.student, "is_quantized", False):  # Trainer has not moved it yet, if it is new or for FSDP
            self.model.to(self.args.device)
        source, size = cast(TeacherSource, self.teacher), self.args.per_device_eval_batch_size
        examples, fit = self.calibration_examples(), self.args.projector_init == "least_squares"
        calibrate(self.model, source, examples, self.data_collator, size, self.sum_over_ranks, fit, self.console.print)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Trainer's loader of the training examples, which pads or, for packing, only joins them."""
        padding, collator = self.data_collator, self.batches.collator(self.data_collator)
        if isinstance(self.train_dataset, ExampleStream):
            return self.batches.open(self.train_dataset, collator, self.micro_batch_size)
        self.data_collator = collator
        try:
            return with_spared_workers(super().get_train_dataloader())
        finally:
            self.data_collator = padding

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor | None]:
        """Fetch the micro-batches of one optimizer step and count real tokens and answer tokens over all ranks.

        Trainer's own would count the labels first, with a gather over the ranks that nothing here needs. With packing
        each micro-batch is a list of rows under `rows`, beside their tokens for Trainer's own counting.
        """
        self.clock.begin_line()
        sharded, limit = is_sharded(self.model), self.steps.row_limit
        batches, rows, counts = self.batches.gather(epoch_iterator, num_batches, self.micro_batch_size, limit, sharded)
        if not batches:
            return batches, None
        self.steps.begin(rows, sharded)
        counts = self.sum_over_ranks(counts.to(device))
        self.clock.count(counts)
        return batches, counts[[0, 1, *range(4, len(counts))]]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of one micro-batch; with packing, of each of its rows.

        Args:
            model: the wrapped student and projectors.
            inputs: of `get_batch_samples`.
            num_items_in_batch: real, answer and following tokens [3] of the whole optimizer step; see `LossTerms.loss`.
        """
        with self.clock.stopwatch.measure("step"):
            return self.steps.run(model, inputs.get("rows", [inputs]), num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The weighted sum of the loss terms on one micro-batch.

        Args:
            model: the wrapped student and projectors.
            inputs: a batch of `collators`, or any with `input_ids` and `labels`.
            return_outputs: also return the student's `last_hidden_state` [B, T, d_s].
            num_items_in_batch: real, answer and following tokens [3] of the optimizer step; by default this batch's.
        """
        training, batch = torch.is_grad_enabled(), completed(inputs)
        means, progress = (self.steps.means, progress_of(self.state)) if training else (self.eval_means, None)
        weights = self.terms.full_weights if progress is None else self.terms.weights(progress)
        with self.clock.stopwatch.measure("teacher") if training else nullcontext():
            teacher_states = self.terms.teacher_states(batch, weights)
        outputs = self.terms.student_outputs(model, batch, teacher_states, weights, num_items_in_batch)
        loss = self.terms.loss(outputs, batch, weights, num_items_in_batch, means)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the ranks' gradients will be averaged
        return (loss, {"last_hidden_state": outputs.last_hidden_state}) if return_outputs else loss

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train as `Trainer.train` does, until a signal ends it: then `emergency.received` names it.

        The signal handlers in force before are back however the training ends. A checkpoint that is already at the
        last step is loaded, and nothing is trained.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the newest sound one in `output_dir`, if any.
            trial: of a hyperparameter search.
            ignore_keys_for_eval: without effect; evaluations give logits alone.

        Raises:
            BadRequest: if the checkpoint cannot be loaded or does not fit.
            RunFailed: if the training broke.
            Interrupted: if a signal came before the first step.
        """
        asked = str(resume_from_checkpoint) if resume_from_checkpoint else None
        found = from_main_process(lambda: resolve_checkpoint(asked, str(self.args.output_dir)).checkpoint)
        self.run_state.checkpoint, self.run_state.began = None if found is None else str(found), False
        with WATCH, WATCH.deferred(), closing(self.status), self.clock.timed():
            return self._train(self.run_state.checkpoint, trial, ignore_keys_for_eval)

    def _train(self, resume_from_checkpoint: str | None, *args: Any) -> TrainOutput:
        parts: list[Any] = [self.steps, self.probe, self.rollouts]
        for part in filter(None, parts):
            part.forget()
        if resume_from_checkpoint and (output := self.take_up_finished(resume_from_checkpoint)):
            return output
        if self.model_init is None:  # else there will be another model
            self._make_ready()
        with self.explained(resume_from_checkpoint):
            return super().train(resume_from_checkpoint, *args)

    def follow_weights(self) -> None:
        """Take what the weights of the terms ask for as they are now. Raises as the trainer does when it is made."""
        if (source := self._pairing.source_now(self.model, self.teacher)) is not self.teacher:
            self._take_up(source)

    def _make_ready(self) -> None:
        """What a model needs before it is trained."""
        self.follow_weights()
        self.rollouts = self.rollouts or self.make_rollouts(None)  # somebody may have asked for them since
        from_main_process(self.weights.check_writable)
        if self.args.use_liger_kernel:  # Trainer would look at the wrapped model and find no PreTrainedModel
            apply_liger_kernel(self.student, self.args.liger_kernel_config)
        if self.args.calibrates and self.run_state.checkpoint is None:
            with needs_memory("while the projectors were calibrated", self.incidents.smaller_evaluation):
                self.calibrate()
        self.shard()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the token means since the last line to a training log line; steps without a finite loss do not count.

        Raises:
            RunFailed: after `max_nonfinite_steps` steps in a row whose loss or gradient was no finite number.
        """
        if "loss" in logs:
            self.steps.read_nonfinite(everything=True)
            steps, lost = self.steps.nonfinite.drain()
            logs["loss"] *= steps / (steps - lost) if steps > lost else math.nan
            logs |= self.steps.means.drain(self.sum_over_ranks)
            logs |= self.clock.line()  # the line has waited for the device anyway
            if self.rollouts is not None:
                self.rollouts.judge(logs)
            if self.args.learns_next_tokens and steps > lost and "lm_loss" not in logs and not self.has_own_loss:
                self.incidents.tell_no_labels()
            logs["projector_learning_rate"] = self.steps.projector_rate
            logs["collapsed"] = float(self.collapse is not None)
        super().log(logs, start_time)
