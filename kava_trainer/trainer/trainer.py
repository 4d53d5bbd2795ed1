"""`KavaTrainer`: a `transformers.Trainer` whose loss aligns the student's hidden states with a frozen teacher's."""

import math
from collections.abc import Callable
from contextlib import closing, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, TrainerState, set_seed
from transformers.integrations.liger import apply_liger_kernel
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from ..config.arguments import KavaTrainingArguments
from ..config.launcher import is_fsdp_asked
from ..data.collators import DistillationCollator, choose_collator
from ..data.formats import IGNORED
from ..data.streaming import ExampleStream
from ..distillation.calibration import calibrate, check_enough_tokens
from ..distillation.loss_terms import LossTerms
from ..distillation.model import DistillationModel
from ..distillation.pairing import check_student, pair_up
from ..distillation.targets import HiddenStateTarget
from ..distillation.teacher_cache import CachedTeacher
from ..distillation.token_means import TokenMeans
from ..evaluation.answers import perplexity
from ..evaluation.probe import choose_examples
from ..models.lm_head import vocabulary_size
from ..models.teacher import OnlineTeacher, TeacherSource
from ..utils.distributed import give_up_whole_weights, is_sharded
from ..utils.errors import BadRequest, RunFailed
from ..utils.memory import needs_memory
from ..utils.signals import WATCH
from .callbacks.probe import ProbeCallback, ProbingTrainer
from .callbacks.projector_save import ProjectorSaveCallback
from .callbacks.resume import ResumeCallback
from .callbacks.trackers import guard_trackers
from .checkpoint import TRAINER_STATE_FILE, find_newest_checkpoint
from .optimizers import check_holds_projectors, settle_torchao


