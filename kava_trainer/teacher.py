"""The frozen teacher: loading, quantising, and the one interface through which its states are had."""

from typing import Any, Protocol

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from .capture import HiddenStateCapture, find_decoder, hidden_size, number_of_layers
from .errors import BadRequest
from .loading import load_causal_lm
from .source_arguments import ModelArguments


class TeacherSource(Protocol):
    """Where the teacher's hidden states come from: a model that runs now, or what it once gave."""

    hidden_size: int
    """Width d_t of the states."""
    num_layers: int
    """Number of blocks, which is the index of the last state."""

    def features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[int, torch.Tensor]:
        """Detached states [B, T, d_t] of the layers that were asked for at construction, by layer index."""

    def head(self, states: torch.Tensor) -> torch.Tensor:
        """Logits [..., vocabulary] of last hidden states [..., d_t]."""


def quantization_config(kind: str) -> BitsAndBytesConfig | None:
    """How bitsandbytes shall hold the teacher: `none`, `8bit`, or `4bit` (NF4, double quantisation, bf16 compute).

    Raises:
        BadRequest: if bitsandbytes is asked for and not installed.
    """
    if kind == "none":
        return None
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise BadRequest(
            f"teacher_quantization {kind} needs bitsandbytes, which cannot be imported here ({error}); "
            "install it or write none."
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


def load_teacher(arguments: ModelArguments, device: torch.device) -> PreTrainedModel:
    """Load the teacher on `device`, quantised as asked, frozen.

    Raises:
        BadRequest: if it cannot be found, read or quantised.
    """
    quantization = quantization_config(arguments.teacher_quantization)
    placement: dict[str, Any] = {}
    if quantization is not None:
        placement = {"quantization_config": quantization, "device_map": {"": str(device)}}
    model = load_causal_lm(
        arguments.teacher_model_name_or_path,
        "teacher",
        arguments.teacher_revision,
        arguments.teacher_dtype,
        arguments,
        **placement,
    )
    return freeze(model if quantization is not None else model.to(device))


class OnlineTeacher:
    """A teacher that runs beside the student, without gradients, vocabulary head or key-value cache.

    Args:
        model: the teacher; it is frozen here.
        layers: the layers whose states are wanted, in the convention of `capture`.
    """

    def __init__(self, model: PreTrainedModel, layers: list[int]) -> None:
        self.model = freeze(model)
        self.hidden_size = hidden_size(model)
        self.num_layers = number_of_layers(model)
        self._decoder = find_decoder(model)
        self._capture = HiddenStateCapture(model, layers)

    @torch.no_grad()
    def features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[int, torch.Tensor]:
        """Run the teacher on a batch [B, T] and return the wanted states [B, T, d_t] by layer index."""
        with self._capture as states:
            self._decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return states

    @torch.no_grad()
    def head(self, states: torch.Tensor) -> torch.Tensor:
        """Logits [..., vocabulary] of last hidden states [..., d_t], from the vocabulary head alone."""
        return self.model.get_output_embeddings()(states)

    @torch.no_grad()
    def check_head(self, input_ids: torch.Tensor) -> None:
        """Make sure that the teacher's logits are what `head` makes of its last state.

        Args:
            input_ids: a real text [1, T]: capped logits differ only where they are large.

        Raises:
            BadRequest: if the model does more to them, such as capping, so that divergences would be wrong.
        """
        output = self.model(input_ids=input_ids.to(self.model.device), use_cache=False, output_hidden_states=True)
        own, logits = self.head(output.hidden_states[-1]).float(), output.logits.float()
        if not torch.allclose(own, logits, rtol=1e-2, atol=1e-2 * logits.abs().max().item()):
            raise BadRequest(
                f"{type(self.model).__name__} does more to its logits than its vocabulary head, so the divergence "
                "from them cannot be computed from its hidden states; set kd_weight to 0."
            )
