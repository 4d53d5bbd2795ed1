"""The frozen teacher: loading, quantising, and the one interface through which its states are had."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, cast

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from ..config.model_arguments import ModelArguments
from ..utils.distributed import in_step, is_sharded
from ..utils.errors import BadRequest
from .attention.capture import Feature, FeatureCapture, hidden_layers, layer_of
from .hidden_states import run_decoder
from .layers import find_decoder, made_up_tokens, number_of_layers, state_width, truncated
from .lm_head import vocabulary_logits, whole_head
from .loading import load_causal_lm, on_device
from .sharding.teacher import load_sharded

_PACKED_OUTPUTS = 32


class TeacherSource(Protocol):
    """Where the teacher's hidden states come from: a model that runs now, or what it once gave.

    One that gives parts of attention names them in an attribute `layers`, as `OnlineTeacher` does.
    """

    hidden_size: int
    """Width d_t of the states."""
    num_layers: int
    """Number of blocks, which is the index of the last state."""

    def features(self, inputs: Mapping[str, Any]) -> dict[Feature, torch.Tensor]:
        """What was asked for at construction, detached; a state [B, T, d_t] by its layer index."""

    def head(self, states: torch.Tensor) -> torch.Tensor:
        """Logits [..., vocabulary] of last hidden states [..., d_t]."""


def quantization_config(kind: str, role: str = "teacher") -> BitsAndBytesConfig | None:
    """How bitsandbytes shall hold a model: `none`, `8bit`, or `4bit` (NF4, double quantisation, bf16 compute).

    Raises `BadRequest`, which names the `role` (`teacher` or `student`), if bitsandbytes is needed and not installed.
    """
    if kind == "none":
        return None
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise BadRequest(
            f"{role}_quantization {kind} needs bitsandbytes, which cannot be imported here ({error});",
            "install it or write none.",
        ) from error
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """Put a model into evaluation mode and take its parameters out of every gradient."""
    return model.eval().requires_grad_(False)


def load_teacher(
    arguments: ModelArguments, device: torch.device, role: str = "teacher", sharded: bool = False
) -> PreTrainedModel:
    """Load the teacher on `device`, quantised as asked, frozen. Raises `BadRequest` if that cannot be done.

    Args:
        arguments: which model it is.
        device: where it goes.
        role: what a message calls it.
        sharded: whether each rank holds its share alone, see `choose_holding`; then every rank must ask.
    """
    if sharded:
        return load_sharded(arguments, device, role)
    quantization = quantization_config(arguments.teacher_quantization)
    placement: dict[str, Any] = {}
    if quantization is not None:
        placement = {"quantization_config": quantization, "device_map": {"": str(device)}}
    name, revision = cast(str, arguments.teacher_model_name_or_path), arguments.teacher_revision
    model = load_causal_lm(name, role, revision, arguments.teacher_dtype, arguments, **placement)
    if getattr(model, "is_loaded_in_4bit", False):
        _keep_odd_layers_unpacked(model)
    return freeze(model if quantization is not None else on_device(model, device))


def _keep_odd_layers_unpacked(model: PreTrainedModel) -> None:
    """Let layers of any width run on a CPU.

    On one that multiplies in bfloat16 (AVX-512) bitsandbytes packs 4-bit weights anew, in blocks of 32 outputs and of
    the inputs that share a scale, and fails where a width is no multiple of those (read in bitsandbytes 0.50.2). Such
    layers stay with the way that every other CPU takes.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            block = cast(Any, module.weight).quant_state.blocksize
            if module.out_features % _PACKED_OUTPUTS or module.in_features % block:
                module.support_avx512bf16_for_cpu = False


class OnlineTeacher:
    """A teacher that runs beside the student, without gradients, vocabulary head or key-value cache.

    It stops after the deepest block that is wanted.

    Args:
        model: the teacher; it is frozen here.
        layers: the layers whose states are wanted, in the convention of `hidden_states`, or parts of their attention.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[Feature]) -> None:
        self.model = freeze(model)
        self.hidden_size = state_width(model, hidden_layers(layers)[-1:])
        self.num_layers = number_of_layers(model)
        self.layers = list(layers)
        self._depth = max(map(layer_of, layers), default=0)
        self._capture = FeatureCapture(model, layers)

    def close(self) -> None:
        """Take the hooks off the model, which stays frozen."""
        self._capture.remove()

    @torch.no_grad()
    def features(self, inputs: Mapping[str, Any]) -> dict[Feature, torch.Tensor]:
        """Run the teacher on a batch of `collators` and return what is wanted, a state [B, T, d_t] by layer index."""
        with truncated(self.model, self._depth), self._capture as states:
            run_decoder(self.model, inputs["input_ids"], inputs["attention_mask"], inputs.get("packed_lengths"))
        # A device_map may have put its blocks on several devices.
        return {layer: own.to(inputs["input_ids"].device) for layer, own in states.items()}

    @torch.no_grad()
    def head(self, states: torch.Tensor) -> torch.Tensor:
        """Logits [..., vocabulary] of last hidden states [..., d_t], from the vocabulary head alone."""
        return vocabulary_logits(self.model, states).to(states.device)

    def whole_head(self) -> AbstractContextManager[None]:
        """Within the `with` block `head` may be called on one rank and not on another, see `lm_head.whole_head`."""
        return whole_head(self.model)

    def read_a_token(self) -> None:
        """A pass of `features` for nothing."""
        ids = made_up_tokens(self.model, 1)
        self.features({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


@contextmanager
def in_step_reading(teachers: Sequence[OnlineTeacher], then: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Within the `with` block each rank may let teachers read as often as it has something, of which some are sharded.

    Every rank must enter the block; see `distributed.in_step`. Where none is sharded nothing happens.

    Args:
        teachers: each reads once, in this order, with `features`.
        then: does for nothing what the ranks do together behind that.
    """
    sharded = [own for own in teachers if is_sharded(own.model)]

    def idle() -> None:
        for own in sharded:
            own.read_a_token()
        then()

    with in_step(find_decoder(sharded[0].model), idle) if sharded else nullcontext():
        yield
