"""`KavaTrainer`: a `transformers.Trainer` whose loss aligns the student's hidden states with a frozen teacher's."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, Trainer
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, has_length

from .arguments import KavaTrainingArguments
from .callbacks.emergency import EmergencyCheckpointCallback
from .callbacks.probe import FirstProbeCallback
from .callbacks.projector_save import ProjectorSaveCallback
from .callbacks.status import StatusCallback
from .checkpoint_io import PROJECTOR_FILE
from .errors import RunFailed
from .losses import next_token_loss, next_tokens, token_mean, token_sum
from .metrics import TokenMeans
from .probe import AlignmentProbe, ProbeResult, choose_examples
from .projector import restore_projectors, save_projectors
from .student import DistillationModel, StudentOutput
from .targets import HiddenStateTarget
from .teacher import TeacherSource

_STUDENT_PREFIX = "student."


class KavaTrainer(Trainer):
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

    args: KavaTrainingArguments
    model: DistillationModel

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: TeacherSource | None,
        target: HiddenStateTarget,
        args: KavaTrainingArguments,
        **kwargs: Any,
    ) -> None:
        self.teacher = teacher
        self._student_uses_cache = student.config.use_cache
        target.requires_grad_(args.mercator_weight > 0)
        super().__init__(model=DistillationModel(student, target), args=args, **kwargs)
        self.loss_is_scaled_for_ga = True
        self.train_means, self.eval_means = TokenMeans(), TokenMeans()
        self._real_tokens: torch.Tensor | float = 0.0
        self._positions = 0
        self.emergency = EmergencyCheckpointCallback()
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        self.probe = self._make_probe()
        self.last_probe: ProbeResult | None = None
        self._probed_at = 0
        own = [StatusCallback(args.plain_output), FirstProbeCallback(self._log_probe), ProjectorSaveCallback()]
        for callback in (*own, self.emergency):
            self.add_callback(callback)

    @property
    def student(self) -> PreTrainedModel:
        """The student alone, as `AutoModelForCausalLM` would load it."""
        return self.model.student

    @property
    def target(self) -> HiddenStateTarget:
        """What is aligned, with its projectors."""
        return self.model.target

    def _make_probe(self) -> AlignmentProbe | None:
        """The fixed probe, where something is aligned and there is one set of held-out examples."""
        if self.teacher is None or self.args.mercator_weight == 0 or not has_length(self.eval_dataset):
            return None
        if isinstance(self.eval_dataset, dict):
            return None
        examples = choose_examples(self.eval_dataset)
        return AlignmentProbe(examples, self.data_collator, self.args.per_device_eval_batch_size)

    def run_probe(self, prefix: str = "probe") -> dict[str, float]:
        """Measure the alignment on the probe and return the figures as metrics; empty where there is no probe."""
        if self.probe is None:
            return {}
        self.last_probe, self._probed_at = self.probe.measure(self.model, self.teacher), self.state.global_step
        return self.last_probe.metrics(prefix)

    def _log_probe(self) -> None:
        metrics = self.run_probe()
        if metrics:
            self.log(metrics)

    @property
    def collapse(self) -> str | None:
        """Why the alignment counts as collapsed, from the last probe of a model that has been trained; else None."""
        return None if self.last_probe is None or self._probed_at == 0 else self.last_probe.collapse

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

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as `Trainer.train` does; the signal handlers in force before are back however it ends."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.emergency.restore_handlers()

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
        if outputs.targets:
            terms["mercator"] = self._mercator_term(outputs, inputs["attention_mask"].bool(), tokens, means)
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
        here = (targets != -100).sum()
        loss = next_token_loss(outputs.logits, targets, here if answers is None else answers, smoothing)
        means.add("lm_loss", loss * (here if answers is None else answers), here)
        return loss

    def total_loss(self, terms: dict[str, torch.Tensor], num_items: torch.Tensor | None = None) -> torch.Tensor:
        """Weighted sum of the terms; scaled by the world size where the ranks' gradients will be averaged."""
        weights = {"mercator": self.args.mercator_weight, "lm": self.args.lm_weight}
        total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        return total if num_items is None else total * self.accelerator.num_processes

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor | None]:
        """Fetch the micro-batches of one optimizer step and count real tokens and answer tokens over all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        tokens = sum(batch["attention_mask"].sum() for batch in batches)
        answers = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
        num_items = self._sum_over_ranks(torch.stack([tokens, answers]).to(device))
        self._real_tokens += num_items[0]
        self._positions += sum(batch["input_ids"].numel() for batch in batches) * self.accelerator.num_processes
        return batches, num_items

    def throughput(self) -> dict[str, float | None]:
        """Real tokens and examples a second, and the share of padding, of the last `train()`; None before it."""
        runs = [line for line in self.state.log_history if "train_runtime" in line]
        if not runs or self._positions == 0:
            return {}
        return {
            "tokens_per_second": float(self._real_tokens) / runs[-1]["train_runtime"],
            "samples_per_second": runs[-1]["train_samples_per_second"],
            "padding_fraction": 1 - float(self._real_tokens) / self._positions,
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
            broken = [name for name, value in logs.items() if not math.isfinite(value)]
            if broken:
                raise RunFailed(
                    f"At step {self.state.global_step} {' and '.join(broken)} stopped being finite numbers. "
                    "Resume from an earlier checkpoint with a lower learning rate."
                )
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
        inputs = self._prepare_inputs(inputs)
        if not prediction_loss_only:
            inputs = {name: value for name, value in inputs.items() if name != "logits_columns"}
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        return loss, outputs["logits"], inputs["labels"]

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
        probed = self.run_probe(prefix) if description == "Evaluation" else {}
        output.metrics.update({name: value for name, value in probed.items() if name not in output.metrics})
        return output

    def save_projector(self, path: str | Path) -> None:
        """Write the projectors to one `.pth` file, from the main process."""
        if self.args.should_save:
            save_projectors(self.target.projectors, path)

    def save_student(self, output_dir: str | Path) -> None:
        """Write the student alone, with tokenizer and generation config, as `from_pretrained` expects it."""
        self.student.config.use_cache = self._student_uses_cache
        self._save(str(output_dir))
        self.student.config.use_cache = self.args.use_cache

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the student; inside a checkpoint also the projectors beside it."""
        super().save_model(output_dir, _internal_call=_internal_call)
        if _internal_call:
            self.save_projector(Path(output_dir or self.args.output_dir) / PROJECTOR_FILE)

    # The private methods of Trainer that KAVA overrides or calls are below and in `prediction_step`
    # (`_prepare_inputs`); all were read in transformers 5.23.0.

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write student and tokenizer. No pickled arguments: they would carry the hub token."""
        if not self.args.should_save:
            return
        folder = output_dir or self.args.output_dir
        if state_dict is not None:
            own = {n: t for n, t in state_dict.items() if n.startswith(_STUDENT_PREFIX)}
            state_dict = {name.removeprefix(_STUDENT_PREFIX): tensor for name, tensor in own.items()}
        self.student.save_pretrained(folder, state_dict=state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, self.student)
        restore_projectors(self.target.projectors, Path(resume_from_checkpoint) / PROJECTOR_FILE)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)
