"""The alignment diagnostics of a model in training, on one fixed batch of held-out tokens."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from accelerate.utils import send_to_device

from ..data.token_alignment.ranges import aligned_tokens
from ..distillation.loss_terms import LossTerms
from ..distillation.model import DistillationModel
from ..distillation.targets.base import Comparison
from ..distillation.token_alignment.states import compared_with_each, is_compared
from ..models.attention.capture import Feature
from ..models.layers import keeping_gradients
from ..utils.distributed import give_up_whole_weights, whole
from ..utils.progress_bar import STEPS, Progress, progress_bar, told
from .diagnostics import Diagnostics, collapse_reason
from .sample import Sample

PROBE_TOKENS = 2048
"""The probe takes as many held-out examples as give this many tokens, or all of them."""

GRADIENT_EXAMPLES = 16
"""Examples of the probe that the gradient of each term is measured on."""

MINIMUM_SHARE = 0.01
"""A term with a smaller share of the student's gradient has next to no effect."""


@dataclass(frozen=True)
class ProbeResult:
    """What the probe shows of each pair of layers and of the loss terms."""

    pairs: list[Diagnostics]
    shares: list[float]
    """Weight of each pair; they sum to 1."""
    collapse: str | None
    """Why the worst of the collapsed pairs counts as collapsed, and how many do; None if none does."""
    gradient_shares: dict[str, float] = field(default_factory=dict)
    """Norm of each weighted term's gradient in the student, as a share of the sum of these norms."""
    layers: list[Comparison] = field(default_factory=list)
    """Of each pair, the student's first; and which part of them is compared, where there are several."""
    reasons: list[str | None] = field(default_factory=list)
    """Why each pair counts as collapsed; None where it does not."""

    def mean(self) -> dict[str, float]:
        """Each figure as the weighted mean over the pairs."""
        rows = [pair.to_dict() for pair in self.pairs]
        return {name: sum(share * row[name] for share, row in zip(self.shares, rows, strict=True)) for name in rows[0]}

    def by_pair(self) -> list[dict[str, Any]]:
        """The figures of each pair with its `student_layer`, its `teacher_layer`, and whether it `collapsed`; with
        the `part` where several are compared.

        None of a result of an older checkpoint, which does not tell the layers.
        """
        if not self.layers:
            return []
        return [
            {**_names(layers), **pair.to_dict(), "collapsed": reason is not None}
            for layers, pair, reason in zip(self.layers, self.pairs, self.reasons, strict=True)
        ]

    def metrics(self, prefix: str) -> dict[str, float]:
        """The means and gradient shares as log metrics and, where there are several pairs, the figures of each."""
        figures = {f"{prefix}_{name}": value for name, value in self.mean().items()}
        if len(self.pairs) > 1:
            for index, pair in enumerate(self.pairs):
                figures |= {f"{prefix}_pair{index}_{name}": value for name, value in pair.to_dict().items()}
        figures |= {f"{prefix}_{name}_gradient_share": share for name, share in self.gradient_shares.items()}
        return {**figures, f"{prefix}_collapsed": float(self.collapse is not None)}


class ShareWatch:
    """Notices terms whose share of the student's gradient stays under `MINIMUM_SHARE`, and names each one once.

    Terms to be `ignored` are meant to have none: the anchor, and what a schedule lets fade out.
    """

    def __init__(self, ignored: set[str]) -> None:
        self._ignored = ignored
        self._small_before: set[str] = set()
        self._named: set[str] = set()

    def state(self) -> list[list[str]]:
        """What has been noted, to be put back with `restore`."""
        return [sorted(self._small_before), sorted(self._named)]

    def restore(self, state: list[list[str]]) -> None:
        """Put back what `state` gave."""
        self._small_before, self._named = map(set, state)

    def without_effect(self, shares: dict[str, float]) -> list[str]:
        """Note one measurement; the terms that were small in it and in the one before."""
        small = {name for name, share in shares.items() if share < MINIMUM_SHARE} - self._ignored
        named = sorted((small & self._small_before) - self._named)
        self._small_before = small
        self._named.update(named)
        return named


