"""What is aligned: which states to capture, how to project them, which loss terms come of it."""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config.arguments import KavaTrainingArguments
from ..config.layer_mapping import resolve_layer_pairs
from ..models.layers import number_of_layers, state_width
from ..utils.errors import BadRequest
from .losses import mercator_per_token, mse_per_token, relative_mse_per_token
from .projector import LowRankBridge, ProjectorConfig, build_decoder, build_projector, normalise

Direction = Literal["teacher_to_student", "student_to_teacher", "none"]


class AlignedStates(NamedTuple):
    """The two sides of one pair of layers in the same space, [B, T, d] each.

    It is a tuple, because the hooks of FSDP2 look for the tensors of an output in those.
    """

    student: torch.Tensor
    target: torch.Tensor
    reconstruction: tuple[torch.Tensor, torch.Tensor] | None = None
    """With a reconstruction anchor, the rebuilt and the true normalised teacher states [B, T, d_t]."""


@dataclass(frozen=True)
class Alignment:
    """What comparing the two sides of one pair gives, token by token: float32 [B, T] each."""

    terms: dict[str, torch.Tensor]
    """Unweighted loss terms by name."""
    cosine: torch.Tensor


_PLAIN_TERMS: dict[str, Callable[..., torch.Tensor]] = {"mse": mse_per_token, "relative_mse": relative_mse_per_token}
"""Terms that compare the two sides alone, by name."""


