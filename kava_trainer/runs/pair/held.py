"""What a teacher takes of each device, held whole or spread over the ranks, from shapes alone."""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from transformers import PreTrainedModel

from ...config.launcher import may_shard
from ...config.model_arguments import ModelArguments
from ...distillation.teachers.several import role_of
from ...models.loading import build_causal_lm, load_config
from ...models.sharding.choice import Holding
from ...models.sharding.sizes import gathered_of_teacher
from ...models.sizes import model_bytes, weight_bytes
from ...models.teacher import freeze
from ...utils.console import size_text


def meta_teacher(model: ModelArguments, role: str) -> PreTrainedModel:
    """A teacher without storage, frozen. Raises `BadRequest` where its config cannot be had."""
    config = load_config(model.teacher_name, role, model.teacher_revision, model)
    with torch.device("meta"):
        return freeze(build_causal_lm(config, model.teacher_dtype, model, role))


def share_bytes(teacher: PreTrainedModel, processes: int) -> int:
    """What each of so many processes holds of a teacher that is spread over them.

    Its vocabulary head is a part of its own then, also where it is tied to the embeddings.
    """
    head = list(teacher.get_output_embeddings().parameters())
    tied = [own for own in teacher.get_input_embeddings().parameters() if own is head[0]]
    return math.ceil((model_bytes(teacher) + weight_bytes(tied)) / processes)


def teacher_parts(
    teachers: Sequence[PreTrainedModel],
    named: Sequence[ModelArguments],
    held: Sequence[Holding],
    heads_alone: Mapping[int, bool],
    processes: int,
) -> dict[str, int]:
    """Bytes that the teachers take of each device, by what takes them.

    Args:
        teachers: that may have no storage.
        named: their arguments.
        held: how each is.
        heads_alone: of those whose states are cached, by their number, whether the vocabulary head is kept.
        processes: of the run.
    """
    parts, gathered, heads = dict[str, int](), [0], 0
    for number, (teacher, own, holding) in enumerate(zip(teachers, named, held, strict=True)):
        head = weight_bytes([teacher.get_output_embeddings().weight])
        alone = heads_alone.get(number)
        if alone is not None:
            size = head if alone else 0
            whole = size
        else:
            size = model_bytes(teacher, own.teacher_quantization)
            whole = gathered_of_teacher(teacher)
        if holding.sharded:
            size = share_bytes(teacher, processes) if alone is None else math.ceil(size / processes)
            gathered.append(whole)
            heads += head if alone is not False else 0
        parts[role_of(number)] = size
    # The teachers read one after the other, and their heads are whole together.
    return {**parts, "gathered teacher": max(*gathered, heads)} if len(gathered) > 1 else parts


def describe_holding(
    model: ModelArguments, holding: Holding, role: str, processes: int, device_type: str
) -> Iterator[str]:
    """How a teacher is held by several processes, and whether it would take less of each another way, as lines."""
    if holding.note is not None:
        yield holding.note
    quantised = model.teacher_quantization != "none"
    if processes == 1 or not may_shard(device_type) or not (holding.sharded or quantised):
        return
    teacher = meta_teacher(model, role)
    dtype = str(teacher.dtype).removeprefix("torch.")
    spread = share_bytes(teacher, processes) + gathered_of_teacher(teacher)
    kind = model.teacher_quantization if quantised else "4bit"
    whole = model_bytes(teacher, kind)
    texts = (
        (f"spread over {processes} processes, {dtype}", spread),
        (f"whole on every process, {kind}", whole),
    )
    (own, taken), (other, instead) = texts if holding.sharded else texts[::-1]
    less = "less" if instead < taken else "more"
    yield (
        f"{role.capitalize()} is {own}, and takes {size_text(taken)} of each; {other}, it would take {less}: "
        f"{size_text(instead)}."
    )
