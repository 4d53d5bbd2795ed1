"""The projectors that map hidden states of one model into the other's space, what holds them, and their files."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from .checkpoint_io import write_atomically
from .errors import BadRequest, reason_of
from .fsdp import whole

Anchor = Literal["none", "pca", "reconstruction"]

FOLDER_CONFIG, FOLDER_WEIGHTS = "config.json", "projector.safetensors"
"""The two files of a folder that `export_projectors` writes."""


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
    """

    input_size: int
    output_size: int
    mlp_ratio: float = 1.0
    dropout: float = 0.1
    anchor: Anchor = "none"


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

    Args:
        config: `input_size` and `output_size` of the map.
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


def build_projector(config: ProjectorConfig) -> nn.Module:
    """The projector that a config describes, with random weights."""
    return PrincipalProjection(config) if config.anchor == "pca" else ElasticBottleneck(config)


def build_decoder(config: ProjectorConfig) -> nn.Linear:
    """The map from a projector's output back to its normalised input."""
    return nn.Linear(config.output_size, config.input_size)


def projector_content(
    projectors: nn.ModuleList, use: dict[str, Any] | None = None, decoders: nn.ModuleList | None = None
) -> dict[str, Any]:
    """What a projector file holds, see `save_projectors`. Where the weights are sharded every rank has to ask."""
    return {
        "use": use or {},
        "config": [asdict(_config(projector)) for projector in projectors],
        "state_dict": _on_cpu(projectors),
        "decoders": _on_cpu(decoders) if decoders else {},
    }


def write_projectors(content: dict[str, Any], path: str | Path) -> None:
    """Write what `projector_content` gave; a reader never sees half of it."""
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def save_projectors(
    projectors: nn.ModuleList,
    path: str | Path,
    use: dict[str, Any] | None = None,
    decoders: nn.ModuleList | None = None,
) -> None:
    """Write projectors and their shapes into one file that `torch.load(..., weights_only=True)` reads.

    Args:
        projectors: one for each aligned pair of layers.
        path: the file; it is replaced in one step.
        use: what they map: the direction and the pairs of layers, of plain Python types.
        decoders: the decoders of a reconstruction anchor, where training shall go on from this file.
    """
    write_projectors(projector_content(projectors, use, decoders), path)


def export_projectors(projectors: nn.ModuleList, folder: str | Path, use: dict[str, Any] | None = None) -> None:
    """Write projectors as a folder to share: `config.json` and `projector.safetensors`, which holds no code.

    Args:
        projectors: one for each aligned pair of layers.
        folder: it is made where it is missing; `load_projectors` reads it.
        use: what they map, as for `save_projectors`.
    """
    _write_folder(projector_content(projectors, use), Path(folder))


def export_projector_file(path: str | Path, folder: str | Path) -> bool:
    """Write what a file of `save_projectors` holds as `export_projectors` does.

    Returns:
        Whether there was a projector in it; without one nothing is written.

    Raises:
        BadRequest: as `load_projectors`.
    """
    projectors, payload = _read(path)
    if projectors:
        export_projectors(projectors, folder, payload["use"])
    return len(projectors) > 0


def _write_folder(content: dict[str, Any], folder: Path) -> None:
    config = json.dumps({"use": content["use"], "config": content["config"]}, indent=2) + "\n"
    weights = {name: tensor.contiguous() for name, tensor in content["state_dict"].items()}
    write_atomically(folder / FOLDER_WEIGHTS, lambda path: save_file(weights, path, {"format": "pt"}))
    write_atomically(folder / FOLDER_CONFIG, lambda path: path.write_text(config, encoding="utf-8"))


def _read_folder(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / FOLDER_CONFIG).read_text(encoding="utf-8"))
    return {**content, "state_dict": load_file(folder / FOLDER_WEIGHTS), "decoders": {}}


def _on_cpu(modules: nn.ModuleList) -> dict[str, torch.Tensor]:
    return {name: whole(tensor.detach()).cpu() for name, tensor in modules.state_dict().items()}


def _read(path: str | Path) -> tuple[nn.ModuleList, dict[str, Any]]:
    """The projectors of a file or folder and all that it holds. Raises as `load_projectors` does."""
    try:
        folder = Path(path)
        payload = _read_folder(folder) if folder.is_dir() else torch.load(path, map_location="cpu", weights_only=True)
        projectors = nn.ModuleList(build_projector(ProjectorConfig(**config)) for config in payload["config"])
        projectors.load_state_dict(payload["state_dict"])
        return projectors, payload
    except FileNotFoundError as error:
        raise BadRequest(f"There is no projector file at {path}.") from error
    except Exception as error:  # torch.load and unpickling raise many kinds for one cause: not a projector file
        raise BadRequest(f"{path} is not a projector file written by KAVA: {reason_of(error)}") from error


def load_projectors(path: str | Path) -> nn.ModuleList:
    """Read projectors written by `save_projectors` or `export_projectors`.

    Args:
        path: a `.pth` file, or a folder such as `projector/` of a repository on the hub.

    Raises:
        BadRequest: if it is missing, was not written by them, or holds weights that do not fit its own shapes.
    """
    return _read(path)[0]


def restore_projectors(
    projectors: nn.ModuleList,
    path: str | Path,
    use: dict[str, Any] | None = None,
    decoders: nn.ModuleList | None = None,
) -> None:
    """Load the weights of a projector file into existing projectors and decoders.

    Raises:
        BadRequest: if the file is not a projector file, was made for other widths, layers, another direction or
            anchor, or lacks the decoders that are asked for.
    """
    saved, payload = _read(path)
    shapes, own = ([_shape(projector) for projector in group] for group in (saved, projectors))
    if shapes != own:
        raise BadRequest(
            f"The projector in {path} does not fit this run: its shapes (in, hidden, out, anchor) are {shapes}, this "
            f"run's are {own}. Resume with the models, layers and projector arguments it was trained with."
        )
    if payload["use"] != (use or {}):
        raise BadRequest(
            f"The projector in {path} was trained for {payload['use']}, this run is for {use}. Resume with the "
            "direction and the layers it was trained with."
        )
    if decoders and not payload["decoders"]:
        raise BadRequest(f"{path} holds no decoders to train on with; resume from a checkpoint folder instead.")
    projectors.load_state_dict(saved.state_dict())
    if decoders:
        decoders.load_state_dict(payload["decoders"])


def _config(projector: nn.Module) -> ProjectorConfig:
    return cast(ProjectorConfig, projector.config)


def _shape(projector: nn.Module) -> tuple[int, int | None, int, str]:
    config = _config(projector)
    hidden = projector.up.out_features if isinstance(projector, ElasticBottleneck) else None
    return config.input_size, hidden, config.output_size, config.anchor
