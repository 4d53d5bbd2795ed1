"""The elastic bottleneck that maps teacher states into the student's space, and its files."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from .checkpoint_io import write_atomically
from .errors import BadRequest


@dataclass(frozen=True)
class ProjectorConfig:
    """Shape of one projector: widths in and out, hidden width as a multiple of the width in, dropout."""

    teacher_size: int
    student_size: int
    mlp_ratio: float = 1.0
    dropout: float = 0.1


class ElasticBottleneck(nn.Module):
    """LayerNorm(d_t) -> Linear(d_t, round(mlp_ratio * d_t)) -> SiLU -> Dropout -> Linear(., d_s).

    Args:
        config: the shape. For Qwen2.5 1.5B to 0.5B that is 1536 -> 896.
    """

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        self.config = config
        hidden = max(1, round(config.mlp_ratio * config.teacher_size))
        self.norm = nn.LayerNorm(config.teacher_size)
        self.up = nn.Linear(config.teacher_size, hidden)
        self.activation = nn.SiLU()
        self.dropout = nn.Dropout(config.dropout)
        self.down = nn.Linear(hidden, config.student_size)

    def forward(self, teacher_states: torch.Tensor) -> torch.Tensor:
        """Map [..., d_t] to [..., d_s] in the projector's own data type."""
        states = self.norm(teacher_states.to(self.norm.weight.dtype))
        return self.down(self.dropout(self.activation(self.up(states))))


def save_projectors(projectors: nn.ModuleList, path: str | Path) -> None:
    """Write projectors and their shapes into one file that `torch.load(..., weights_only=True)` reads.

    Args:
        projectors: one `ElasticBottleneck` for each aligned pair of layers.
        path: the file; it is replaced in one step, so a reader never sees half of it.
    """
    payload = {
        "config": [asdict(projector.config) for projector in projectors],
        "state_dict": {name: tensor.detach().cpu() for name, tensor in projectors.state_dict().items()},
    }
    write_atomically(path, lambda temporary: torch.save(payload, temporary))


def load_projectors(path: str | Path) -> nn.ModuleList:
    """Read projectors written by `save_projectors`.

    Raises:
        BadRequest: if the file is missing, is not such a file, or holds weights that do not fit its own shapes.
    """
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
        projectors = nn.ModuleList(ElasticBottleneck(ProjectorConfig(**config)) for config in payload["config"])
        projectors.load_state_dict(payload["state_dict"])
    except FileNotFoundError as error:
        raise BadRequest(f"There is no projector file at {path}.") from error
    except Exception as error:  # torch.load and unpickling raise many kinds for one cause: not a projector file
        raise BadRequest(f"{path} is not a projector file written by KAVA: {error}") from error
    return projectors


def restore_projectors(projectors: nn.ModuleList, path: str | Path) -> None:
    """Load the weights of a projector file into existing projectors.

    Raises:
        BadRequest: if the file is not a projector file or was made for other widths or another number of pairs.
    """
    saved = load_projectors(path)
    saved_shapes = [(p.config.teacher_size, p.config.student_size, p.up.out_features) for p in saved]
    own_shapes = [(p.config.teacher_size, p.config.student_size, p.up.out_features) for p in projectors]
    if saved_shapes != own_shapes:
        raise BadRequest(
            f"The projector in {path} does not fit this run: its shapes (teacher, student, hidden) are "
            f"{saved_shapes}, this run's are {own_shapes}. Resume with the models and layers it was trained with."
        )
    projectors.load_state_dict(saved.state_dict())
