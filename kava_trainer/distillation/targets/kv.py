"""`alignment_target` kv: keys and values of mapped layers as a cache would hold them, after RoPE."""

from collections.abc import Sequence
from typing import Any, Literal

import torch

from ...models.attention.capture import AttentionPart, Feature
from ..projector import ProjectorConfig
from .base import Comparison, Direction
from .projected import Features, ProjectedTarget, Sharing

KvShape = Literal["flat", "headwise"]

PARTS = ("key", "value")


def heads_by_place(student: int, teacher: int) -> list[int]:
    """Which of the teacher's heads each of the student's is compared with: the one at the same relative place."""
    return [head * teacher // student for head in range(student)]


class KeyValueTarget(ProjectedTarget):
    """Aligns what both models keep of each token in their key-value caches.

    `flat` lays the heads of all its layers end to end: there is one comparison of the keys and one of the values, each
    with one projector. `headwise` compares keys and values of each pair of layers head by head; where the models have
    different numbers of heads, each head of the student has the teacher's at the same relative place. The heads of a
    pair share one projector for the keys and one for the values.

    Args:
        pairs: (student layer, teacher layer) pairs; layer k is what block k attends to.
        shape: `flat` or `headwise`.
        heads: of the student and of the teacher.
        config: shape of each projector, for the vectors that `shape` makes; without projectors, the width of either.
        alpha: weight of the direction in the Mercator loss.
        beta: weight of the log-magnitude in the Mercator loss.
        direction: which side is projected.
        weights: weight of each pair, for `headwise`; equal by default.
        layers: for `flat` the layers of the student and of the teacher, by default those of the pairs.
        sharing: `none`, or `all` for one projector of the keys, and one of the values, for all pairs.
    """

    name = "kv"
    kinds = len(PARTS)

    def __init__(
        self,
        pairs: list[tuple[int, int]],
        shape: KvShape,
        heads: tuple[int, int],
        config: ProjectorConfig,
        alpha: float = 1.0,
        beta: float = 0.01,
        direction: Direction = "teacher_to_student",
        weights: Sequence[float] | None = None,
        layers: tuple[Sequence[int], Sequence[int]] | None = None,
        sharing: Sharing = "none",
    ) -> None:
        self.shape = shape
        count = len(PARTS) if shape == "flat" else len(PARTS) * len(pairs)
        each = None if weights is None or shape == "flat" else [weight for weight in weights for _ in PARTS]
        super().__init__(pairs, [config] * count, alpha, beta, direction, each, sharing)
        own = tuple(sorted(set(side)) for side in zip(*pairs, strict=True)) if layers is None else layers
        self._layers = [list(side) for side in own]
        self.heads = heads
        self.places = heads_by_place(*heads)

    @property
    def comparisons(self) -> list[Comparison]:
        """Of each comparison the last layers and the part."""
        if self.shape == "flat":
            last = max(self._layers[0]), max(self._layers[1])
            return [(*last, f"all {part}s") for part in PARTS]
        return [(*pair, f"{part}s") for pair in self.pairs for part in PARTS]

    @property
    def told_layers(self) -> str:
        """Which layers are compared, for people."""
        if self.shape == "headwise":
            return super().told_layers
        student, teacher = map(_listed, self._layers)
        return f"all of {student} with all of {teacher}"

    @property
    def use(self) -> dict[str, Any]:
        """What the projectors map, as it stands in their file."""
        layers = {"layers": self._layers} if self.shape == "flat" else {}
        return {**super().use, "shape": self.shape, **layers}

    @property
    def student_features(self) -> list[Feature]:
        """Keys and values of the student's layers."""
        return [AttentionPart(layer, part) for layer in self._layers[0] for part in PARTS]

    @property
    def teacher_features(self) -> list[Feature]:
        """Keys and values of the teacher's layers."""
        return [AttentionPart(layer, part) for layer in self._layers[1] for part in PARTS]

    def most_dimensions(self, index: int) -> int:
        """How many dimensions the targets of a comparison can use at most: the student's, over all its heads."""
        return self.student_width(index) * (1 if self.shape == "flat" else self.heads[0])

    def vectors(self, index: int, student: Features, teacher: Features) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys or values [B, T, layers x heads x width], or of a pair [B, T, heads, width], each as the student has."""
        part = PARTS[index % len(PARTS)]
        if self.shape == "flat":
            own, other = (
                torch.cat([side[AttentionPart(layer, part)].flatten(2) for layer in layers], dim=-1)
                for side, layers in zip((student, teacher), self._layers, strict=True)
            )
            return own, other
        layer, of = self.pairs[index // len(PARTS)]
        return student[AttentionPart(layer, part)], teacher[AttentionPart(of, part)][:, :, self.places]


def _listed(layers: Sequence[int]) -> str:
    """Layers for people: `1 to 24` where they follow each other, else one by one."""
    first, last = layers[0], layers[-1]
    follows = first < last and list(layers) == [*range(first, last + 1)]
    return f"{first} to {last}" if follows else ", ".join(map(str, layers))
