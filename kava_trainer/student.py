"""The student: loading it, starting it from random weights or teacher layers, and training it beside projectors."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .adapters import add_adapter
from .capture import HiddenStateCapture, number_of_layers, run_decoder
from .errors import BadRequest
from .fsdp import is_sharded
from .heads import vocabulary_logits
from .loading import build_causal_lm, load_causal_lm, load_config
from .source_arguments import ModelArguments
from .targets import AlignedStates, HiddenStateTarget
from .teacher import quantization_config


def student_config(arguments: ModelArguments) -> PreTrainedConfig:
    """The student's config.

    Raises:
        BadRequest: if it cannot be had, or its weights cannot be quantised as asked, or trained as they are quantised.
    """
    name = cast(str, arguments.student_model_name_or_path or arguments.student_config_name)
    config = load_config(name, "student", arguments.student_revision, arguments)
    quantization_config(arguments.student_quantization, "student")  # refused before anything is loaded
    if (method := quantized_by(config)) is None:
        return config
    if arguments.student_init != "pretrained":
        del config.quantization_config  # it tells of weights that are not loaded
        return config
    if not arguments.use_peft:
        raise BadRequest(
            f"The student {name!r} holds weights quantised by {method}, which cannot be trained themselves; write "
            "use_peft true to train adapters on them, or name a student that is not quantised."
        )
    if arguments.student_quantization != "none":
        raise BadRequest(f"The student {name!r} is quantised by {method} already; write student_quantization none.")
    if arguments.merge_adapter and method != "bitsandbytes":
        raise BadRequest(
            f"Adapters cannot be merged into the student {name!r}, whose weights are quantised by {method}; write "
            "merge_adapter false."
        )
    return config


def quantized_by(config: PreTrainedConfig) -> str | None:
    """What a checkpoint's weights are quantised by, from its config; None where they are not."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
    return str(getattr(method, "value", method))


