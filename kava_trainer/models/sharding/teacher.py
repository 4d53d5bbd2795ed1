"""A frozen teacher that no rank ever holds whole: it is loaded by shards, and gathered block by block to be read with.

It is built without storage and sharded there; each rank then reads its own rows of every weight from the files. What
belongs together is gathered by FSDP2 when it runs and freed behind it: each block, the embeddings, what else the
decoder has, and the vocabulary head.
"""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import PartialState, init_empty_weights
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from ...config.model_arguments import ModelArguments
from ...utils.distributed import all_succeed, own_part
from ...utils.errors import BadRequest, Problem
from ..layers import find_blocks, find_decoder
from ..loading import (
    build_causal_lm,
    load_config,
    load_generation_config,
    missing_weights,
    model_folder,
    saved_adapter,
)
from .checkpoint import StoredWeights, find_weights
from .units import Sharding, settle

_REPLICATED = "write teacher_sharding none."


@dataclass(frozen=True)
class _Plan:
    """What a teacher is loaded by shards from."""

    model: PreTrainedModel
    """Without storage for its weights."""
    stored: StoredWeights
    sources: dict[str, str]
    """What each weight of the model, and each buffer that is saved, is called in the files."""


def sharding_problem(arguments: ModelArguments, role: str = "teacher", fetch: bool = True) -> Problem | None:
    """Why a teacher cannot be loaded by shards; None where it can. Of its files the headers alone are read.

    Args:
        arguments: which model it is.
        role: what messages call it.
        fetch: whether files that are on the hub alone are fetched; else what they would tell is left open.

    Raises:
        BadRequest: if its config or its files cannot be read, or a weight is missing or of another shape.
    """
    found = _plan(arguments, role, fetch)
    return found if isinstance(found, Problem) else None


def _plan(arguments: ModelArguments, role: str, fetch: bool = True) -> "_Plan | Problem | None":
    """From what a teacher is loaded by shards, or why it cannot be; None where that is left open."""
    name, revision = arguments.teacher_name, arguments.teacher_revision
    config = load_config(name, role, revision, arguments)
    if reason := _reason_of_config(arguments, config, role):
        return _problem(name, role, reason)
    stored = find_weights(name, role, revision, fetch)
    if stored is None and (fetch or model_folder(name, role) is not None):
        return _problem(name, role, "it has no safetensors files")
    # Its buffers are computed, on the CPU: most are in no file.
    with init_empty_weights(include_buffers=False):
        model = build_causal_lm(config, arguments.teacher_dtype, arguments, role).eval().requires_grad_(False)
    if reason := _reason_of_model(model):
        return _problem(name, role, reason)
    if stored is None:
        return None
    if reason := _reason_of_names(model, stored):
        return _problem(name, role, reason)
    sources = _sources(model, stored)
    _check_whole(model, stored, sources, name, role)
    odd = [key for key in sources.values() if not stored.weights[key].is_plain]
    if odd:
        return _problem(name, role, f"its files hold {odd[0]} as {stored.weights[odd[0]].dtype}")
    return _Plan(model, stored, sources)


def _problem(name: str, role: str, reason: str) -> Problem:
    return Problem("teacher_sharding", f"The {role} {name!r} cannot be sharded, because {reason};", _REPLICATED)


def _reason_of_config(arguments: ModelArguments, config: PreTrainedConfig, role: str) -> str | None:
    if saved_adapter(arguments.teacher_name, role, arguments.teacher_revision) is not None:
        return "it is an adapter, which is merged into a whole model"
    if arguments.teacher_quantization != "none" or getattr(config, "quantization_config", None) is not None:
        return "it is quantised"
    if arguments.trust_remote_code and getattr(config, "auto_map", None):
        return "it brings code of its own"
    if getattr(config, "transformers_weights", None) is not None:
        return "its config names a file of weights (transformers_weights)"
    if arguments.teacher_dtype == "auto" and config.dtype is None:
        return "its config names no data type, and teacher_dtype is auto"
    return None


def _reason_of_model(model: PreTrainedModel) -> str | None:
    """Why a model without storage could not be filled as `from_pretrained` would do it."""
    if get_model_conversion_mapping(model, add_legacy=False):
        return "transformers renames or converts its weights as it loads them"
    try:
        decoder = find_decoder(model)
        find_blocks(model)
    except BadRequest:
        return "it keeps no list of its blocks"
    text = {id(own) for part in (decoder, model.get_output_embeddings()) for own in part.parameters()}
    known: dict[int, str] = {}
    for name, own in model.named_parameters(remove_duplicate=False):
        if id(own) not in text:
            return f"it has weights beside its decoder and its vocabulary head ({name})"
        if own.ndim == 0:
            return f"{name} is a single number"
        if known.setdefault(id(own), name) != name:
            return f"{name} is {known[id(own)]} too"
        if own.dtype != model.dtype:
            return f"{name} is of another data type than its other weights"
    kept = {torch.bfloat16: ["_strict"], torch.float16: ["_strict", ""]}.get(model.dtype, [])
    if any(getattr(model, f"_keep_in_fp32_modules{end}", None) for end in kept):
        return "transformers keeps some of its weights in float32"
    return None


