"""The student that a `Cut` makes of its teacher: config, weights, and the proof that it is that part of it."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...utils.errors import BadRequest, reason_of
from ..hidden_states import first_tensor
from ..layers import config_layers, evaluating, find_blocks, made_up_tokens
from ..trial import can_run
from .cut import Cut
from .skipping import block_input, skipped
from .width import config_heads, cut_weight, head_groups_of, neurons_of, set_feed_forward_size, silenced

_NOT_PER_LAYER = ("architectures", "token_id", "token_ids", "_keys", "labels", "langs", "lang_ids")
"""Ends of the names of lists in a config that say nothing of layers, however long they are."""

_ALIKE, _ROUNDED = 1e-2, 0.25
"""By how much logits may differ, as a share of their size, where both models compute alike, and where one rounds: a
teacher in bfloat16 without 15 of 30 blocks was 3 to 5 percent from itself in float32."""

_OF_A_BLOCK = 0.1
"""By how much what a block adds may differ, as a share of its size, at the median token."""


def cut_config(teacher: PreTrainedConfig, cut: Cut) -> PreTrainedConfig:
    """The config of the student that a cut makes of a teacher.

    Every list that has an entry for each layer keeps those of the kept blocks.

    Args:
        teacher: the teacher's config, which stays as it is.
        cut: what is kept.

    Raises:
        BadRequest: if the config cannot say so, or what it says would be lost when it is saved and read again.
    """
    config = copy.deepcopy(teacher)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    text = config.get_text_config(decoder=True)
    depth = text.num_hidden_layers
    try:
        for name, value in _per_layer(text, depth):
            setattr(text, name, type(value)(value[block] for block in cut.kept))
        text.num_hidden_layers = len(cut.kept)
        if cut.neurons is not None:
            set_feed_forward_size(config, len(cut.neurons[0]))
        if cut.head_groups is not None:
            _, group, text.head_dim = config_heads(teacher)
            text.num_attention_heads = group * len(cut.head_groups[0])
            if getattr(text, "num_key_value_heads", None) is not None:
                text.num_key_value_heads = len(cut.head_groups[0])
        again = type(config).from_dict(config.to_dict())
    except (ValueError, TypeError, AttributeError, KeyError, NotImplementedError) as error:
        raise _cannot(teacher, f"its config does not take it ({reason_of(error)})") from error
    there = [dict(_per_layer(one.get_text_config(decoder=True), len(cut.kept))) for one in (config, again)]
    if config_layers(again) != len(cut.kept) or there[0] != there[1]:
        raise _cannot(teacher, "its config tells of the layers in a way that cannot be cut")
    return config


def _per_layer(text: PreTrainedConfig, depth: int) -> Iterator[tuple[str, Any]]:
    """The attributes of a config that hold one entry for each layer."""
    for name, value in list(vars(text).items()):
        is_list = isinstance(value, (list, tuple)) and len(value) == depth
        if is_list and not name.startswith("_") and not name.endswith(_NOT_PER_LAYER):
            yield name, value


def _cannot(teacher: PreTrainedConfig, why: str) -> BadRequest:
    what = f"No student can be cut out of a teacher of the type {teacher.model_type} like this: {why};"
    return BadRequest(what, "choose other layers, or name a student that is there already.")


@torch.no_grad()
def copy_weights(teacher: PreTrainedModel, student: PreTrainedModel, cut: Cut) -> None:
    """Fill a student with its part of a teacher's weights, in the student's data type.

    Args:
        teacher: with plain weights.
        student: of the teacher's family, as deep and wide as the cut says.
        cut: what is kept.

    Raises:
        BadRequest: if the student has other weights than that part of the teacher.
    """
    weights = teacher.state_dict()
    own, theirs = (_path_of_blocks(model) for model in (student, teacher))
    _, group, head = config_heads(teacher.config)
    transposed = {name for name, module in teacher.named_modules() if isinstance(module, Conv1D)}
    for name, parameter in student.state_dict().items():
        source, number, inner = name, None, ""
        if name.startswith(own):
            place, inner = name.removeprefix(own).split(".", 1)
            number = int(place)
            source = f"{theirs}{cut.kept[number]}.{inner}"
        weight = weights.get(source)
        if weight is not None and number is not None:
            neurons = None if cut.neurons is None else cut.neurons[number]
            groups = None if cut.head_groups is None else cut.head_groups[number]
            is_conv1d = source.rpartition(".")[0] in transposed
            weight = cut_weight(inner, weight, is_conv1d, neurons, groups, group, head)
        if weight is None or weight.shape != parameter.shape:
            shape = "missing" if weight is None else tuple(weight.shape)
            is_narrow = cut.neurons is not None or cut.head_groups is not None
            remedy = "keep other layers of it, name no config of other widths, or a student that is there already."
            raise BadRequest(
                f"A student cannot be cut out of the teacher, a {type(teacher).__name__}, like this: {source} is "
                f"{shape} in that part of it and {tuple(parameter.shape)} in the student;",
                "cut it in depth alone, with student_num_layers." if is_narrow else remedy,
            )
        parameter.copy_(weight)


def _path_of_blocks(model: PreTrainedModel) -> str:
    """What the names of the weights of a model's blocks begin with."""
    blocks = find_blocks(model)
    return next(f"{name}." for name, module in model.named_modules() if module is blocks)