class AlignmentProbe:
    """Measures how student, targets and teacher relate, and what each term does, on examples that never change.

    Args:
        examples: held-out examples with `input_ids` and `labels`.
        collator: pads them.
        batch_size: examples at a time.
        gradient_batch_size: examples at a time with gradients, as many as the device holds in training.
    """

    def __init__(
        self,
        examples: list[dict[str, Any]],
        collator: Callable[[list[Any]], dict[str, Any]],
        batch_size: int,
        gradient_batch_size: int,
    ) -> None:
        first = examples[:GRADIENT_EXAMPLES]
        self._tokens = aligned_tokens(examples)
        self._batches = [collator(batch) for batch in _split(examples, batch_size)]
        self._gradient_batches = [collator(batch) for batch in _split(first, gradient_batch_size)]

    def measure(
        self, model: DistillationModel, terms: LossTerms, progress: float = 0.0, gradient_batches: int | None = None
    ) -> ProbeResult:
        """Run both models on the probe and compare. Mode, gradients and random numbers are left as they were.

        Args:
            model: student and projectors, not wrapped, but they may be sharded; then every rank must measure.
            terms: runs the models and computes the losses.
            progress: share of the training that is done, for the weights of the terms.
            gradient_batches: on how many batches the gradient of each term is measured; on all there are by default.
        """
        batches, training = self._gradient_batches[:gradient_batches], model.training
        weights = terms.weights(progress) if batches else {}
        passes = len(self._batches) + len(model.target.shares) + sum(map(bool, weights.values())) * len(batches)
        line = f"Measuring the alignment on {self._tokens} held-out tokens"
        with told(line, once=True), progress_bar(passes, "Measuring the alignment", "pass", form=STEPS) as bar:
            pairs = self._diagnose(model.eval(), terms, bar)
            give_up_whole_weights(model)
            # As in training: gradient checkpointing, which saves the memory of a small device, works in that mode only.
            shares = self._gradient_shares(model.train(), terms, weights, batches, bar)
        model.train(training)
        reasons = [collapse_reason(pair, model.target.most_dimensions(i)) for i, pair in enumerate(pairs)]
        layers = model.target.comparisons
        collapse = describe_collapse(reasons, pairs, layers)
        return ProbeResult(pairs, model.target.shares, collapse, shares, layers, reasons)

    @torch.no_grad()
    def _diagnose(self, model: DistillationModel, terms: LossTerms, bar: Progress) -> list[Diagnostics]:
        samples = [Sample(model.target.within_examples) for _ in model.target.shares]
        for batch in self._batches:
            batch = send_to_device(batch, model.student.device)
            real = batch.get("counted", batch["attention_mask"]).bool()
            mask = compared_with_each(batch, real, len(model.target.parts))
            states = cast(dict[Feature, torch.Tensor], terms.teacher_states(batch))
            output = terms.student_outputs(model, batch, states, None)
            for index, (sample, pair) in enumerate(zip(samples, output.pairs, strict=True)):
                sample.add(model.target.sides(index, pair, output.hidden_states, states, mask))
            bar.update()
        found = []
        for sample in samples:
            found.append(sample.diagnose())
            bar.update()
        return found

    def _gradient_shares(
        self,
        model: DistillationModel,
        terms: LossTerms,
        weights: dict[str, float],
        batches: list[dict[str, Any]],
        bar: Progress,
    ) -> dict[str, float]:
        """Norm of each weighted term's gradient in the student, as a share of the sum of these norms.

        One backward pass a term, each from a forward pass of its own: one gradient and one graph in memory at a time,
        and reentrant checkpointing works too.
        """
        devices = [model.student.device] if model.student.device.type == "cuda" else []
        norms = {}
        with keeping_gradients(model):
            for name, weight in weights.items():
                model.zero_grad()
                if weight == 0:  # a schedule holds it back
                    norms[name] = 0.0
                    continue
                with torch.random.fork_rng(devices), torch.enable_grad():
                    torch.manual_seed(0)
                    _backward(model, terms, {name: weight}, batches, bar)
                norms[name] = _norm(parameter.grad for parameter in model.student.parameters())
        total = sum(norms.values())
        return {name: norm / total for name, norm in norms.items()} if total > 0 else {}


def _backward(
    model: DistillationModel,
    terms: LossTerms,
    weights: dict[str, float],
    batches: list[dict[str, Any]],
    bar: Progress,
) -> None:
    """The gradient of the terms that have weights, as token means over all batches."""
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    answers, following = (sum(len(batch[name]) for batch in batches) for name in ("next_tokens", "next_index"))
    teachers = len(model.target.parts)
    compared = sum(int(is_compared(batch, batch["attention_mask"].bool(), teachers).sum()) for batch in batches)
    for batch in batches:
        batch = send_to_device(batch, model.student.device)
        states = terms.teacher_states(batch)
        counts = torch.tensor([tokens, answers, following, compared], device=model.student.device)
        outputs = terms.student_outputs(model, batch, states, weights, counts)
        terms.loss(outputs, batch, weights, counts).backward()
        bar.update()


def _names(layers: Comparison) -> dict[str, Any]:
    student, teacher, *part = layers
    return {"student_layer": student, "teacher_layer": teacher, **({"part": part[0]} if part else {})}


def describe_collapse(
    reasons: Sequence[str | None], pairs: Sequence[Diagnostics], layers: Sequence[Comparison]
) -> str | None:
    """Why an alignment counts as collapsed: of several pairs how many do, and the worst of them; None if none does."""
    if not any(reasons):
        return None
    worst = worst_pair(reasons, pairs)
    reason = cast(str, reasons[worst])
    if len(pairs) == 1:
        return reason
    student, teacher, *part = layers[worst]
    count = sum(own is not None for own in reasons)
    which = "layers" if count == 1 else "the worst are layers"
    where = " ".join([f"{student} -> {teacher}", *part])
    return f"{count} of {len(pairs)} pairs of layers collapsed, {which} {where}: {reason}"


def worst_pair(reasons: Sequence[str | None], pairs: Sequence[Diagnostics]) -> int:
    """The number of the collapsed pair with the lowest margin; one that is no finite number is below all others."""
    collapsed = [number for number, reason in enumerate(reasons) if reason is not None]
    return min(collapsed, key=lambda number: pairs[number].margin if math.isfinite(pairs[number].margin) else -math.inf)


def _split(examples: list[dict[str, Any]], size: int) -> list[list[dict[str, Any]]]:
    return [examples[start : start + size] for start in range(0, len(examples), size)]


def _norm(gradients: Iterable[torch.Tensor | None]) -> float:
    found = (gradient for gradient in gradients if gradient is not None)
    parts = [whole(torch.linalg.vector_norm(gradient, dtype=torch.float32)) for gradient in found]
    return torch.stack(parts).norm().item() if parts else 0.0
