"""What is aligned: which states to capture, how to project them, which loss comes of it."""

from dataclasses import dataclass

import torch
from torch import nn

from .losses import mercator_per_token
from .projector import ElasticBottleneck, ProjectorConfig


@dataclass(frozen=True)
class Alignment:
    """What aligning one pair of layers gives, token by token: two float32 tensors [B, T]."""

    loss: torch.Tensor
    cosine: torch.Tensor


class HiddenStateTarget(nn.Module):
    """Aligns hidden states of the student with projected hidden states of the teacher, one projector a pair.

    Args:
        pairs: (student layer, teacher layer) pairs in the convention of `capture`.
        config: shape of each projector.
        alpha: weight of the direction in the Mercator loss.
        beta: weight of the log-magnitude in the Mercator loss.
    """

    def __init__(self, pairs: list[tuple[int, int]], config: ProjectorConfig, alpha: float, beta: float) -> None:
        super().__init__()
        self.pairs = pairs
        self.alpha, self.beta = alpha, beta
        self.projectors = nn.ModuleList(ElasticBottleneck(config) for _ in pairs)

    @property
    def student_layers(self) -> list[int]:
        """Layers of the student to capture."""
        return [student for student, _ in self.pairs]

    @property
    def teacher_layers(self) -> list[int]:
        """Layers of the teacher to capture."""
        return [teacher for _, teacher in self.pairs]

    def forward(self, teacher_states: dict[int, torch.Tensor]) -> list[torch.Tensor]:
        """Project teacher states [B, T, d_t] by layer into one target [B, T, d_s] for each pair."""
        return [
            projector(teacher_states[layer])
            for projector, layer in zip(self.projectors, self.teacher_layers, strict=True)
        ]

    def align(
        self, student_states: dict[int, torch.Tensor], targets: list[torch.Tensor], mask: torch.Tensor
    ) -> list[Alignment]:
        """Compare the student's states with the targets, pair by pair, at the tokens where `mask` [B, T] is true."""
        return [
            Alignment(*mercator_per_token(student_states[layer], target, mask, self.alpha, self.beta))
            for layer, target in zip(self.student_layers, targets, strict=True)
        ]
