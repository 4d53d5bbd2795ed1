"""The alignment diagnostics of a model in training, on one fixed batch of held-out tokens."""

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from .alignment import Diagnostics, collapse_reason, diagnose
from .student import DistillationModel
from .terms import LossTerms

PROBE_TOKENS = 2048
"""The probe takes as many held-out examples as give this many tokens, or all of them."""

MINIMUM_SHARE = 0.01
"""A term with a smaller share of the student's gradient has next to no effect."""


@dataclass(frozen=True)
class ProbeResult:
    """What the probe shows of each pair of layers and of the loss terms."""

    pairs: list[Diagnostics]
    collapse: str | None
    """Why the first collapsed pair counts as collapsed; None if none does."""
    gradient_shares: dict[str, float] = field(default_factory=dict)
    """Norm of each weighted term's gradient in the student, as a share of the sum of these norms."""

    def mean(self) -> dict[str, float]:
        """Each figure as the mean over the pairs."""
        rows = [pair.to_dict() for pair in self.pairs]
        return {name: fmean(row[name] for row in rows) for name in rows[0]}

    def metrics(self, prefix: str) -> dict[str, float]:
        """The means and gradient shares as log metrics and, where there are several pairs, the figures of each."""
        figures = {f"{prefix}_{name}": value for name, value in self.mean().items()}
        if len(self.pairs) > 1:
            for index, pair in enumerate(self.pairs):
                figures |= {f"{prefix}_pair{index}_{name}": value for name, value in pair.to_dict().items()}
        figures |= {f"{prefix}_{name}_gradient_share": share for name, share in self.gradient_shares.items()}
        return {**figures, f"{prefix}_collapsed": float(self.collapse is not None)}


def choose_examples(dataset: Any, tokens: int = PROBE_TOKENS) -> list[dict[str, Any]]:
    """The first examples of a data set that together hold at least `tokens` tokens."""
    chosen, count = [], 0
    for example in dataset:
        chosen.append(example)
        count += len(example["input_ids"])
        if count >= tokens:
            break
    return chosen


def gradient_shares(terms: dict[str, torch.Tensor], model: nn.Module) -> dict[str, float]:
    """Norm of each term's gradient in a model's trained parameters, as a share of the sum of these norms.

    Args:
        terms: weighted scalar losses by name; their graphs are freed.
        model: whose parameters count.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norms = {}
    for left, (name, term) in enumerate(terms.items(), start=1 - len(terms)):
        gradients = torch.autograd.grad(term, parameters, retain_graph=left < 0, allow_unused=True)
        parts = [gradient.float().norm() for gradient in gradients if gradient is not None]
        norms[name] = torch.stack(parts).norm().item() if parts else 0.0
    total = sum(norms.values())
    return {name: norm / total for name, norm in norms.items()} if total > 0 else {}


class ShareWatch:
    """Notices terms whose share of the student's gradient stays under `MINIMUM_SHARE`, and names each one once."""

    def __init__(self) -> None:
        self._shares: dict[str, list[float]] = {}
        self._named: set[str] = set()

    def without_effect(self, shares: dict[str, float]) -> list[str]:
        """Note one measurement; the terms that were small in it and in all before, from the second on.

        The anchor never counts: it holds the projector and has no gradient in the student.
        """
        for name, share in shares.items():
            self._shares.setdefault(name, []).append(share)
        small = [
            name
            for name, seen in self._shares.items()
            if name != "anchor" and len(seen) > 1 and max(seen) < MINIMUM_SHARE and name not in self._named
        ]
        self._named.update(small)
        return small


class AlignmentProbe:
    """Measures how student, targets and teacher relate, and what each term does, on examples that never change.

    Args:
        examples: held-out examples with `input_ids` and `labels`.
        collator: pads them.
        batch_size: examples at a time.
        gradient_examples: examples that the gradient shares are measured on, in one batch.
    """

    def __init__(
        self,
        examples: list[dict[str, Any]],
        collator: Callable[[list], dict],
        batch_size: int,
        gradient_examples: int,
    ) -> None:
        batches = [examples[start : start + batch_size] for start in range(0, len(examples), batch_size)]
        self._batches = [collator(batch) for batch in batches]
        self._gradient_batch = collator(examples[:gradient_examples])

    def measure(self, model: DistillationModel, terms: LossTerms, progress: float = 0.0) -> ProbeResult:
        """Run both models on the probe and compare. The model keeps its mode, the random numbers their state.

        Args:
            model: student and projectors, not wrapped.
            terms: runs the models and computes the losses.
            progress: share of the training that is done, for the weights of the terms.
        """
        training = model.training
        pairs = self._diagnose(model.eval(), terms)
        # As in training: gradient checkpointing, which saves the memory of a small device, works in that mode only.
        shares = self._gradient_shares(model.train(), terms, progress)
        model.train(training)
        reasons = [reason for pair in pairs if (reason := collapse_reason(pair, model.target.student_size))]
        return ProbeResult(pairs, reasons[0] if reasons else None, shares)

    @torch.no_grad()
    def _diagnose(self, model: DistillationModel, terms: LossTerms) -> list[Diagnostics]:
        rows: list[list[list[torch.Tensor]]] = [[[], [], [], []] for _ in model.target.pairs]
        for batch in self._batches:
            batch = send_to_device(batch, model.student.device)
            mask = batch["attention_mask"].bool()
            states = terms.teacher_states(batch)
            output = terms.student_outputs(model, {**batch, "logits_columns": mask.new_empty(0).long()}, states)
            for row, (student, teacher), pair in zip(rows, model.target.pairs, output.pairs, strict=True):
                compared = (pair.student, pair.target, output.hidden_states[student], states[teacher])
                for kept, tensor in zip(row, compared, strict=True):
                    kept.append(tensor[mask].float())
        return [diagnose(*(torch.cat(kept) for kept in row)) for row in rows]

    def _gradient_shares(self, model: DistillationModel, terms: LossTerms, progress: float) -> dict[str, float]:
        batch = send_to_device(self._gradient_batch, model.student.device)
        devices = [model.student.device] if model.student.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.enable_grad():
            states = terms.teacher_states(batch)
            losses = terms.compute(terms.student_outputs(model, batch, states), batch, states)
            weights = terms.weights(progress)
            weighted = {name: weights[name] * loss for name, loss in losses.items() if weights[name] > 0}
            return gradient_shares(weighted, model.student)
