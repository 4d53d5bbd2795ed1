"""Evaluating and predicting: exact token means, logits where they are asked for, and the probe."""

from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from .fsdp import give_up_whole_weights
from .losses import IGNORED
from .memory_errors import needs_memory
from .metrics import TokenMeans, perplexity
from .probing import ProbingTrainer
from .signals import WATCH


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