class HiddenStateTarget(nn.Module):
    """Aligns hidden states of the student with those of the teacher, with one projector a pair, or with none.

    With `teacher_to_student` the teacher's states are projected into the student's space and the target moves with
    the projector. With `student_to_teacher` the student's states are projected and the teacher's own are the target.
    With `none` there is no projector, and the states themselves are compared. A `LowRankBridge` projects both sides.

    Args:
        pairs: (student layer, teacher layer) pairs in the convention of `hidden_states`.
        config: shape of each projector; without projectors, the width of either side.
        alpha: weight of the direction in the Mercator loss.
        beta: weight of the log-magnitude in the Mercator loss.
        direction: which side is projected.
        weights: weight of each pair; equal by default. Only their proportions count.

    Raises:
        ValueError: if there is a rank, and the direction is not `teacher_to_student`.
    """

    def __init__(
        self,
        pairs: list[tuple[int, int]],
        config: ProjectorConfig,
        alpha: float = 1.0,
        beta: float = 0.01,
        direction: Direction = "teacher_to_student",
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if config.rank is not None and direction != "teacher_to_student":
            raise ValueError(f"A bridge is given the sizes of direction='teacher_to_student', not of {direction!r}.")
        self.pairs, self.direction = pairs, direction
        self.alpha, self.beta = alpha, beta
        shares = [1.0] * len(pairs) if weights is None else list(weights)
        self.shares = [share / sum(shares) for share in shares]
        projected = len(pairs) if direction != "none" else 0
        self.projectors = nn.ModuleList(build_projector(config) for _ in range(projected))
        count = projected if config.anchor == "reconstruction" else 0
        self.decoders = nn.ModuleList(build_decoder(config) for _ in range(count))
        self._sizes = config.input_size, config.output_size
        self.student_size = config.output_size if direction == "teacher_to_student" else config.input_size

    @property
    def widths(self) -> str:
        """The widths of the states, for people: `896 -> 1536` through a projector, `576 wide` without one.

        Those of a bridge are `1536 -> 8 <- 896`: teacher, rank and student.
        """
        source, result = self._sizes
        if self.bridges:
            ranks = dict.fromkeys(str(bridge.config.rank) for bridge in self.bridges)
            return f"{source} -> {', '.join(ranks)} <- {result}"
        return f"{source} -> {result}" if self.projectors else f"{source} wide"

    @property
    def bridges(self) -> list[LowRankBridge]:
        """The projectors where they are bridges of both sides; else none."""
        return [projector for projector in self.projectors if isinstance(projector, LowRankBridge)]

    def most_dimensions(self, index: int) -> int:
        """How many dimensions the targets of a pair can use at most: the student's, or those of a bridge."""
        return self.bridges[index].rank if self.bridges else self.student_size

    @property
    def use(self) -> dict[str, Any]:
        """What the projectors map, as it stands in their file."""
        return {"direction": self.direction, "pairs": [list(pair) for pair in self.pairs]}

    @property
    def student_layers(self) -> list[int]:
        """Layers of the student to capture."""
        return [student for student, _ in self.pairs]

    @property
    def teacher_layers(self) -> list[int]:
        """Layers of the teacher to capture."""
        return [teacher for _, teacher in self.pairs]

    def forward(
        self, student_states: dict[int, torch.Tensor], teacher_states: dict[int, torch.Tensor]
    ) -> list[AlignedStates]:
        """Bring both sides of each pair into one space.

        Args:
            student_states: [B, T, d_s] by student layer.
            teacher_states: [B, T, d_t] by teacher layer.
        """
        return [
            self._project(index, student_states[student], teacher_states[teacher])
            for index, (student, teacher) in enumerate(self.pairs)
        ]

    def _project(self, index: int, student: torch.Tensor, teacher: torch.Tensor) -> AlignedStates:
        if self.direction == "none":
            return AlignedStates(student, teacher)
        projector = self.projectors[index]
        if isinstance(projector, LowRankBridge):
            return AlignedStates(projector.student(student), projector(teacher))
        if self.direction == "student_to_teacher":
            return AlignedStates(projector(student), teacher)
        target = projector(teacher)
        reconstruction = (self.decoders[index](target), normalise(teacher)) if self.decoders else None
        return AlignedStates(student, target, reconstruction)

    def align(self, pairs: list[AlignedStates], mask: torch.Tensor, names: Container[str]) -> list[Alignment]:
        """Compare both sides, pair by pair, at the tokens where `mask` [B, T] is true.

        Args:
            pairs: what `forward` gave.
            mask: boolean [B, T].
            names: the terms to compute, of `mercator`, `mse`, `relative_mse` and `anchor`.
        """
        return [self._compare(pair, mask, names) for pair in pairs]

    def _compare(self, pair: AlignedStates, mask: torch.Tensor, names: Container[str]) -> Alignment:
        mercator, cosine = mercator_per_token(pair.student, pair.target, mask, self.alpha, self.beta)
        terms = {"mercator": mercator} if "mercator" in names else {}
        for name, function in _PLAIN_TERMS.items():
            if name in names:
                terms[name] = function(pair.student, pair.target, mask)
        if "anchor" in names and pair.reconstruction is not None:
            terms["anchor"] = mse_per_token(*pair.reconstruction, mask)
        return Alignment(terms, cosine)

    def mean(self, values: list[torch.Tensor]) -> torch.Tensor:
        """Weighted mean over the pairs of one figure a pair."""
        return torch.stack([share * value for share, value in zip(self.shares, values, strict=True)]).sum(dim=0)


def build_target(
    args: KavaTrainingArguments,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    inherited: Sequence[int] | None = None,
) -> HiddenStateTarget:
    """The alignment that the arguments ask for, with random projectors.

    Args:
        args: layers, direction, anchor and shape.
        student: gives its depth and width.
        teacher: gives its depth and width.
        inherited: see `layer_mapping.resolve_layer_pairs`.

    Raises:
        BadRequest: if a layer does not exist, layers of one model differ in width, or those of both do and there is
            to be no projector, or there are not as many `layer_weights` as pairs, or a bridge is to have more
            dimensions than the states.
    """
    pairs = resolve_layer_pairs(args.layer_mapping, number_of_layers(student), number_of_layers(teacher), inherited)
    if args.layer_weights is not None and len(args.layer_weights) != len(pairs):
        raise BadRequest(
            f"layer_weights has {len(args.layer_weights)} numbers, but layer_mapping {args.layer_mapping} gives "
            f"{len(pairs)} pairs: {', '.join(map(str, pairs))}."
        )
    sizes = (state_width(teacher, (layer for _, layer in pairs)), state_width(student, (layer for layer, _ in pairs)))
    if args.projector_direction == "none" and sizes[0] != sizes[1]:
        raise BadRequest(
            f"projector_direction none compares the states themselves, but the teacher's are {sizes[0]} wide and the "
            f"student's {sizes[1]};",
            "write projector_direction student_to_teacher, or name a student as wide as its teacher.",
        )
    if args.projector_direction == "student_to_teacher":
        sizes = sizes[::-1]
    if isinstance(args.projector_rank, int) and args.projector_rank > min(sizes):
        raise BadRequest(
            f"projector_rank is {args.projector_rank}, but the teacher's states are {sizes[0]} wide and the student's "
            f"{sizes[1]};",
            f"write {min(sizes)} at most, or auto.",
        )
    dropout = cast(float, args.projector_dropout)
    config = ProjectorConfig(*sizes, args.projector_mlp_ratio, dropout, args.projector_anchor, args.projector_rank)
    shape = (args.mercator_alpha, args.mercator_beta, args.projector_direction, args.layer_weights)
    return HiddenStateTarget(pairs, config, *shape)


def no_target(student: PreTrainedModel) -> HiddenStateTarget:
    """The alignment of nothing, for a student that learns from its next tokens alone."""
    width = state_width(student, [])
    return HiddenStateTarget([], ProjectorConfig(width, width))
