"""`KavaTrainer`: a `transformers.Trainer` whose loss aligns the student's hidden states with a frozen teacher's."""

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, TrainerState
from transformers.integrations.liger import apply_liger_kernel
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, has_length

from .arguments import KavaTrainingArguments
from .callbacks.emergency import EmergencyCheckpointCallback
from .callbacks.probe import FirstProbeCallback
from .callbacks.projector_save import ProjectorSaveCallback
from .callbacks.status import StatusCallback
from .checkpoint_io import TRAINER_STATE_FILE
from .losses import IGNORED, next_token_loss, next_tokens, token_mean, token_sum
from .metrics import TokenMeans
from .probe import AlignmentProbe, ProbeResult, choose_examples
from .saving import SavingTrainer
from .student import DistillationModel, StudentOutput
from .targets import HiddenStateTarget
from .teacher import TeacherSource

_TERMS = ("mercator_loss", "lm_loss", "cos_sim")


class KavaTrainer(SavingTrainer):
    """Distils a frozen teacher into a student.

    The model that Trainer sees is a `DistillationModel`: student and projectors in one module, so that wrappers,
    clipping and accumulation treat them as one. `trainer.student` is the plain student.

    Args:
        student: the `PreTrainedModel` to train.
        teacher: where the teacher's states come from; None where no term needs them (`mercator_weight` 0).
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
        self.teacher = teacher
        target.requires_grad_(args.mercator_weight > 0)
        super().__init__(model=DistillationModel(student, target), args=args, **kwargs)
        self.train_means, self.eval_means = TokenMeans(), TokenMeans()
        self._seen = torch.zeros(2, dtype=torch.int64)
        self.emergency = EmergencyCheckpointCallback()
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        self.probe = self._make_probe()
        self.last_probe: ProbeResult | None = None
        own = [StatusCallback(args.plain_output), FirstProbeCallback(self._log_first_probe), ProjectorSaveCallback()]
        for callback in (self.emergency, *own):
            self.add_callback(callback)

    def _make_probe(self) -> AlignmentProbe | None:
        """The fixed probe, where something is aligned and there is one set of held-out examples."""
        if self.teacher is None or self.args.mercator_weight == 0 or not has_length(self.eval_dataset):
            return None
        if isinstance(self.eval_dataset, dict):
            return None
        examples = choose_examples(self.eval_dataset)
        return AlignmentProbe(examples, self.data_collator, self.args.per_device_eval_batch_size)

    def run_probe(self) -> ProbeResult | None:
        """Measure the alignment on the probe; None where there is no probe."""
        return None if self.probe is None else self.probe.measure(self.model, self.teacher)

    def _log_first_probe(self) -> None:
        """Log where the run starts. It is not called collapsed: an untrained pair has nothing to agree on."""
        result = self.run_probe()
        if result is not None:
            self.log(result.metrics("probe"))

    @property
    def collapse(self) -> str | None:
        """Why the alignment counted as collapsed at the last evaluation; None where it did not."""
        return None if self.last_probe is None else self.last_probe.collapse

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
            inputs: a batch of `DistillationCollator`.
            return_outputs: also return the logits.
            num_items_in_batch: real tokens and answer tokens [2] of the whole optimizer step; by default this batch's.
        """
        teacher_states = self.teacher_states(inputs)
        outputs = self.student_outputs(model, inputs, teacher_states)
        terms = self.loss_terms(outputs, inputs, num_items_in_batch)
        loss = self.total_loss(terms, num_items_in_batch)
        return (loss, {"logits": outputs.logits}) if return_outputs else loss

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as `Trainer.train` does; the signal handlers in force before are back however it ends.

        A checkpoint that is already at the last step is loaded, and nothing is trained.
        """
        self._seen.zero_()
        if self.args.use_liger_kernel:  # Trainer would look at the wrapped model and find no PreTrainedModel
            apply_liger_kernel(self.student, self.args.liger_kernel_config)
        if isinstance(resume_from_checkpoint, str) and (state := self._finished_state(resume_from_checkpoint)):
            self._load_from_checkpoint(resume_from_checkpoint)
            self.state = state
            return TrainOutput(state.global_step, 0.0, {})
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.emergency.restore_handlers()

    def _finished_state(self, checkpoint: str) -> TrainerState | None:
        """The state of a checkpoint with no step left to train, else None."""
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_FILE))
        *_, max_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        return state if state.global_step >= max_steps else None

    def teacher_states(self, inputs: dict[str, torch.Tensor]) -> dict[int, torch.Tensor] | None:
        """The teacher's states on a batch; None where nothing is aligned."""
        if self.teacher is None or self.args.mercator_weight == 0:
            return None
        with self.accelerator.autocast():
            return self.teacher.features(inputs["input_ids"], inputs["attention_mask"])

    def student_outputs(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], teacher_states: dict[int, torch.Tensor] | None
    ) -> StudentOutput:
        """Run student and projectors, with logits only where a term or the evaluation reads them."""
        columns = inputs.get("logits_columns")
        if model.training and self.args.lm_weight == 0:
            columns = inputs["input_ids"].new_empty(0)
        return model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            logits_columns=columns,
            teacher_states=teacher_states,
        )

    def loss_terms(
        self, outputs: StudentOutput, inputs: dict[str, torch.Tensor], num_items: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Each unweighted term by name, as a token mean over the whole optimizer step; means are noted for the log."""
        means = self.train_means if torch.is_grad_enabled() else self.eval_means
        tokens, answers = (None, None) if num_items is None else num_items
        terms = {}
        mask = inputs["counted"] if "counted" in inputs else inputs["attention_mask"].bool()
        if outputs.targets:
            terms["mercator"] = self._mercator_term(outputs, mask, tokens, means)
        if outputs.logits.shape[1] > 0:
            terms["lm"] = self._language_model_term(outputs, inputs, answers, means)
        return terms

    def _mercator_term(
        self, outputs: StudentOutput, mask: torch.Tensor, tokens: torch.Tensor | None, means: TokenMeans
    ) -> torch.Tensor:
        pairs = self.target.align(outputs.hidden_states, outputs.targets, mask)
        loss = torch.stack([pair.loss for pair in pairs]).mean(dim=0)
        cosine = torch.stack([pair.cosine for pair in pairs]).mean(dim=0)
        means.add("mercator_loss", token_sum(loss, mask), mask.sum())
        means.add("cos_sim", token_sum(cosine, mask), mask.sum())
        return token_mean(loss, mask, tokens)

    def _language_model_term(
        self,
        outputs: StudentOutput,
        inputs: dict[str, torch.Tensor],
        answers: torch.Tensor | None,
        means: TokenMeans,
    ) -> torch.Tensor:
        targets = next_tokens(inputs["labels"], inputs.get("logits_columns"))
        smoothing = self.args.label_smoothing_factor if torch.is_grad_enabled() else 0.0
        here = (targets != IGNORED).sum()
        divisor = here if answers is None else answers
        loss = next_token_loss(outputs.logits, targets, divisor, smoothing)
        means.add("lm_loss", loss * divisor, here)
        return loss

    def total_loss(self, terms: dict[str, torch.Tensor], num_items: torch.Tensor | None = None) -> torch.Tensor:
        """Weighted sum of the terms; scaled by the world size where the ranks' gradients will be averaged."""
        weights = {"mercator": self.args.mercator_weight, "lm": self.args.lm_weight}
        total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        return total if num_items is None else total * self.accelerator.num_processes

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor | None]:
        """Fetch the micro-batches of one optimizer step and count real tokens and answer tokens over all ranks.

        Trainer's own would count the labels first, with a gather over the ranks that nothing here needs.
        """
        batches = list(islice(epoch_iterator, num_batches))
        if not batches:
            return batches, None
        tokens = sum(batch["attention_mask"].sum() for batch in batches)
        answers = sum((batch["labels"][:, 1:] != IGNORED).sum() for batch in batches)
        positions = torch.as_tensor(sum(batch["input_ids"].numel() for batch in batches), device=tokens.device)
        counts = self._sum_over_ranks(torch.stack([tokens, answers, positions]).to(device))
        self._seen = self._seen.to(device) + counts[[0, 2]]
        return batches, counts[:2]

    def throughput(self) -> dict[str, float | None]:
        """Real tokens and examples a second, and the share of padding, of the last `train()`; None before it."""
        runs = [line for line in self.state.log_history if "train_runtime" in line]
        tokens, positions = self._seen.tolist()
        if not runs or positions == 0:
            return {}
        return {
            "tokens_per_second": tokens / runs[-1]["train_runtime"],
            "samples_per_second": runs[-1]["train_samples_per_second"],
            "padding_fraction": 1 - tokens / positions,
        }

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
            logs.update(self.train_means.drain(self._sum_over_ranks))
            logs["projector_learning_rate"] = self._projector_learning_rate()
            logs["collapsed"] = float(self.collapse is not None)
            broken = [name for name in ("loss", *_TERMS) if not math.isfinite(logs.get(name, 0.0))]
            if broken:
                raise self.not_finite(" and ".join(broken))
        super().log(logs, start_time)

    def _sum_over_ranks(self, sums: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(sums, reduction="sum")

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
        if not prediction_loss_only:
            inputs = {name: value for name, value in inputs.items() if name != "logits_columns"}
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        return loss, outputs["logits"], inputs["labels"]

    def _without_repeated(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Take the examples out of every mean that accelerate repeats to give all ranks equally many."""
        state, rows = self.accelerator.gradient_state, len(inputs["input_ids"])
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return inputs
        first = self.args.process_index * self.args.eval_batch_size
        repeated = torch.arange(first, first + rows, device=inputs["input_ids"].device) >= state.remainder
        counted = inputs["attention_mask"].bool() & ~repeated.unsqueeze(1)
        return {**inputs, "counted": counted, "labels": inputs["labels"].masked_fill(~counted, IGNORED)}

    def evaluation_loop(
        self, dataloader: DataLoader, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Trainer's loop, plus `cos_sim`, `mercator_loss`, `lm_loss` and `perplexity` as exact token means.

        An evaluation also runs the probe; its figures have the same prefix.
        """
        prefix = metric_key_prefix
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=prefix, **kwargs)
        means = self.eval_means.drain(self._sum_over_ranks)
        weights = {"mercator_loss": self.args.mercator_weight, "lm_loss": self.args.lm_weight}
        output.metrics[f"{prefix}_loss"] = sum(weights[name] * means[name] for name in weights if name in means)
        output.metrics.update({f"{prefix}_{name}": value for name, value in means.items()})
        if "lm_loss" in means:
            output.metrics[f"{prefix}_perplexity"] = math.exp(min(means["lm_loss"], 700))
        if description == "Evaluation" and (probed := self.run_probe()) is not None:
            self.last_probe = probed
            output.metrics.update({k: v for k, v in probed.metrics(prefix).items() if k not in output.metrics})
        return output