class EvaluatingTrainer(ProbingTrainer):
    """The part of `KavaTrainer` that runs evaluations and predictions."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.eval_means = TokenMeans()

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Loss on one evaluation batch; also logits at every position and labels where they are asked for.

        Raises:
            Interrupted: on all ranks, if any has got a signal.
        """
        WATCH.check()
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
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Trainer's loop, plus `cos_sim`, each term's `<term>_loss` and `perplexity` as exact token means.

        `loss` is the sum of the terms with the weights of the first step, so that a schedule does not lower it. An
        evaluation also runs the probe; its figures have the same prefix. Of several sets only the first does, from
        which the probe is taken.
        """
        prefix = metric_key_prefix
        # The loader draws a seed, so the training would go another way for having been evaluated, or interrupted there.
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices), needs_memory("in the evaluation", self.smaller_evaluation):
            output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, prefix)
        metrics = cast(dict[str, float], output.metrics)
        means = self.eval_means.drain(self._sum_over_ranks)
        give_up_whole_weights(self.model)
        metrics[f"{prefix}_loss"] = sum(value for name, value in means.items() if name.endswith("_weighted"))
        metrics.update({f"{prefix}_{name}": value for name, value in means.items()})
        if "lm_loss" in means:
            metrics[f"{prefix}_perplexity"] = perplexity(means["lm_loss"])
        probes = description == "Evaluation" and self.probe_belongs_to(prefix)
        if probes and (probed := self.run_probe()) is not None:
            self.note_probe(probed)
            metrics.update({k: v for k, v in probed.metrics(prefix).items() if k not in metrics})
        return output


class KavaTrainer(EvaluatingTrainer):
    """Distils a frozen teacher into a student.

    The model that Trainer sees is a `DistillationModel`: student and projectors in one module, so that wrappers,
    clipping and accumulation treat them as one. `trainer.student` is the plain student.

    Args:
        student: the `PreTrainedModel` to train, or its adapters alone where `adapters.add_adapter` gave it any.
        teacher: a model, or another source of the teacher's states; None where no term needs them.
        target: what is aligned, with its projectors; made as `args` ask where the teacher is a model. Projectors that
            need no gradient stay as they are.
        args: `KavaTrainingArguments`; their defaults by default.
        model_init: in place of `student`, a function of nothing or of a trial that makes one. Every `train()` begins
            with a new student and new projectors then, as `hyperparameter_search` needs.
        kwargs: as for `Trainer`: `train_dataset` and `eval_dataset` with `input_ids` and `labels`, `processing_class`,
            `data_collator` (a `DistillationCollator` by default), `callbacks`, `compute_metrics`, `optimizers` (which
            hold the target's parameters too), ...

    Raises:
        BadRequest, ValueError: as `pairing.pair_up`, and for a student that cannot be trained as it is.
    """

    def __init__(
        self,
        student: PreTrainedModel | None = None,
        teacher: PreTrainedModel | TeacherSource | None = None,
        target: HiddenStateTarget | None = None,
        args: KavaTrainingArguments | None = None,
        *,
        model_init: Callable[..., PreTrainedModel] | None = None,
        **kwargs: Any,
    ) -> None:
        args = KavaTrainingArguments() if args is None else args
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("The loss is the sum of KAVA's terms; leave compute_loss_func out and set their weights.")
        if model_init is not None and kwargs.get("optimizers", (None, None)) != (None, None):
            raise ValueError("model_init makes a new student for every training; give optimizer_cls_and_kwargs.")
        if student is None:
            student = self._first_student(args, model_init)
        elif model_init is not None:
            raise ValueError("Give either a student or model_init, not both.")
        check_student(student)
        self._given = (teacher, target if model_init is None else deepcopy(target))
        source, target = pair_up(args, student, teacher, target)
        kwargs["data_collator"] = choose_collator(kwargs.get("data_collator"), kwargs.get("processing_class"))
        super().__init__(model=self._together(args, student, target), args=args, **kwargs)
        self.model_init = cast(Any, model_init)
        self._set_terms(source)
        self.forget_throughput()
        own = [c for c in self.callback_handler.callbacks if type(c) in (ProgressCallback, PrinterCallback)]
        for callback in own[-1:]:  # Trainer adds its own last; one that the user gave stays
            self.remove_callback(callback)
        self.trackers = guard_trackers(self.callback_handler.callbacks, args, self.console, self.problems)
        self._choose_packing()
        if isinstance(source, CachedTeacher):
            self.read_cache(source)
        else:
            self.probe = self.make_probe()
        self.add_callback(ResumeCallback(self._restore))
        self.add_callback(self.emergency)
        self.add_callback(self.status)
        if args.aligns:
            self.add_callback(ProbeCallback(self.log_first_probe, self.log_probe))
            self.add_callback(ProjectorSaveCallback(self._save_projector_of_trial))

    def _first_student(
        self, args: KavaTrainingArguments, model_init: Callable[..., PreTrainedModel] | None
    ) -> PreTrainedModel:
        if model_init is None:
            raise ValueError("Give a student, or model_init, a function that makes one.")
        self.model_init = model_init
        set_seed(args.seed)
        return cast(PreTrainedModel, super().call_model_init())

    @staticmethod
    def _together(
        args: KavaTrainingArguments, student: PreTrainedModel, target: HiddenStateTarget
    ) -> DistillationModel:
        if not args.aligns:
            target.requires_grad_(False)
        if getattr(student, "is_quantized", False):
            target.to(student.device)  # Trainer moves no model that bitsandbytes has quantised
        return DistillationModel(student, target)

    def _set_terms(self, source: TeacherSource | None) -> None:
        size = vocabulary_size(self.student)
        self.terms = LossTerms(self.args, self.target, source, size, lambda: self.accelerator.autocast())

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
        check_student(student)
        if isinstance(self.teacher, OnlineTeacher):
            self.teacher.close()
        teacher, target = self._given
        source, target = pair_up(self.args, student, teacher, deepcopy(target))
        self.model = self.model_wrapped = self._together(self.args, student, target)
        self._set_terms(source)
        self._choose_packing()
        self.probe = self.make_probe()
        self._make_ready()
        return self.model

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
        self.probe = self.make_probe()

    def _choose_packing(self) -> None:
        """Pack where both models can; else say why in one line."""
        models = {"student": self.student}
        if isinstance(self.teacher, OnlineTeacher):
            models["teacher"] = self.teacher.model
        if reason := self.choose_packing(models):
            self.console.print(f"No packing, because {reason}; micro-batches are padded to their longest example.")

    def calibration_examples(self) -> list[dict[str, Any]]:
        """The training examples that the projectors start from: drawn with the run's seed where the data can be.

        Raises:
            BadRequest: if they hold too few tokens for a fit.
        """
        data: Any = self.train_dataset
        if isinstance(data, ExampleStream):
            data = data.one_pass()
        elif hasattr(data, "shuffle"):
            data = data.shuffle(seed=self.args.seed)
        examples = choose_examples(data, self.args.calibration_tokens)
        check_enough_tokens(self.target, sum(len(example["input_ids"]) for example in examples))
        return examples

    def calibrate(self) -> None:
        """Start the projectors from training examples, as `projector_anchor` and `projector_init` ask.

        Raises:
            BadRequest: as `calibration_examples`.
        """
        if not getattr(self.student, "is_quantized", False):  # Trainer has not moved it yet, if it is new or for FSDP
            self.model.to(self.args.device)
        size, fit = self.args.per_device_eval_batch_size, self.args.projector_init == "least_squares"
        examples = self.calibration_examples()
        calibrate(
            self.model, cast(TeacherSource, self.teacher), examples, self.data_collator, size, self._sum_over_ranks, fit
        )

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
        if resume_from_checkpoint is True:
            newest = find_newest_checkpoint(self.args.output_dir).checkpoint
            resume_from_checkpoint = str(newest) if newest else None
        self.resumed_from = resume_from_checkpoint or None
        with WATCH, WATCH.deferred(), closing(self.status), self.timed():
            return self._train(self.resumed_from, trial, ignore_keys_for_eval)

    def _train(self, resume_from_checkpoint: str | None, *args: Any) -> TrainOutput:
        self.forget()
        if resume_from_checkpoint and (state := self.finished_state(resume_from_checkpoint)):
            self._load_from_checkpoint(resume_from_checkpoint)
            self.state = state
            self.add_earlier(progress := self.read_progress(resume_from_checkpoint))
            self.problems[:] = progress["problems"]
            best = state.best_model_checkpoint
            if self.args.load_best_model_at_end and best and Path(best).is_dir():
                self._load_best_model()
            return TrainOutput(state.global_step, 0.0, {})
        if self.model_init is None:  # else there will be another model
            self._make_ready()
        try:
            return super().train(resume_from_checkpoint, *args)
        except torch.OutOfMemoryError as error:  # passes and evaluations have messages of their own
            raise self.out_of_memory_between_passes() from error

    def _make_ready(self) -> None:
        """What a new model needs before it is trained."""
        if self.args.use_liger_kernel:  # Trainer would look at the wrapped model and find no PreTrainedModel
            apply_liger_kernel(self.student, self.args.liger_kernel_config)
        if self.args.calibrates and not self.resumed_from:
            with needs_memory("while the projectors were calibrated", self.smaller_evaluation):
                self.calibrate()

    def _restore(self) -> None:
        if is_fsdp_asked() and not is_sharded(self.model):
            raise RunFailed("FSDP was asked for, but transformers has not sharded the model; nothing was trained.")
        self.start_clock()
        self.rewind()
        if self.resumed_from is not None:
            state = self.read_progress(self.resumed_from)
            self.restore_progress(state)
            self.catch_up(state, self.resumed_from)

    def finished_state(self, checkpoint: str) -> TrainerState | None:
        """The state of a checkpoint with no step left to train, else None."""
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_FILE))
        *_, max_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        return state if state.global_step >= max_steps else None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer that `args.optim` names, with the projectors in groups of their own learning rate.

        Trainer's decay and no-decay groups are kept; each is split into student and projectors.

        Raises:
            BadRequest: if the optimizer cannot take a step on this machine.
            ValueError: if one that was passed in leaves projectors out that are to be trained.
        """
        if self.optimizer is not None:
            check_holds_projectors(self.optimizer, self.target)
            return super().create_optimizer(model)
        optimizer = super().create_optimizer(model)
        settle_torchao(optimizer, self.args.device, lambda: self.args.seed + self.state.global_step)
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
        """Add the token means since the last line to a training log line; steps without a finite loss do not count.

        Raises:
            RunFailed: after `max_nonfinite_steps` steps in a row whose loss or gradient was no finite number.
        """
        if "loss" in logs:
            self.read_nonfinite(everything=True)
            steps, lost = self.nonfinite.drain()
            logs["loss"] *= steps / (steps - lost) if steps > lost else math.nan
            means = self.train_means.drain(self._sum_over_ranks)
            logs |= means
            logs |= self.line_throughput()  # the line has waited for the device anyway
            logs["projector_learning_rate"] = self._projector_learning_rate()
            logs["collapsed"] = float(self.collapse is not None)
        super().log(logs, start_time)

    def _projector_learning_rate(self) -> float:
        own = {id(parameter) for parameter in self.target.parameters()}
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        rates = [g["lr"] for g in groups if any(id(p) in own for p in g["params"])]
        return float(rates[0]) if rates else 0.0

    def _save_projector_of_trial(self, path: Path) -> None:
        """In a hyperparameter search each trial has a folder of its own, as its checkpoints do."""
        self.try_to_save_projector(Path(self._get_output_dir(self._trial)) / path.name)
