"""The alignment diagnostics of a model in training, on one fixed batch of held-out tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from accelerate.utils import send_to_device

from .alignment import Diagnostics, collapse_reason, diagnose
from .student import DistillationModel
from .teacher import TeacherSource

PROBE_TOKENS = 2048
"""The probe takes as many held-out examples as give this many tokens, or all of them."""


@dataclass(frozen=True)
class ProbeResult:
    """Diagnostics of each pair of layers, and why the first collapsed pair counts as collapsed (None if none does)."""

    pairs: list[Diagnostics]
    collapse: str | None

    def mean(self) -> dict[str, float]:
        """Each figure as the mean over the pairs."""
        rows = [pair.to_dict() for pair in self.pairs]
        return {name: fmean(row[name] for row in rows) for name in rows[0]}

    def metrics(self, prefix: str) -> dict[str, float]:
        """The means as log metrics and, where there are several pairs, the figures of each pair."""
        figures = {f"{prefix}_{name}": value for name, value in self.mean().items()}
        if len(self.pairs) > 1:
            for index, pair in enumerate(self.pairs):
                figures |= {f"{prefix}_pair{index}_{name}": value for name, value in pair.to_dict().items()}
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


class AlignmentProbe:
    """Measures how student, targets and teacher relate on examples that never change.

    Args:
        examples: held-out examples with `input_ids` and `labels`.
        collator: pads them.
        batch_size: examples at a time.
    """

    def __init__(self, examples: list[dict[str, Any]], collator: Callable[[list], dict], batch_size: int) -> None:
        batches = [examples[start : start + batch_size] for start in range(0, len(examples), batch_size)]
        self._batches = [collator(batch) for batch in batches]

    @torch.no_grad()
    def measure(self, model: DistillationModel, teacher: TeacherSource) -> ProbeResult:
        """Run both models on the probe, without dropout, and compare. The model keeps its mode."""
        training = model.training
        model.eval()
        rows: list[list[list[torch.Tensor]]] = [[[], [], []] for _ in model.target.pairs]
        for batch in self._batches:
            batch = send_to_device(batch, model.student.device)
            mask = batch["attention_mask"].bool()
            states = teacher.features(batch["input_ids"], batch["attention_mask"])
            nowhere = batch["input_ids"].new_empty(0)
            output = model(batch["input_ids"], batch["attention_mask"], logits_columns=nowhere, teacher_states=states)
            for row, (student, layer), target in zip(rows, model.target.pairs, output.targets, strict=True):
                for kept, tensor in zip(row, (output.hidden_states[student], target, states[layer]), strict=True):
                    kept.append(tensor[mask].float())
        model.train(training)
        pairs = [diagnose(*(torch.cat(kept) for kept in row)) for row in rows]
        width = rows[0][0][0].shape[-1]
        reasons = [reason for pair in pairs if (reason := collapse_reason(pair, width))]
        return ProbeResult(pairs, reasons[0] if reasons else None)
