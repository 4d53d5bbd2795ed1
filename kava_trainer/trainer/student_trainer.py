"""What is done with a student beside training it: it is measured on held-out examples, written, and sent."""

import math
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from huggingface_hub import CommitInfo
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from ..data.collators import completed
from ..data.token_alignment.ranges import readers
from ..distillation.loss_terms import LossTerms
from ..distillation.rollouts.sampling import RolloutFn
from ..distillation.targets import AlignmentTarget
from ..distillation.teachers.several import online_teachers
from ..distillation.token_means import TokenMeans
from ..evaluation.answers import perplexity
from ..evaluation.probe import ProbeResult
from ..models.generation.generate import known_tokens
from ..models.sharding.units import Sharding
from ..models.teacher import OnlineTeacher
from ..utils.distributed import give_up_whole_weights, is_sharded
from ..utils.memory import needs_memory
from ..utils.signals import WATCH
from .batches import StepBatches, with_spared_workers, without_repeated
from .callbacks.hub import send_folder
from .callbacks.probe import ProbeCallback, progress_of
from .callbacks.status import StatusCallback
from .optimizers import OwnRounding, check_holds_projectors, give_own_rate, give_weights, settled, weights_by_group
from .rollouts.rollouts import Rollouts
from .run_state import read_progress
from .saving import SavingTrainer


