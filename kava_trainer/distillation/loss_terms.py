"""The loss terms of one micro-batch, by name, and the weights that they are added with."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ..config.alignment.target_checks import ALIGNMENT_WEIGHTS
from ..config.arguments import KavaTrainingArguments
from ..data.token_alignment.ranges import RANGES, seen_by
from ..models.attention.capture import Feature, in_order, states_of_teacher
from ..models.teacher import TeacherSource
from ..utils.distributed import is_sharded
from .logits_terms import AGREEMENT, FIGURES, KD_ROUTING, LogitsTerms, TeacherLogits
from .logits_tokens import CountedTokens, count_tokens, is_sampled, positions_and_targets, ratio_to_widest, widest
from .losses import token_mean, token_sum
from .model import StudentOutput
from .targets import AlignmentTarget
from .teachers.several import each_teacher, teacher_weights
from .token_alignment.divergence import JoinedTerms, SharedTokens, SpanDivergence
from .token_alignment.states import OWN_TOKENS, compared_items, compared_with_each, read_states
from .token_means import TokenMeans

LOGITS_TERMS = ("lm", "smoothing", "kd")

ANSWERS_ALONE = "answer"
"""What an evaluation adds where the next-token loss is over all tokens: the same over the answers alone."""


class _ReadBatch(NamedTuple):
    """What one teacher reads of a batch."""

    inputs: Mapping[str, Any]
    logits: TeacherLogits
    shared: SharedTokens | None


SCHEDULED_TERMS = tuple(name.removesuffix("_weight") for name in ALIGNMENT_WEIGHTS)
"""Those that pull on the student's states, whose weights `alignment_schedule` moves."""

ALIGNMENT_TERMS = (*SCHEDULED_TERMS, "anchor")

STAGE_ENDS = 0.5
"""The share of the training after which `stage` goes over from states to logits."""


def schedule_factor(schedule: str, progress: float) -> float:
    """What a scheduled weight is multiplied by after a share `progress` of the training, from 0 to 1.

    That is 1 where the schedule is `constant`; `linear` and `cosine` fall from 1 to 0, and `stage` does so at once
    when half of the training is done. What rises in its place is multiplied by what lacks to 1.
    """
    progress = min(max(progress, 0.0), 1.0)
    if schedule == "stage":
        return 1.0 if progress < STAGE_ENDS else 0.0
    if schedule == "linear":
        return 1 - progress
    return (1 + math.cos(math.pi * progress)) / 2 if schedule == "cosine" else 1.0


def needed_teacher_layers(args: KavaTrainingArguments, target: AlignmentTarget, num_layers: int) -> list[Feature]:
    """What the weighted terms read of a teacher with `num_layers` blocks; empty where none reads it."""
    aligned = target.teacher_features if args.aligns else []
    return in_order({*aligned, *([num_layers] if args.kd_weight > 0 else [])})


