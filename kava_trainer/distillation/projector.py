"""The projectors that map hidden states of one model into the other's space."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from ..config.checks import AUTO

Anchor = Literal["none", "pca", "reconstruction"]


@dataclass(frozen=True)
class ProjectorConfig:
    """Shape of one projector.

    Attributes:
        input_size: width of the states that go in.
        output_size: width of what comes out.
        mlp_ratio: hidden width as a multiple of `input_size`.
        dropout: dropout on the hidden layer, from 0 to below 1.
        anchor: what keeps the output from collapsing: nothing, a frozen principal subspace in place of the trained
            network, or a decoder that must rebuild the input from it.
        rank: with the pca anchor the dimensions of a `LowRankBridge` of both sides, `auto` where its fit is to choose
            them; by default there is none.

    Raises:
        ValueError: if there cannot be a bridge of that rank.
    """

    input_size: int
    output_size: int
    mlp_ratio: float = 1.0
    dropout: float = 0.1
    anchor: Anchor = "none"
    rank: int | str | None = None

    def __post_init__(self) -> None:
        if self.rank is None:
            return
        if self.anchor != "pca":
            raise ValueError(f"A rank is for a frozen bridge, but the anchor is {self.anchor}; write anchor='pca'.")
        most = min(self.input_size, self.output_size)
        if self.rank != AUTO and not (type(self.rank) is int and 1 <= self.rank <= most):
            raise ValueError(f"The rank of a bridge is {self.rank!r}; write a whole number from 1 to {most}, or auto.")


def normalise(states: torch.Tensor) -> torch.Tensor:
    """States [..., d] in float32 with mean 0 and variance 1 over their width."""
    return F.layer_norm(states.float(), states.shape[-1:])


class ElasticBottleneck(nn.Module):
    """LayerNorm(d_in) -> Linear(d_in, round(mlp_ratio * d_in)) -> SiLU -> Dropout -> Linear(., d_out).

    Args:
        config: the shape. For Qwen2.5 1.5B to 0.5B that is 1536 -> 896.
    """

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        self.config = config
        hidden = max(1, round(config.mlp_ratio * config.input_size))
        self.norm = nn.LayerNorm(config.input_size)
        self.up = nn.Linear(config.input_size, hidden)
        self.activation = nn.SiLU()
        self.dropout = nn.Dropout(config.dropout)
        self.down = nn.Linear(hidden, config.output_size)

    def hidden(self, states: torch.Tensor) -> torch.Tensor:
        """What the last layer reads: [..., d_in] to [..., round(mlp_ratio * d_in)]."""
        states = self.norm(states.to(self.norm.weight.dtype))
        return self.dropout(self.activation(self.up(states)))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map [..., d_in] to [..., d_out] in the projector's own data type."""
        return self.down(self.hidden(states))


class PrincipalProjection(nn.Module):
    """A frozen linear map of the normalised states onto their principal subspace; it cannot take part in a collapse.

    It computes in float32 whatever the model around it is cast to: the target shall not change with the precision.
    It is zero until `calibration` sets it.
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("weight", torch.zeros(config.output_size, config.input_size))
        self.register_buffer("bias", torch.zeros(config.output_size))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map [..., d_in] to float32 [..., d_out]."""
        with torch.autocast(states.device.type, enabled=False):
            return F.linear(normalise(states), self.weight.float(), self.bias.float())


class LowRankBridge(nn.Module):
    """A frozen linear map of the normalised states of either side into one space of few dimensions.

    The teacher's, which go in, are mapped on their first principal axes, and the student's by the least squares fit to
    the coordinates there. Both are zero until `calibration` sets them.

    Args:
        config: the widths of teacher and student as input and output size, and the rank. Where that is `auto` there is
            room for the highest one until a fit, or a file that is restored, decides.
    """

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        self.config, self.rank_is_open = config, config.rank == AUTO
        self._make(min(config.input_size, config.output_size) if self.rank_is_open else int(config.rank or 0))

    def _make(self, rank: int) -> None:
        self.teacher = PrincipalProjection(ProjectorConfig(self.config.input_size, rank))
        self.student = PrincipalProjection(ProjectorConfig(self.config.output_size, rank))

    @property
    def rank(self) -> int:
        """Dimensions in which both sides are compared."""
        return len(self.teacher.bias)

    def decide(self, rank: int) -> None:
        """Take a rank; the maps are zero then."""
        like = self.teacher.weight
        self._make(rank)
        self.to(like)
        self.config = replace(self.config, rank=rank)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map the teacher's states [..., d_t] to float32 [..., rank]; `student` does so with the student's."""
        return self.teacher(states)


def build_projector(config: ProjectorConfig) -> nn.Module:
    """The projector that a config describes, with random weights."""
    if config.rank is not None:
        return LowRankBridge(config)
    return PrincipalProjection(config) if config.anchor == "pca" else ElasticBottleneck(config)


def build_decoder(config: ProjectorConfig) -> nn.Linear:
    """The map from a projector's output back to its normalised input."""
    return nn.Linear(config.output_size, config.input_size)