class StudentTrainer(SavingTrainer):
    """A `SavingTrainer` that measures its student, and gives it out."""

    terms: LossTerms
    batches: StepBatches
    probe: ProbeCallback
    status: StatusCallback
    rollouts: Rollouts | None
    beside_cache: OnlineTeacher | None = None
    """Reads the answers that the student writes, of which a cache has no states."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Trainer keeps the columns that forward names, which are of one teacher; KAVA's collator passes no others on.
        columns = dict.fromkeys(getattr(self.train_dataset, "column_names", None) or ())
        self.args.remove_unused_columns &= max(readers(columns), default=0) == 0
        self.eval_means = TokenMeans()

    @property
    def student(self) -> PreTrainedModel:
        """The student alone, as `AutoModelForCausalLM` would load it."""
        return self.model.student

    @property
    def target(self) -> AlignmentTarget:
        """What is aligned, with its projectors."""
        return self.model.target

    @property
    def running_teacher(self) -> OnlineTeacher | None:
        """The teacher that runs beside the student, also where a cache has its states on the examples of the data."""
        return next(iter(online_teachers(self.terms.teacher)), self.beside_cache)

    @property
    def has_own_loss(self) -> bool:
        """Whether the loss is not the sum of the terms, but that of a subclass, which is then what is evaluated."""
        return True

    def follow_weights(self) -> None:
        """Read of the models what the weights of the terms ask for, which may have been changed since it was read."""

    def throughput(self) -> dict[str, float | None]:
        """What the last `train()` came to, see `Throughput.figures`; empty before it."""
        return self.clock.figures()

    def _folder_of_trial(self) -> Path:
        """In a hyperparameter search each trial has a folder of its own, as its checkpoints do."""
        return Path(self._get_output_dir(self._trial))

    def shard(self) -> None:
        """Spread student and projectors over the ranks, where FSDP2 was asked for and they are not yet.

        Raises:
            BadRequest: if they have weights that cannot be spread.
        """
        if self.is_fsdp_enabled and not is_sharded(self.model):
            self.model.shard(Sharding.of(self.accelerator))
            self.optimizer = None  # one that was made holds weights which are no part of the model any more
            # Trainer evaluates what is prepared, and would prepare it by itself without the optimizer that FSDP2 wants.
            self.accelerator.prepare_model(self.model, evaluation_mode=True)

    def choose_probe(self) -> None:
        """Fix the examples of the probe, for the teacher and the loss terms that there are now."""
        self.probe.choose(self.eval_dataset, self.data_collator, self.terms)

    def run_probe(self) -> ProbeResult | None:
        """Measure the alignment on the probe; None where there is no probe. Terms that do nothing are named once."""
        return self.probe.measure(self.model, progress_of(self.state))

    @property
    def collapse(self) -> str | None:
        """Why the alignment counted as collapsed at the last evaluation; None where it did not."""
        return self.probe.collapse

    def pair_figures(self) -> list[dict[str, Any]]:
        """What the last measurement showed of each pair of layers, see `ProbeResult.by_pair`; none without a probe."""
        return [] if self.probe.last is None else self.probe.last.by_pair()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Trainer's loader, whose workers leave signals to the trainer."""
        return with_spared_workers(super().get_eval_dataloader(eval_dataset))

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Loss on one evaluation batch; also logits at every position and labels where they are asked for.

        Examples without labels have logits alone.

        Raises:
            Interrupted: on all ranks, if any has got a signal.
        """
        WATCH.check()
        prepared = self._prepare_inputs(inputs)
        if "labels" not in prepared and not prediction_loss_only:
            with torch.no_grad(), self.compute_loss_context_manager():
                return None, self.model(**prepared).logits, None
        inputs = without_repeated(dict(completed(prepared)), self.args, self.accelerator.gradient_state)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            if prediction_loss_only:
                return loss, None, None
            return loss, self.model.head(outputs["last_hidden_state"]), inputs["labels"]

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Trainer's loop, plus `cos_sim`, each term's `<term>_loss` and `perplexity` as exact token means.

        `loss` is the sum of the terms with their full weights, so that a schedule does not lower it; NaN, as Trainer's,
        where no token has any. An evaluation also runs the probe; its figures have the same prefix. Of
        several sets only the first does, from which the probe is taken.
        """
        prefix = metric_key_prefix
        if not self.is_in_train:  # the optimizer holds what was to be trained when it began
            self.follow_weights()
        # The loader draws a seed, so the training would go another way for having been evaluated, or interrupted there.
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices),
            needs_memory("in the evaluation", self.incidents.smaller_evaluation),
            self.status.evaluating(dataloader),
        ):
            output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, prefix)
        metrics = cast(dict[str, float], output.metrics)
        means = self.eval_means.drain(self.sum_over_ranks)
        give_up_whole_weights(self.model)
        if f"{prefix}_loss" in metrics and not self.has_own_loss:  # Trainer's is a mean over examples
            weighted = [value for name, value in means.items() if name.endswith("_weighted")]
            metrics[f"{prefix}_loss"] = sum(weighted) if weighted else math.nan
        metrics.update({f"{prefix}_{name}": value for name, value in means.items()})
        if "lm_loss" in means:
            metrics[f"{prefix}_perplexity"] = perplexity(means.get("answer_loss", means["lm_loss"]))
        probes = description == "Evaluation" and self.probe.belongs_to(prefix)
        if probes and (probed := self.run_probe()) is not None:
            self.probe.note(probed, self.state.global_step)
            metrics.update({k: v for k, v in probed.metrics(prefix).items() if k not in metrics})
        return output

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: PreTrainedModel | None = None) -> tuple[Any, Any]:
        """As Trainer's, with the optimizers of torchao as `optimizers.settled` makes them."""
        return settled(*SavingTrainer.get_optimizer_cls_and_kwargs(args, model), args.device)

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
        if self.optimizer_cls_and_kwargs is not None:
            self.optimizer_cls_and_kwargs = settled(*self.optimizer_cls_and_kwargs, self.args.device)
        optimizer = super().create_optimizer(model)
        if isinstance(optimizer, OwnRounding):
            optimizer.seed = lambda: self.args.seed + self.state.global_step
        give_own_rate(optimizer, self.target, self.args.projector_learning_rate)
        self._trained_weights = weights_by_group(optimizer, drop_empty=is_sharded(self.model))
        return optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """As Trainer's. Where weights are sharded, the optimizer first gets those again that it was made of.

        accelerate 1.15.0 has just looked for them by the place of this rank's part in memory, and parts that are empty,
        as those of a weight with fewer rows than there are ranks may be, have all the same.
        """
        if is_sharded(self.model):
            give_weights(cast(torch.optim.Optimizer, self.optimizer), self._trained_weights)
        return super().create_scheduler(num_training_steps, optimizer)

    def make_rollouts(self, rollout_fn: RolloutFn | None) -> Rollouts | None:
        """What lets the student write answers itself; None where it shall not. Raises as `Rollouts`."""
        if not self.args.samples:
            if rollout_fn is not None:
                unasked = "on_policy_fraction is 0" if self.args.rollouts_from is None else "rollouts_from has answers"
                raise ValueError(f"rollout_fn writes nothing while {unasked}; change that, or leave it out.")
            return None
        tokenizer = cast(PreTrainedTokenizerBase | None, self.processing_class)
        running = online_teachers(self.terms.teacher) or filter(None, [self.beside_cache])
        models = [self.student, *(teacher.model for teacher in running)]
        rollouts = Rollouts(
            self.args,
            self.incidents,
            self.clock,
            self.data_collator,
            lambda: self.model,
            lambda: self.running_teacher,
            tokenizer,
            known_tokens(models, tokenizer),
            lambda: self.steps.means,
            lambda: self.accelerator.autocast(),
            lambda: self.terms.are_gathered_with(self.model),
            rollout_fn,
        )
        self.batches.mix = rollouts.mix
        self.run_state.keep(rollouts)
        return rollouts

    def take_up_finished(self, checkpoint: str) -> TrainOutput | None:
        """As `SavingTrainer`, with the first answers of the student, which the report shows."""
        output = super().take_up_finished(checkpoint)
        if output is not None and self.rollouts is not None:
            self.rollouts.load_state_dict(read_progress(checkpoint, self.args.process_index, self.args.world_size))
        return output

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, float]] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As Trainer's, with `eval_loss` for the objective by default: Trainer would add up all metrics, CosSim too."""
        objective = compute_objective or itemgetter("eval_loss")
        return super().hyperparameter_search(hp_space, objective, *args, **kwargs)

    def save_projector(self, path: str | Path) -> None:
        """Write the projectors to one `.pth` file, from the main process; every rank has to call this."""
        self.weights.save_projector(path)

    def save_student(self, output_dir: str | Path, merge_adapter: bool = True) -> None:
        """Write the student alone, with tokenizer and generation config, as `from_pretrained` expects it.

        Args:
            output_dir: the folder.
            merge_adapter: merge adapters into the student; else they are written alone.
        """
        weights = self.weights
        weights.export_student(output_dir, weights.gathered_student(merge_adapter), merge_adapter)

    def advice(self) -> str:
        """What to resume from after the training went wrong, as a sentence."""
        return self.incidents.advice()

    def release(self) -> None:
        """Give the memory of the optimizer and of the wrapped model back; the trainer cannot train any more."""
        self.optimizer = self.lr_scheduler = None
        self.steps.release()
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        self.model.to("cpu")

    def push_to_hub(  # type: ignore[override]  # Trainer gives a future too, and says it does not
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Send the student as it is now, with its tokenizer and a card of Trainer's, to `hub_model_id`.

        Trainer's own would send all of `output_dir`, and its pickled arguments, which may hold a token, too. What
        `run_kava.py` measured goes to the hub with `python -m kava_trainer push`.

        Args:
            commit_message: of the commit.
            blocking: wait until all is sent.
            token: in place of `args.hub_token`, or of a login.
            revision: a branch, in place of `args.hub_revision`.
            private: of a repository that is made for it; `args.hub_private_repo` by default.
            kwargs: of `Trainer.create_model_card`.

        Returns:
            The commit, or its future where `blocking` is false; None on other ranks than the first.

        Raises:
            BadRequest: if there is no repository and none can be made.
        """
        self._announce_push()
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        state = self.weights.gathered_student(merge_adapter=True)
        if not self.is_world_process_zero():
            return None
        folder = TemporaryDirectory()
        self.weights.export_student(folder.name, state)
        self._write_card(**kwargs)
        shutil.copy(Path(str(self.args.output_dir)) / "README.md", folder.name)
        if self.pusher is not None:
            self.pusher.finish()
        place = {"repo_id": str(self.hub_model_id), "revision": revision or self.args.hub_revision}
        return send_folder(folder, commit_message, blocking, token, place)

    def _announce_push(self) -> None:
        self.callback_handler.on_push_begin(self.args, self.state, self.control)

    def _write_card(self, model_name: str | None = None, tags: str | list[str] | None = None, **kwargs: Any) -> None:
        """Trainer's card, in `output_dir`, with the tags that the student has beside those that are asked for."""
        asked = [tags] if isinstance(tags, str) else list(tags or [])
        own = [tag for tag in getattr(self.student, "model_tags", None) or [] if tag not in asked]
        name = model_name or str(self.hub_model_id).split("/")[-1]
        self.create_model_card(model_name=name, tags=[*asked, *own] or None, **kwargs)

    def sum_over_ranks(self, sums: torch.Tensor) -> torch.Tensor:
        """A tensor added up over the ranks, each of which must ask."""
        return self.accelerator.reduce(sums, reduction="sum")
