"""The loss terms of one micro-batch, by name, and the weights that they are added with."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from .arguments import KavaTrainingArguments
from .losses import IGNORED, generalized_jsd_loss, next_token_loss, next_tokens, token_mean, token_sum
from .metrics import TokenMeans
from .student import DistillationModel, StudentOutput
from .targets import HiddenStateTarget
from .teacher import TeacherSource

ALIGNMENT_TERMS, LOGITS_TERMS = ("mercator", "mse", "anchor"), ("lm", "kd")


def schedule_factor(schedule: str, progress: float) -> float:
    """What a scheduled weight is multiplied by.

    Args:
        schedule: `constant`, `linear` or `cosine`; the latter two fall from 1 to 0.
        progress: share of the training that is done, from 0 to 1.
    """
    progress = min(max(progress, 0.0), 1.0)
    if schedule == "linear":
        return 1 - progress
    return (1 + math.cos(math.pi * progress)) / 2 if schedule == "cosine" else 1.0


def needed_teacher_layers(args: KavaTrainingArguments, target: HiddenStateTarget, num_layers: int) -> list[int]:
    """The teacher's layers that the weighted terms read; empty where none reads the teacher.

    Args:
        args: the weights.
        target: what is aligned.
        num_layers: number of the teacher's blocks, which is the index of its last state.
    """
    aligned = target.teacher_layers if args.aligns else []
    return sorted({*aligned, *([num_layers] if args.kd_weight > 0 else [])})


class LossTerms:
    """Runs what the weighted terms need, and computes them.

    Args:
        args: weights, schedule, temperature, label smoothing.
        target: what is aligned.
        teacher: gives the states, and the head that makes logits of them; None where no term needs it.
        autocast: makes the context that the teacher runs in; the student's forward brings its own.
    """

    def __init__(
        self,
        args: KavaTrainingArguments,
        target: HiddenStateTarget,
        teacher: TeacherSource | None,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.args, self.target, self.teacher, self._autocast = args, target, teacher, autocast
        weights = {
            "mercator": args.mercator_weight,
            "mse": args.mse_weight,
            "anchor": args.anchor_weight if target.decoders and args.aligns else 0.0,
            "lm": args.lm_weight,
            "kd": args.kd_weight,
        }
        self._weights = {name: weight for name, weight in weights.items() if weight > 0}

    @property
    def names(self) -> list[str]:
        """The terms that are computed."""
        return list(self._weights)

    def weights(self, progress: float) -> dict[str, float]:
        """The weight of each term when the share `progress` of the training is done.

        The schedule moves what pulls on the student's states; the anchor, which holds the projector, stays.
        """
        factor = schedule_factor(self.args.alignment_schedule, progress)
        return {name: w * factor if name in ("mercator", "mse") else w for name, w in self._weights.items()}

    def teacher_states(self, inputs: dict[str, torch.Tensor]) -> dict[int, torch.Tensor] | None:
        """The teacher's states on a batch; None where no term reads them."""
        if self.teacher is None or not (self.args.aligns or self.args.kd_weight > 0):
            return None
        with self._autocast():
            return self.teacher.features(inputs["input_ids"], inputs["attention_mask"])

    def student_outputs(
        self,
        model: DistillationModel,
        inputs: dict[str, torch.Tensor],
        teacher_states: dict[int, torch.Tensor] | None,
    ) -> StudentOutput:
        """Run student and projectors, with logits only where a term or the evaluation reads them."""
        columns = inputs.get("logits_columns")
        if model.training and not any(name in self._weights for name in LOGITS_TERMS):
            columns = inputs["input_ids"].new_empty(0)
        return model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            logits_columns=columns,
            teacher_states=teacher_states if self.args.aligns else None,
        )

    def compute(
        self,
        outputs: StudentOutput,
        inputs: dict[str, torch.Tensor],
        teacher_states: dict[int, torch.Tensor] | None,
        num_items: torch.Tensor | None = None,
        means: TokenMeans | None = None,
        progress: float = 0.0,
    ) -> dict[str, torch.Tensor]:
        """Each unweighted term as a token mean over the whole optimizer step; without gradients `lm` is always there.

        Args:
            outputs: of the student and the projectors.
            inputs: the batch of `DistillationCollator` that gave them; `counted` [B, T] leaves tokens out.
            teacher_states: of the same batch; None where no term reads the teacher.
            num_items: real tokens and answer tokens [2] of the whole optimizer step; by default this batch's.
            means: where the sums behind `<term>_loss`, `<term>_weighted` and `cos_sim` are noted.
            progress: share of the training that is done, for the weights of what is noted.
        """
        means = TokenMeans() if means is None else means
        weights = self.weights(progress)
        tokens, answers = (None, None) if num_items is None else num_items
        mask = inputs["counted"] if "counted" in inputs else inputs["attention_mask"].bool()
        terms = {}
        if outputs.pairs:
            terms |= self._alignment(outputs, mask, tokens, means, weights)
        if outputs.logits.shape[1] > 0:
            terms |= self._logits_terms(outputs.logits, inputs, teacher_states, answers, means, weights)
        return terms

    def total(self, terms: dict[str, torch.Tensor], progress: float = 0.0) -> torch.Tensor:
        """Weighted sum of the terms when the share `progress` of the training is done."""
        weights = self.weights(progress)
        return torch.stack([weights.get(name, 0.0) * term for name, term in terms.items()]).sum()

    def _alignment(
        self,
        outputs: StudentOutput,
        mask: torch.Tensor,
        tokens: torch.Tensor | None,
        means: TokenMeans,
        weights: dict[str, float],
    ) -> dict[str, torch.Tensor]:
        pairs = self.target.align(outputs.pairs, mask, self._weights)
        means.add("cos_sim", token_sum(self.target.mean([pair.cosine for pair in pairs]), mask), mask.sum())
        terms = {}
        for name in (name for name in ALIGNMENT_TERMS if name in self._weights):
            per_token = self.target.mean([pair.terms[name] for pair in pairs])
            _note(means, weights, name, token_sum(per_token, mask), mask.sum())
            terms[name] = token_mean(per_token, mask, tokens)
        return terms

    def _logits_terms(
        self,
        logits: torch.Tensor,
        inputs: dict[str, torch.Tensor],
        teacher_states: dict[int, torch.Tensor] | None,
        answers: torch.Tensor | None,
        means: TokenMeans,
        weights: dict[str, float],
    ) -> dict[str, torch.Tensor]:
        columns = inputs.get("logits_columns")
        targets = next_tokens(inputs["labels"], columns)
        mask = targets != IGNORED
        divisor = mask.sum() if answers is None else answers
        terms = {}
        evaluating = not torch.is_grad_enabled()
        if "lm" in self._weights or evaluating:
            smoothing = 0.0 if evaluating else self.args.label_smoothing_factor
            terms["lm"] = next_token_loss(logits, targets, divisor, smoothing)
        if "kd" in self._weights:
            states = teacher_states[self.teacher.num_layers]
            states = states if columns is None else states[:, columns]
            temperature, beta = self.args.kd_temperature, self.args.kd_beta
            with self._autocast():
                terms["kd"] = generalized_jsd_loss(logits, states, self.teacher.head, mask, temperature, beta, divisor)
        for name, term in terms.items():
            _note(means, weights, name, term * divisor, mask.sum())
        return terms


def _note(means: TokenMeans, weights: dict[str, float], name: str, total: torch.Tensor, count: torch.Tensor) -> None:
    means.add(f"{name}_loss", total, count)
    if name in weights:
        means.add(f"{name}_weighted", weights[name] * total, count)