def check_blocks(teacher: PreTrainedModel, student: PreTrainedModel, cut: Cut) -> None:
    """Make sure that each block of a student is built as the teacher's block whose weights it holds.

    A family may build a block by its place, for instance with a window of attention, and the student's places are
    others. Plain attributes of all parts are compared; those that say what a part's place is differ.

    Raises:
        BadRequest: naming what differs.
    """
    ours, theirs = find_blocks(student), find_blocks(teacher)
    for number, source in enumerate(cut.kept):
        parts = dict(theirs[source].named_modules())
        for name, part in ours[number].named_modules():
            other = parts.get(name)
            if other is None or (differing := _differing(part, other, cut)) is not None:
                what = type(part).__name__ if other is None else f"{name or type(part).__name__} {differing}"
                raise _cannot(teacher.config, f"its block {source} differs from what block {number} would be ({what})")


_PLACES = ("layer_idx", "layer_id", "layer_number", "layer_index", "block_idx")
"""Attributes that say which block a part belongs to."""

_SIZES = ("features", "nf", "nx", "size", "heads", "groups", "dim", "ffn_dim")
"""Ends of the names of attributes that differ where a student is cut in width."""


def _differing(part: nn.Module, other: nn.Module, cut: Cut) -> str | None:
    """The first plain attribute in which two parts differ, with both values."""
    if cut.neurons is not None or cut.head_groups is not None:
        passed_over: tuple[str, ...] = (*_PLACES, *_SIZES)
    else:
        passed_over = _PLACES
    for name, value in vars(part).items():
        if name.startswith("_") or name in ("training", "gradient_checkpointing") or name.endswith(passed_over):
            continue
        theirs = vars(other).get(name)
        plain = isinstance(value, (int, float, str, type(None))) and isinstance(theirs, (int, float, str, type(None)))
        if plain and value != theirs:
            return f"has {name} {theirs} and {value}"
    return None