def load_student(
    arguments: ModelArguments, teacher: PreTrainedModel, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Load or make the student, in training mode, with adapters where `use_peft` asks for them.

    Weights stored in float16 become float32, or bfloat16 where they are quantised: Adam's updates overflow in pure
    float16, and so may what passes through it.

    Args:
        arguments: which student, its start (`student_init`), data type and adapters.
        teacher: gives its layers where `student_init` is `teacher_layers`.
        device: where quantised weights are put; any others are on the CPU.

    Raises:
        BadRequest: if it cannot be found, read or quantised, or the teacher's layers or the adapters do not fit it.
    """
    config = student_config(arguments)
    if arguments.student_init == "pretrained":
        student = _load_pretrained(arguments, config, device)
    else:
        student = build_causal_lm(config, arguments.student_dtype, arguments)
    if arguments.student_init == "teacher_layers":
        copy_teacher_layers(teacher, student)
    if student.dtype == torch.float16:
        student = student.float()
    if arguments.use_peft:
        add_adapter(student, arguments)
    return student.train()


def _load_pretrained(
    arguments: ModelArguments, config: PreTrainedConfig, device: torch.device | str
) -> PreTrainedModel:
    """The student with its own weights, quantised as they are or as asked."""
    name = cast(str, arguments.student_model_name_or_path)
    revision, dtype = arguments.student_revision, arguments.student_dtype
    placement: dict[str, Any] = {}
    if (quantization := quantization_config(arguments.student_quantization, "student")) is not None:
        placement["quantization_config"] = quantization
    if quantization is not None or quantized_by(config) is not None:
        placement["device_map"] = {"": str(device)}
        dtype = "bfloat16" if dtype == "auto" and config.dtype == torch.float16 else dtype
    return load_causal_lm(name, "student", revision, dtype, arguments, **placement)


@torch.no_grad()
def copy_teacher_layers(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """Fill a student with the teacher's embeddings, norm and head, and with evenly spaced teacher blocks.

    The first student block is the teacher's first, the last one its last.

    Raises:
        BadRequest: if the teacher is quantised, the student is deeper, or any width differs.
    """
    if getattr(teacher, "is_quantized", False):
        raise BadRequest("student_init teacher_layers needs the teacher's own weights; set teacher_quantization none.")
    depth, teacher_depth = number_of_layers(student), number_of_layers(teacher)
    if depth > teacher_depth:
        raise BadRequest(
            f"student_init teacher_layers: the student has {depth} layers and the teacher only {teacher_depth}."
        )
    source_of = [round(index * (teacher_depth - 1) / max(depth - 1, 1)) for index in range(depth)]
    weights = teacher.state_dict()
    for name, parameter in student.state_dict().items():
        source = re.sub(r"(^|\.)(layers|h|blocks)\.(\d+)\.", lambda m: _renumber(m, source_of), name, count=1)
        if source not in weights or weights[source].shape != parameter.shape:
            shape = tuple(weights[source].shape) if source in weights else "missing"
            raise BadRequest(
                f"student_init teacher_layers: {source} is {shape} in the teacher and {tuple(parameter.shape)} in "
                "the student. All widths must agree; choose a student that differs in the number of layers alone."
            )
        parameter.copy_(weights[source])


def _renumber(match: re.Match[str], source_of: list[int]) -> str:
    return f"{match[1]}{match[2]}.{source_of[int(match[3])]}."


Head = Callable[[torch.Tensor], torch.Tensor]
"""Maps last hidden states [..., d] to logits [..., vocabulary]."""

LogitsTerms = Callable[[Head, Sequence[torch.Tensor], torch.Tensor], tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""Computes the terms on logits from the vocabulary head, its trained parameters and the last hidden state [B, T, d_s]:
their weighted total, and the sums by name."""


@dataclass
class StudentOutput:
    """What one forward pass of the student and the projectors gives.

    It is no mapping and no tuple on purpose: accelerate would copy every tensor of those to float32. It is registered
    below as a tree, in whose leaves FSDP2 of torch 2.11 finds the tensors at which the backward pass gathers the
    weights again; a dataclass has none for it, and the pass would read weights that are freed.
    """

    last_hidden_state: torch.Tensor
    """[B, T, d_s]."""
    hidden_states: dict[int, torch.Tensor]
    """[B, T, d_s] by student layer."""
    pairs: list[AlignedStates]
    """Both sides of each pair of layers in one space; empty without teacher states."""
    logits_total: torch.Tensor | None = None
    """Weighted sum of the terms on logits over tokens, with its gradient; None where none was asked for."""
    logits_sums: dict[str, torch.Tensor] = field(default_factory=dict)
    """Sums over tokens of the terms on logits, without weights and gradients."""


torch.export.register_dataclass(StudentOutput)


class DistillationModel(nn.Module):
    """The student and the projectors in one module, so that one wrapper serves both.

    Data parallelism, gradient clipping and gradient accumulation see one model; the student inside stays a plain
    `PreTrainedModel`. Attributes that this module lacks are the student's (`config`, `generate`, ...), and
    `save_pretrained` therefore writes the student alone.

    Args:
        student: the model to train.
        target: what is aligned, with its projectors.
    """

    accepts_loss_kwargs = True
    """Tells Trainer that the loss is already normalised over the whole optimizer step."""

    def __init__(self, student: PreTrainedModel, target: HiddenStateTarget) -> None:
        super().__init__()
        self.student = student
        self.target = target
        self._capture = HiddenStateCapture(student, target.student_layers)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "student":
                raise
            return getattr(self.student, name)

    @property
    def _no_split_modules(self) -> list[str]:
        """What accelerate shards as units: the student's blocks, and the projectors, whose data type may differ."""
        return [*(self.student._no_split_modules or ()), type(self.target).__name__]

    @property
    def _keys_to_ignore_on_save(self) -> list[str]:
        """Tied weights that a checkpoint leaves out; Trainer asks for them before it warns of missing keys."""
        return list(getattr(self.student, "all_tied_weights_keys", {}))

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        packed_lengths: Sequence[int] | None = None,
        teacher_states: dict[int, torch.Tensor] | None = None,
        logits_terms: LogitsTerms | None = None,
    ) -> StudentOutput:
        """Run the student, keep its mapped hidden states, and bring them and the teacher's into one space.

        Args:
            input_ids: tokens [B, T].
            attention_mask: 1 at real tokens [B, T].
            labels: taken and left alone, so that Trainer finds the column; losses are computed elsewhere.
            packed_lengths: tokens of each example of a packed row [1, T].
            teacher_states: the teacher's states [B, T, d_t] by layer; without them nothing is projected.
            logits_terms: computed here, inside the wrapper of data parallelism, because they use the head's weights.
        """
        with self._capture as states:
            last = run_decoder(self.student, input_ids, attention_mask, packed_lengths)
        pairs = [] if teacher_states is None else self.target(states, teacher_states)
        if logits_terms is None:
            return StudentOutput(last, states, pairs)
        own = [p for p in self.student.get_output_embeddings().parameters() if p.requires_grad]
        return StudentOutput(last, states, pairs, *logits_terms(self.head, own, last))

    def head(self, states: torch.Tensor) -> torch.Tensor:
        """Logits [..., vocabulary] of last hidden states [..., d_s].

        Where the weights are sharded, the head's are whole within the forward pass. The hooks that see to it would take
        the gradient of one chunk for the end of the backward pass.
        """
        return vocabulary_logits(self.student, states, with_hooks=not is_sharded(self))