class LossTerms:
    """Runs what the weighted terms need, and computes them.

    Args:
        args: weights, schedule, temperature, label smoothing.
        target: what is aligned.
        teacher: gives the states, and the head that makes logits of them; None where no term needs it.
        vocabulary: number of the student's logits.
        autocast: makes the context that the teacher runs in; the student's forward brings its own.
    """

    def __init__(
        self,
        args: KavaTrainingArguments,
        target: AlignmentTarget,
        teacher: TeacherSource | None,
        vocabulary: int,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.args, self.target, self.teacher, self.autocast = args, target, teacher, autocast
        self._vocabulary = vocabulary
        self.shared: Sequence[SharedTokens | None] = ()
        """Which tokens of each teacher and of the student are the same, for a divergence where they have other ones."""

    def weights(self, progress: float) -> dict[str, float]:
        """The weight of each term, as the arguments have it now, when the share `progress` of the training is done.

        `alignment_schedule` lets what pulls on the student's states fall; the anchor, which holds the projector, stays.
        `kd_schedule` lets the divergence rise. A term that is held back altogether has the weight 0.
        """
        factors = dict.fromkeys(SCHEDULED_TERMS, schedule_factor(self.args.alignment_schedule, progress))
        if self.args.kd_schedule != "constant":
            factors["kd"] = 1 - schedule_factor(self.args.kd_schedule, progress)
        return {name: weight * factors.get(name, 1.0) for name, weight in self.full_weights.items()}

    @property
    def full_weights(self) -> dict[str, float]:
        """The weight of each term, as the arguments have it now, where no schedule holds it back."""
        args = self.args
        lm_weight = args.lm_weight if args.learns_next_tokens else 0.0
        weights = {
            **{name: getattr(args, f"{name}_weight") for name in self.target.terms if args.aligns},
            "anchor": args.anchor_weight if self.target.decoders and args.aligns else 0.0,
            "lm": lm_weight,
            "smoothing": lm_weight * args.label_smoothing_factor,
            "kd": args.kd_weight,
        }
        return {name: weight for name, weight in weights.items() if weight > 0}

    def are_gathered_with(self, model: nn.Module) -> bool:
        """Whether a pass of the student or of a teacher gathers weights that are spread over the ranks, so that all of
        them must make as many."""
        teachers = (getattr(own, "model", None) for own in each_teacher(self.teacher))
        return any(is_sharded(own) for own in (model, *teachers) if isinstance(own, nn.Module))

    def teacher_states(
        self, inputs: Mapping[str, Any], weights: Mapping[str, float] | None = None
    ) -> dict[Feature, torch.Tensor] | None:
        """The teacher's states on a batch; None where no term reads them, by its weight now where `weights` has it."""
        if self.teacher is None or not self.args.reads_teacher:
            return None
        if not self.args.aligns and weights is not None and not weights.get("kd"):
            return None
        with self.autocast():
            return read_states(self.teacher, inputs, own=self.args.kd_weight > 0)

    def student_outputs(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        teacher_states: dict[Feature, torch.Tensor] | None,
        weights: dict[str, float] | None,
        num_items: torch.Tensor | None = None,
    ) -> StudentOutput:
        """Run student and projectors.

        Args:
            model: the student and the projectors, wrapped or not.
            inputs: a batch of `collators`.
            teacher_states: of the same batch; None where no term reads the teacher.
            weights: of the terms to compute; the next-token loss always is in evaluation, and one on logits that is
                held back is not. With None the two sides are brought together and no term on logits is computed.
            num_items: see `loss`.
        """
        named = weights or {}
        on_logits = {name: named[name] for name in LOGITS_TERMS if named.get(name)}
        if weights and not model.training:
            on_logits = {"lm": 0.0, **on_logits, **({ANSWERS_ALONE: 0.0} if self.args.lm_tokens == "all" else {})}
        if "kd" in on_logits and "origins" in inputs:
            on_logits[AGREEMENT] = 0.0
        if "kd" in on_logits and self._routing is not None:
            on_logits[KD_ROUTING] = 0.0
        aligns = self.args.aligns and (weights is None or not named.keys().isdisjoint(ALIGNMENT_TERMS))
        return model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            packed_lengths=inputs.get("packed_lengths"),
            teacher_states=teacher_states if aligns else None,
            logits_terms=self._logits_terms(inputs, teacher_states, on_logits, num_items) if on_logits else None,
            distils=True,
        )

    def _logits_terms(
        self,
        inputs: Mapping[str, Any],
        teacher_states: dict[Feature, torch.Tensor] | None,
        weights: dict[str, float],
        num_items: torch.Tensor | None,
    ) -> LogitsTerms | JoinedTerms:
        """What computes the terms on logits that have weights inside the model's forward pass."""
        args = self.args
        kinds = {name: self._tokens_of(name, inputs) for name in weights}
        scaled = {name: weight * ratio_to_widest(inputs, num_items, kinds, name) for name, weight in weights.items()}
        teachers = list(self._teacher_logits(inputs, teacher_states or {})) if "kd" in weights else []
        others = [own for own in teachers if RANGES in own.inputs]
        if others and self._routing is not None:
            raise ValueError(
                f"teacher_routing {args.teacher_routing} beside kd_weight needs teachers of one tokenizer."
            )
        joined: list[Any] = []
        options = self._vocabulary, args.kd_temperature, args.kd_beta
        if others:
            positions, targets = positions_and_targets(inputs, {"kd": kinds["kd"]})
            joined += [
                SpanDivergence(scaled["kd"], own.inputs, positions, targets["kd"], own.logits, own.shared, *options)
                for own in others
            ]
        if others and len(others) == len(teachers):
            del kinds["kd"], scaled["kd"]
        if scaled:
            same = [own.logits for own in teachers if RANGES not in own.inputs]
            positions, by_term = positions_and_targets(inputs, kinds)
            joined.append(LogitsTerms(scaled, positions, by_term, *options, same, self._routing))
        return joined[0] if len(joined) == 1 else JoinedTerms(*joined)

    @property
    def _routing(self) -> float | None:
        """The temperature of the router, where one weighs several teachers."""
        routed = self.args.teacher_routing == "agreement" and len(each_teacher(self.teacher)) > 1
        return self.args.teacher_routing_temperature if routed else None

    def _teacher_logits(
        self, inputs: Mapping[str, Any], states: Mapping[Feature, torch.Tensor]
    ) -> Iterator["_ReadBatch"]:
        """What each teacher reads of a batch, and what its logits there are made of."""
        sources = each_teacher(self.teacher)
        shared = [*self.shared, *[None] * len(sources)]
        for number, (source, share) in enumerate(zip(sources, teacher_weights(self.teacher), strict=True)):
            read, own = seen_by(inputs, number) if number else inputs, states_of_teacher(states, number)
            last = own[OWN_TOKENS if RANGES in read else source.num_layers]
            whole = getattr(source, "whole_head", nullcontext)  # a source of the user's own need not have it
            logits = TeacherLogits(last, partial(self._teacher_head, source), share, whole)
            yield _ReadBatch(read, logits, shared[number])

    def _tokens_of(self, name: str, inputs: Mapping[str, Any]) -> CountedTokens:
        """What a term on logits is a mean over."""
        if name in ("kd", *FIGURES):
            return CountedTokens("answers" if name == AGREEMENT else self.args.kd_tokens, written=False)
        return CountedTokens("answers" if name == ANSWERS_ALONE else self.args.lm_tokens, written="origins" in inputs)

    @torch.no_grad()
    def _teacher_head(self, teacher: TeacherSource, states: torch.Tensor) -> torch.Tensor:
        """A teacher's logits [n, vocabulary] of its last states [n, d_t]."""
        with self.autocast():
            return teacher.head(states)

    def loss(
        self,
        outputs: StudentOutput,
        inputs: Mapping[str, Any],
        weights: dict[str, float],
        num_items: torch.Tensor | None = None,
        means: TokenMeans | None = None,
    ) -> torch.Tensor:
        """The weighted sum of the terms, each as a token mean over the whole optimizer step.

        Args:
            outputs: of the student and the projectors, with the same weights.
            inputs: the batch of `collators` that gave them; `counted` [B, T] leaves tokens out.
            weights: of the terms.
            num_items: real tokens, answer tokens and tokens that follow another of their example [3] of the whole
                optimizer step; by default this batch's. Where the batch holds answers that the student wrote, that are
                six: the second and third are what a divergence is a mean over, see `packing.followed_positions`; then
                come the tokens whose states are compared, and the second and third without the student's answers. Where
                the teacher reads other tokens that are four: the last are those whose states are compared.
            means: where the sums behind `<term>_loss`, `<term>_weighted` and `cos_sim` are noted; also
                `rollout_agreement`, the share of the student's own tokens at which it has the teacher's at the top.
        """
        means = TokenMeans() if means is None else means
        mask = inputs["counted"] if "counted" in inputs else inputs["attention_mask"].bool()
        parts = self._alignment(outputs, inputs, mask, num_items, means, weights) if outputs.pairs else []
        kinds = {name: self._tokens_of(name, inputs) for name in outputs.logits_sums}
        own = {kind: count_tokens(inputs, None, kind) for kind in {*kinds.values(), widest(kinds)}}
        for name, total in outputs.logits_sums.items():
            if name == AGREEMENT:
                means.add("rollout_agreement", total, is_sampled(inputs, inputs["answer_index"]).sum())
            elif name in FIGURES:
                means.add(name, total, own[kinds[name]])
            else:
                _note(means, weights, name, total, own[kinds[name]])
        for name in (name for name in LOGITS_TERMS if name in weights and name not in outputs.logits_sums):
            count = count_tokens(inputs, None, self._tokens_of(name, inputs))
            means.add(f"{name}_weighted", torch.zeros_like(count), count)
        if outputs.logits_total is not None:
            count = own[widest(kinds)] if num_items is None else count_tokens(inputs, num_items, widest(kinds))
            parts.append(outputs.logits_total / count.clamp(min=1))
        if outputs.router is not None:
            weighted, loss = outputs.router
            means.add("router_loss", loss * mask.sum(), mask.sum())
            means.add("router_weighted", weighted.detach() * mask.sum(), mask.sum())
            parts.append(token_mean(weighted * mask, mask, None if num_items is None else num_items[0]))
        return torch.stack(parts).sum()

    def _alignment(
        self,
        outputs: StudentOutput,
        inputs: Mapping[str, Any],
        mask: torch.Tensor,
        num_items: torch.Tensor | None,
        means: TokenMeans,
        weights: dict[str, float],
    ) -> list[torch.Tensor]:
        """The weighted terms that compare states."""
        each, tokens = compared_with_each(inputs, mask, len(self.target.parts)), compared_items(inputs, num_items)
        mask = each.any(dim=0) if each.ndim == 3 else each
        pairs = self.target.align(outputs.pairs, each, weights, inputs.get("packed_lengths"))
        cosine = self.target.mean([pair.cosine for pair in pairs], self.target.token_shares(pairs, each, routed=False))
        means.add("cos_sim", token_sum(cosine, mask), mask.sum())
        for name, (total, count) in self.target.figures(pairs, each).items():
            means.add(name, total, count)
        shares = self.target.token_shares(pairs, each)
        parts = []
        for name in (name for name in ALIGNMENT_TERMS if name in weights):
            per_token = self.target.mean([pair.terms[name] for pair in pairs], shares)
            _note(means, weights, name, token_sum(per_token, mask), mask.sum())
            parts.append(weights[name] * token_mean(per_token, mask, tokens))
        return parts


def _note(means: TokenMeans, weights: dict[str, float], name: str, total: torch.Tensor, count: torch.Tensor) -> None:
    means.add(f"{name}_loss", total, count)
    if name in weights:
        means.add(f"{name}_weighted", weights[name] * total, count)