def _sources(model: PreTrainedModel, stored: StoredWeights) -> dict[str, str]:
    """What weights of a model, and buffers that are saved, are called in its files; those that are there.

    A weight that is tied to another, which may be stored under either name, is read for each of the two.
    """
    tied = getattr(model, "all_tied_weights_keys", {})
    groups: dict[str, list[str]] = {}
    for target, source in tied.items():
        groups.setdefault(source, [source]).append(target)
    names = {own: (own, *groups.get(tied.get(own, own), ())) for own in model.state_dict()}
    found = {own: [key for key in keys if key in stored.weights] for own, keys in names.items()}
    return {own: keys[0] for own, keys in found.items() if keys}


def _reason_of_names(model: PreTrainedModel, stored: StoredWeights) -> str | None:
    """Why the names in the files may be other than the model's: it has some that they lack, and they have others."""
    sources = _sources(model, stored)
    missing = sorted(model.state_dict().keys() - sources.keys())
    others = sorted(stored.weights.keys() - sources.values())
    if not missing or not others:
        return None
    return f"its files call its weights by other names ({missing[0]} is not there, and {others[0]} is)"


def _check_whole(model: PreTrainedModel, stored: StoredWeights, sources: dict[str, str], name: str, role: str) -> None:
    """Make sure that every weight is there in its shape. Raises `BadRequest` if not."""
    state = model.state_dict()
    if missing := sorted(state.keys() - sources.keys()):
        raise missing_weights(role, name, missing)
    for own, key in sources.items():
        if stored.weights[key].shape != tuple(state[own].shape):
            raise BadRequest(
                f"The {role} {name!r} cannot be loaded: {stored.weights[key].file.name} holds {key} as "
                f"{stored.weights[key].shape}, where its config wants {tuple(state[own].shape)}.",
                "Download or copy it again.",
            )


def load_sharded(arguments: ModelArguments, device: torch.device, role: str = "teacher") -> PreTrainedModel:
    """Load a frozen teacher of which each rank holds its share of the rows of each weight. Every rank must ask.

    Args:
        arguments: which model it is.
        device: of this rank.
        role: what messages call it.

    Raises:
        BadRequest: where `sharding_problem` tells why it cannot be, or as that does.
    """
    plan = _plan(arguments, role)
    if not isinstance(plan, _Plan):
        raise BadRequest.of(cast(Problem, plan))
    model, name, revision = plan.model, arguments.teacher_name, arguments.teacher_revision
    shard(model, init_device_mesh(device.type, (PartialState().num_processes,)))
    _give_storage(model, device)
    if reason := all_succeed(lambda: _fill(plan), "another process could not read its part"):
        raise BadRequest(f"The {role} {name!r} cannot be loaded: {reason}.")
    if (generation := load_generation_config(name, role, revision)) is not None:
        cast(Any, model).generation_config = generation
    settle(model, model)  # before a pass leaves blocks out
    return model


def shard(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Shard a model without storage into what is gathered together, and freed behind each pass.

    The vocabulary head runs apart from the decoder, so it is no part of what that gathers; where the two were tied each
    has weights of its own from now on.
    """
    sharding, head = Sharding(mesh), model.get_output_embeddings()
    for module in (*find_blocks(model), model.get_input_embeddings(), find_decoder(model), head):
        sharding.of_modules(module)


def _give_storage(model: PreTrainedModel, device: torch.device) -> None:
    """Give the rows of this rank storage on its device, and leave buffers as they were computed."""
    computed = {name: buffer.clone() for name, buffer in model.named_buffers(remove_duplicate=False)}
    model.to_empty(device=device)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        buffer.copy_(computed[name])


@torch.no_grad()
def _fill(plan: _Plan) -> None:
    """Read this rank's rows of each weight, and all of each buffer that is saved."""
    stored, sources = plan.stored, plan.sources
    for name, tensor in plan.model.state_dict().items():
        if not isinstance(tensor, DTensor):
            tensor.copy_(stored.whole(sources[name]))
            continue
        start, stop = own_rows(len(tensor), tensor.device_mesh)
        if own_part(tensor).shape[0] != stop - start:
            raise RuntimeError(f"FSDP2 holds {own_part(tensor).shape[0]} rows of {name} where {stop - start} are due")
        if stop > start:
            own_part(tensor).copy_(stored.rows(sources[name], start, stop))


def own_rows(rows: int, mesh: DeviceMesh) -> tuple[int, int]:
    """From which row up to which this rank of a mesh holds a tensor, as `torch.chunk` deals them out."""
    size = math.ceil(rows / mesh.size())
    start = min(mesh.get_local_rank() * size, rows)
    return start, min(start + size, rows)
