"""Projectors on disk: one `.pth` file, or a folder with a config."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..utils.atomic_files import write_atomically
from ..utils.distributed import whole
from ..utils.errors import BadRequest, reason_of
from .projector import ElasticBottleneck, LowRankBridge, ProjectorConfig, build_projector

FOLDER_CONFIG, FOLDER_WEIGHTS = "config.json", "projector.safetensors"
"""The two files of a folder that `export_projectors` writes."""


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
    content, folder = projector_content(projectors, use), Path(folder)
    config = json.dumps({"use": content["use"], "config": content["config"]}, indent=2) + "\n"
    weights = {name: tensor.contiguous() for name, tensor in content["state_dict"].items()}
    write_atomically(folder / FOLDER_WEIGHTS, lambda path: save_file(weights, path, {"format": "pt"}))
    write_atomically(folder / FOLDER_CONFIG, lambda path: path.write_text(config, encoding="utf-8"))


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


def kept_use(path: str | Path) -> dict[str, Any]:
    """What the projectors of a file map, as it was given when they were saved. Raises as `load_projectors`."""
    return cast(dict[str, Any], _read(path)[1]["use"])


def restore_projectors(
    projectors: nn.ModuleList,
    path: str | Path,
    use: dict[str, Any] | None = None,
    decoders: nn.ModuleList | None = None,
) -> None:
    """Load the weights of a projector file into existing projectors and decoders.

    A bridge whose rank is open takes that of the file.

    Raises:
        BadRequest: if the file is not a projector file, was made for other widths, layers, another direction or
            anchor, or lacks the decoders that are asked for.
    """
    saved, payload = _read(path)
    for bridge, there in zip(projectors, saved, strict=False):
        if isinstance(bridge, LowRankBridge) and bridge.rank_is_open and isinstance(there, LowRankBridge):
            bridge.decide(there.rank)
    shapes, own = ([_shape(projector) for projector in group] for group in (saved, projectors))
    if shapes != own:
        raise BadRequest(
            f"The projector in {path} does not fit this run: its shapes (in, hidden, out, anchor, rank) are "
            f"{shapes}, this run's are {own}.",
            "Resume with the models, layers and projector arguments it was trained with.",
        )
    if payload["use"] != (use or {}):
        raise BadRequest(
            f"The projector in {path} was trained for {payload['use']}, this run is for {use}.",
            "Resume with the direction and the layers it was trained with.",
        )
    if decoders and not payload["decoders"]:
        raise BadRequest(f"{path} holds no decoders to train on with;", "resume from a checkpoint folder instead.")
    projectors.load_state_dict(saved.state_dict())
    if decoders:
        decoders.load_state_dict(payload["decoders"])


def _config(projector: nn.Module) -> ProjectorConfig:
    return cast(ProjectorConfig, projector.config)


def _shape(projector: nn.Module) -> tuple[int, int | None, int, str, int | None]:
    config = _config(projector)
    hidden = projector.up.out_features if isinstance(projector, ElasticBottleneck) else None
    rank = projector.rank if isinstance(projector, LowRankBridge) else None
    return config.input_size, hidden, config.output_size, config.anchor, rank
