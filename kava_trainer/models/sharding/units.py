"""Which parts of a model FSDP2 gathers and gives up together, and what they compute in."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from transformers import PreTrainedModel

from ...config.recipes import accelerate_config
from ...utils.distributed import give_up_whole_weights
from ...utils.errors import BadRequest
from ..layers import DECODER_PASS, evaluating, find_blocks, find_decoder, made_up_tokens


@dataclass(frozen=True)
class Sharding:
    """How weights are spread over the ranks."""

    mesh: DeviceMesh
    """The ranks, and the kind of their devices."""
    reshard_after_forward: bool = True
    """Whether a block is given up after its forward pass and gathered once more for the backward pass."""
    computes_in: torch.dtype | None = None
    """The type that the weights of blocks are gathered in; None for the one that they are held in."""
    autocast: Callable[[], AbstractContextManager[Any]] | None = None
    """Makes the context that the forward pass of a student beside projectors runs in."""

    @classmethod
    def of(cls, accelerator: Accelerator) -> "Sharding":
        """As the launcher and the arguments have asked for it, over all ranks.

        The policy that accelerate would make of `mixed_precision` is not read: it would add gradients up in bfloat16.
        """
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        computes_in = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
        reshard = bool(accelerator.state.fsdp_plugin.reshard_after_forward)
        return cls(mesh, reshard, computes_in, accelerator.autocast)

    def of_modules(self, modules: nn.Module, *, reshard: bool = True, exact: bool = False) -> None:
        """Make one unit of what no earlier call has made one of; its weights come to the device and are spread there.

        Args:
            modules: whose forward pass gathers the unit.
            reshard: whether `reshard_after_forward` counts, or the unit stays whole up to the backward pass.
            exact: gather the weights as they are held, and let autocast choose what they compute in.
        """
        policy = MixedPrecisionPolicy(
            param_dtype=None if exact else self.computes_in,
            reduce_dtype=None if self.computes_in is None else torch.float32,
            cast_forward_inputs=False,  # autocast does so where it has to, and leaves the states between blocks exact
        )
        fully_shard(
            modules, mesh=self.mesh, reshard_after_forward=reshard and self.reshard_after_forward, mp_policy=policy
        )


def shard_model(model: PreTrainedModel, sharding: Sharding) -> None:
    """Spread a model over the ranks, block by block, so that no device holds more of it than a block and its ends.

    Units are each block; the embeddings, where they are no weight of the head too; what else stands beside decoder and
    head; and these ends, whole from the decoder's pass to its backward pass, because the head is run apart. Blocks
    alone are gathered in another type than they are held in: with the ends as they are, the states between the blocks
    are those that autocast makes in one process, and the head's gradient is added up over chunks as it is there.

    Args:
        model: on any device; a module above it may be made a unit afterwards.
        sharding: over which ranks, and how.

    Raises:
        BadRequest: if a weight is a single number, or is shared between units.
    """
    decoder, head, embeddings = find_decoder(model), model.get_output_embeddings(), model.get_input_embeddings()
    tied = {id(own) for own in head.parameters()} & {id(own) for own in embeddings.parameters()}
    blocks = _blocks(model, decoder)
    apart = [] if tied else [embeddings]
    _check_weights(model, [*blocks, *apart])
    for unit in blocks:
        sharding.of_modules(unit)
    for unit in (*apart, *_beside(model, {decoder, head, embeddings})):
        sharding.of_modules(unit, exact=True)
    sharding.of_modules(model, reshard=False, exact=True)
    setattr(model, DECODER_PASS, lambda *args, **kwargs: decoder(*args, **kwargs))
    register_fsdp_forward_method(model, DECODER_PASS)


def _beside(model: nn.Module, ends: set[nn.Module]) -> Iterator[nn.Module]:
    """The largest modules with weights that neither hold the ends of a model nor are in them."""
    for child in model.children():
        if child not in ends and not ends.isdisjoint(child.modules()):
            yield from _beside(child, ends)
        elif child not in ends and next(child.parameters(), None) is not None:
            yield child


def _blocks(model: PreTrainedModel, decoder: nn.Module) -> list[nn.Module]:
    """What is gathered one after the other: the decoder's blocks, and those of what a model has beside its decoder."""
    names, inner = set(model._no_split_modules or ()), {id(module) for module in decoder.modules()}
    named = [module for module in model.modules() if type(module).__name__ in names]
    try:
        blocks: Iterable[nn.Module] = find_blocks(model)
    except BadRequest:
        blocks = [module for module in named if id(module) in inner]
    beside = [module for module in named if id(module) not in inner]
    return list(_outermost(dict.fromkeys([*blocks, *beside])))


def _outermost(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Those that are no part of another."""
    given = list(modules)
    parts = {id(part) for module in given for part in module.modules() if part is not module}
    return (module for module in given if id(module) not in parts)


def _check_weights(model: nn.Module, units: list[nn.Module]) -> None:
    """Make sure that the weights can be spread as these units and a rest. Raises `BadRequest` if not."""
    owners: dict[int, nn.Module] = {}
    shared = {id(own) for unit in units for own in unit.parameters() if owners.setdefault(id(own), unit) is not unit}
    kinds: dict[nn.Module | None, set[torch.dtype]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kinds.setdefault(owners.get(id(parameter)), set()).add(parameter.dtype)
        what = "is shared between blocks" if id(parameter) in shared else ""
        what = "is a single number" if parameter.ndim == 0 else what
        if what:
            raise BadRequest(f"{name} of the {type(model).__name__} {what}, which FSDP2 cannot spread;", _instead())
    if odd := next((found for found in kinds.values() if len(found) > 1), None):
        names = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in odd))
        what = (
            f"Weights of the {type(model).__name__} that are trained together are {names}, which FSDP2 cannot spread;"
        )
        raise BadRequest(what, f"write student_dtype float32, or {_instead()}")


def _instead() -> str:
    return f"start with DDP ({accelerate_config('ddp.yaml')})."


@torch.no_grad()
def settle(root: nn.Module, model: PreTrainedModel) -> None:
    """Run a few tokens once all units are made. From then on parts of a model may be run by themselves.

    FSDP2 takes for the root what is run first, and then no other.

    Args:
        root: holds all units, and takes `input_ids`.
        model: whose tokens it reads, itself or a part of it.
    """
    with evaluating(root):
        root(input_ids=made_up_tokens(model), use_cache=False)
    give_up_whole_weights(root)


def shard_to_read(model: PreTrainedModel, device: torch.device) -> None:
    """Spread a model that is not trained over all ranks, to be read in the types that it is held in.

    Args:
        model: on the CPU.
        device: this rank's.

    Raises:
        BadRequest: as `shard_model`.
    """
    shard_model(model, Sharding(init_device_mesh(device.type, (PartialState().num_processes,))))
    settle(model, model)