@contextmanager
def _parameters_as(student: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """Within the `with` block a student in float32 has its parameters in the data type they were copied from."""
    changed = [part for part in student.parameters() if part.dtype == torch.float32 != dtype]
    for part in changed:
        part.data = part.data.to(dtype)
    try:
        yield
    finally:
        for part in changed:
            part.data = part.data.float()  # they came from that data type, so nothing was lost


@torch.no_grad()
def check_logits(teacher: PreTrainedModel, student: PreTrainedModel, cut: Cut) -> None:
    """Make sure that a student's logits are those of the teacher without what was cut away, on a few tokens.

    Args:
        teacher: with plain weights, those that the student's were copied from.
        student: it is left in the mode and place it came in.
        cut: what is kept.

    Raises:
        BadRequest: if they differ, so that the student would not be that part of the teacher.
    """
    if not (can_run(teacher) and can_run(student)):
        return
    rounds = teacher.dtype != torch.float32 and (cut.neurons is not None or cut.head_groups is not None)
    # sums over fewer numbers round in another way, which 30 blocks made 17 to 38 percent of bfloat16 logits
    alike = _blocks_alike(teacher, student, cut) if rounds else _logits_alike(teacher, student, cut)
    if not alike:
        raise _cannot(teacher.config, "what is left does not give what the teacher gives without the rest")


@contextmanager
def _as_cut(teacher: PreTrainedModel, cut: Cut) -> Iterator[list[nn.Module]]:
    """Within the `with` block a teacher computes without what is cut away; it gives the blocks that are kept."""
    blocks = find_blocks(teacher)
    kept = [blocks[number] for number in cut.kept]
    with ExitStack() as stack:
        stack.enter_context(evaluating(teacher))
        stack.enter_context(skipped(teacher, cut.removed))
        if cut.neurons is not None:
            stack.enter_context(silenced(neurons_of(teacher.config, kept), cut.neurons))
        if cut.head_groups is not None:
            stack.enter_context(silenced(head_groups_of(teacher.config, kept), cut.head_groups))
        yield kept


def _logits_alike(teacher: PreTrainedModel, student: PreTrainedModel, cut: Cut) -> bool:
    ids = made_up_tokens(student)
    with _as_cut(teacher, cut):
        expected = teacher(input_ids=ids.to(teacher.device), use_cache=False).logits.float().cpu()
    with evaluating(student), _parameters_as(student, teacher.dtype):
        found = student(input_ids=ids, use_cache=False).logits.float().cpu()
        alike = teacher.dtype == student.dtype and teacher.device.type == student.device.type
    difference = (found - expected).norm() / expected.norm().clamp(min=1e-12)
    return bool(difference <= (_ALIKE if alike else _ROUNDED))  # False where it is no number


def _blocks_alike(teacher: PreTrainedModel, student: PreTrainedModel, cut: Cut) -> bool:
    """Whether each block of a student adds to a state what the teacher's does without what is cut away."""
    with _as_cut(teacher, cut) as kept:
        theirs = _states_around(teacher, kept)
    with evaluating(student), _parameters_as(student, teacher.dtype):
        ours = _states_around(student, list(find_blocks(student)), [read for read, _ in theirs])
    for (read, expected), (_, found) in zip(theirs, ours, strict=True):
        added = (expected - read).norm(dim=-1).clamp(min=1e-12)
        if not ((found - expected).norm(dim=-1) / added).median() <= _OF_A_BLOCK:  # also where it is no number
            return False
    return True


def _states_around(
    model: PreTrainedModel, blocks: list[nn.Module], given: list[torch.Tensor] | None = None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What some blocks of a model read and give, in float32 on the CPU; with `given` each reads that in place of it."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def read(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if given is None:
            return None
        state = given[len(found)].to(block_input(args, kwargs))
        return ((state, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": state})

    def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        found.append((block_input(args, kwargs).float().cpu(), first_tensor(output).float().cpu()))

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(block.register_forward_pre_hook(read, with_kwargs=True))
            stack.enter_context(block.register_forward_hook(note, with_kwargs=True))
        model(input_ids=made_up_tokens(model).to(model.device), use_cache=False)
    return found


def fill_student(teacher: PreTrainedModel, student: PreTrainedModel, cut: Cut) -> None:
    """Make a student of random weights the part of a teacher that a cut says, and make sure that it is.

    Args:
        teacher: with plain weights.
        student: built from `cut_config`.
        cut: what is kept.

    Raises:
        BadRequest: as `copy_weights`, `check_blocks` and `check_logits`.
    """
    copy_weights(teacher, student, cut)
    check_blocks(teacher, student, cut)
    check_logits(teacher, student, cut)
    if teacher.generation_config is not None:
        student.generation_config = copy.deepcopy(teacher.generation_config)
