"""What a run will need on its device, worked out before a weight is loaded.

Weights, gradients and optimizer states are counted. What a micro-batch needs beside them is not guessed from a formula:
the very forward and backward pass of the run is carried out on fake tensors, which have shapes and no memory
(`torch._subclasses.FakeTensorMode`, read in torch 2.13.0), and the storages alive at once are added up. The fake models
attend as a CPU's do, whose kernels keep as little as a GPU's.
"""

import logging
import math
import shutil
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any, cast

import psutil
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.trainer_utils import SaveStrategy

from ..config.alignment.teachers import cache_folders, other_teachers
from ..config.arguments import KavaArguments, KavaTrainingArguments
from ..config.launcher import is_fsdp_asked, mixed_precision
from ..config.model_arguments import ModelArguments
from ..data.packing import pack_step
from ..data.token_alignment.ranges import of_teacher
from ..distillation.loss_terms import LossTerms, needed_teacher_layers
from ..distillation.model import DistillationModel
from ..distillation.targets import build_targets
from ..distillation.teacher_cache import CachedTeacher
from ..distillation.teachers.several import SeveralTeachers, each_teacher, role_of
from ..models.attention.capture import hidden_layers
from ..models.layers import number_of_layers, state_width, train_text_alone
from ..models.lm_head import vocabulary_size
from ..models.loading import build_causal_lm
from ..models.lora import add_adapter
from ..models.packed_attention import enable_packing
from ..models.sharding.choice import choose_holding
from ..models.sharding.sizes import gather_in, gathered_bytes
from ..models.sizes import model_bytes, optimizer_bytes, optimizer_step_bytes, weight_bytes
from ..models.student import foreseen_layers, quantized_by, student_config
from ..models.teacher import OnlineTeacher, TeacherSource
from ..utils.console import size_text
from ..utils.errors import BadRequest, reason_of
from ..utils.files import existing_folder
from .pair.held import meta_teacher, teacher_parts


class LiveMemory(TorchDispatchMode):
    """Adds up the storages that live at once within a `with` block.

    Args:
        known: tensors that are there before and do not count.
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return output

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _meta_student(arguments: ModelArguments) -> tuple[PreTrainedModel, dict[str, int]]:
    """The student without storage, and the bytes of its own weights and of its adapters, where it has any.

    Modules cannot be moved or cast once their tensors are fake, which peft does with those that it makes.
    """
    with torch.device("meta"):
        student = build_causal_lm(student_config(arguments), arguments.student_dtype, arguments)
        if student.dtype == torch.float16:
            student.float()
        sizes = {"student": model_bytes(student, _student_quantization(arguments, student.config))}
        if arguments.use_peft:
            add_adapter(student, arguments)
        train_text_alone(student)
        if arguments.use_peft:
            sizes["adapter"] = weight_bytes(p for p in student.parameters() if p.requires_grad)
    return student, sizes


def _make_fake(model: PreTrainedModel) -> None:
    """Give a model without storage fake weights on the CPU, tied where they were; within a `FakeTensorMode`."""
    known: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in known:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                known[id(parameter)] = nn.Parameter(fake, parameter.requires_grad)
            setattr(module, name, known[id(parameter)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _student_quantization(arguments: ModelArguments, config: PreTrainedConfig) -> str:
    """In how many bits the student's weights are held, as asked for or as they are in its checkpoint."""
    if quantized_by(config) is None:
        return arguments.student_quantization
    found = config.quantization_config
    found = found if isinstance(found, dict) else found.to_dict()
    return "8bit" if found.get("load_in_8bit") or found.get("bits") == 8 else "4bit"


def _micro_batch(arguments: KavaArguments, cached: Mapping[int, tuple[int, list[int]]]) -> dict[str, Any]:
    """The largest micro-batch there can be, made of answers alone.

    Args:
        arguments: say how large it is.
        cached: width and layers of the states of each teacher that is cached, by its number.
    """
    length, budget = arguments.data.max_length, arguments.training.max_tokens_per_batch
    count = max(1, budget // length) if budget else arguments.training.per_device_train_batch_size
    states = {
        f"{of_teacher(number)}states": {
            layer: torch.zeros(count * length, width, dtype=torch.bfloat16) for layer in layers
        }
        for number, (width, layers) in cached.items()
    }
    example, tokens = torch.arange(length - 1), torch.zeros(count * length, dtype=torch.int64)
    batch = {
        "input_ids": tokens, "lengths": [length] * count, "answer_index": example.repeat(count),
        "next_tokens": torch.zeros(count * (length - 1), dtype=torch.int64), "answers": [length - 1] * count,
        **states,
    }  # fmt: skip
    (row,) = pack_step([batch], count * length)
    if budget == 0 or arguments.training.torch_compile:
        del row["packed_lengths"]
        shaped = {name: row[name].view(count, length) for name in ("input_ids", "attention_mask")}
        row |= shaped
        row |= {name: {n: s.view(count, length, -1) for n, s in own.items()} for name, own in states.items()}
    return row


def recomputes(training: KavaTrainingArguments) -> bool:
    """Whether the backward passes of a training compute activations again."""
    return bool(
        getattr(training, "activation_checkpointing", None) or getattr(training, "gradient_checkpointing", None)
    )


def _step_peak(
    training: KavaTrainingArguments, model: DistillationModel, terms: LossTerms, batch: dict[str, Any]
) -> int:
    """Bytes alive at once in one micro-batch's passes, beyond weights and the gradients of earlier ones."""
    if recomputes(training):
        enable = getattr(model.student, "activation_checkpointing_enable", model.student.gradient_checkpointing_enable)
        enable()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = [torch.zeros_like(parameter) for parameter in trained]
    for parameter, gradient in zip(trained, gradients, strict=True):
        parameter.grad = gradient
    sources = cast(list[OnlineTeacher | CachedTeacher], each_teacher(terms.teacher))
    teachers = [parameter for source in sources for parameter in source.model.parameters()]
    with LiveMemory([*teachers, *model.parameters(), *model.buffers(), *gradients]) as live:
        states = terms.teacher_states(batch)
        with terms.autocast():
            outputs = terms.student_outputs(model, batch, states, terms.full_weights)
        terms.loss(outputs, batch, terms.full_weights).backward()
    return live.peak


def _over_ranks(parts: dict[str, int], world_size: int, gathered: Callable[[], int]) -> dict[str, int]:
    """What one rank has of the parts that training changes."""
    if is_fsdp_asked():
        shares = {name: math.ceil(size / world_size) for name, size in parts.items()}
        return shares | {"gathered weights": gathered()}
    if world_size > 1:
        return parts | {"gradients": 2 * parts["gradients"]}  # data parallelism has buckets too
    return parts


def estimate_memory(arguments: KavaArguments) -> dict[str, int]:
    """Bytes that training will take on each device, by what takes them; their sum is the peak.

    Of the models only the configs are read, and of a teacher that shall be sharded the headers of its files. Every rank
    must ask.

    Returns:
        `teacher`, `teacher 2` and so on of several, `gathered teacher` where one is sharded, `student`, `adapter` where
        there is one, `projector`, `gradients`, `optimizer`, `gathered weights` under FSDP2, `micro-batch`.

    Raises:
        BadRequest: if a config cannot be had, or the models do not have what the arguments ask for.
    """
    training, model = arguments.training, arguments.model
    student, sizes = _meta_student(model)
    named = [model, *other_teachers(arguments)]
    inherited = foreseen_layers(model)
    teachers = [meta_teacher(own, role_of(number)) for number, own in enumerate(named)]
    device, processes = training.device, max(training.world_size, training.n_gpu)  # a doctor is one process of many
    holdings = [choose_holding(own, device, processes, role_of(number)) for number, own in enumerate(named)]
    with FakeTensorMode():
        for fake in (*teachers, student):
            _make_fake(fake)
        target = build_targets(training, student, teachers, inherited)
        target.requires_grad_(training.aligns)
        layers = [
            needed_teacher_layers(training, part, number_of_layers(own))
            for part, own in zip(target.parts, teachers, strict=True)
        ]
        if training.max_tokens_per_batch and not training.torch_compile:
            for fake in (*teachers, student):
                enable_packing(fake)
        cached = [*cache_folders(training)] if training.teacher_cache_dir and layers[0] else []
        sources: list[CachedTeacher | OnlineTeacher] = [
            CachedTeacher(own, lambda ids: {}) if number in cached else OnlineTeacher(own, layers[number])
            for number, own in enumerate(teachers if layers[0] else ())
        ]
        source: TeacherSource | None = SeveralTeachers(sources) if len(sources) > 1 else next(iter(sources), None)

        computes_in = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision(training))

        def autocast() -> Any:
            return torch.autocast("cpu", computes_in) if computes_in else nullcontext()

        terms = LossTerms(training, target, source, vocabulary_size(student), autocast)
        distilled = DistillationModel(student, target).train()
        held = {number: hidden_layers(layers[number]) for number in cached}
        batch = _micro_batch(arguments, {n: (state_width(teachers[n], own), own) for n, own in held.items()})
        trained = [parameter for parameter in distilled.parameters() if parameter.requires_grad]
        freed = [] if training.samples else cached
        heads_alone = dict.fromkeys(freed, training.kd_weight > 0)
        embeddings = [m.weight for m in student.modules() if isinstance(m, nn.Embedding)]
        parts = {
            **sizes,
            "projector": weight_bytes([*target.parameters(), *target.buffers()]),  # one that is frozen has buffers
            "gradients": weight_bytes(trained),
            "optimizer": optimizer_bytes(training.optim, trained, embeddings, training.optim_args),
        }
        shares = _over_ranks(parts, training.world_size, lambda: gathered_bytes(student, target, computes_in))
        if is_fsdp_asked() and computes_in:
            gather_in(student, computes_in)
        micro_batch = _step_peak(training, distilled, terms, batch)
        return {
            **teacher_parts(teachers, named, holdings, heads_alone, processes),
            **shares,
            # the optimizer's step comes when the micro-batch has been freed
            "micro-batch": max(micro_batch, optimizer_step_bytes(training.optim, trained)),
        }


def try_to_estimate(estimate: Callable[[], dict[str, int]]) -> tuple[dict[str, int] | None, str]:
    """What `estimate`, a call of `estimate_memory`, gives; or None, and why it gives nothing.

    Code of a model's own may ask for values, which fake tensors lack, or call what torch cannot play through: the run
    itself may do well all the same. Torch would write a traceback of it on its own.

    Raises:
        BadRequest: as `estimate_memory`.
    """
    fakes = logging.getLogger("torch._subclasses.fake_tensor")
    before, fakes.disabled = fakes.disabled, True
    try:
        return estimate(), ""
    except BadRequest:
        raise
    except Exception as error:  # of any kind that models have
        return None, f"the passes of these models cannot be played through ({reason_of(error).rstrip('.')})"
    finally:
        fakes.disabled = before


def describe_estimate(parts: Mapping[str, int], device: torch.device) -> tuple[int, str]:
    """All that a process will have in memory, in bytes, and the parts of it in words.

    On a CPU that is also what Python and the libraries have taken by now, which the peak of the process is told with.
    """
    shown = dict(parts)
    if device.type == "cpu":
        shown["Python and its libraries"] = psutil.Process().memory_info().rss
    return sum(shown.values()), ", ".join(f"{name} {size_text(size)}" for name, size in shown.items() if size > 0)


def checkpoint_bytes(parts: Mapping[str, int], training: KavaTrainingArguments) -> int:
    """What one checkpoint takes on disk: student or its adapters, projectors, and optimizer where it is saved.

    The parts are those of `estimate_memory`.
    """
    student = "adapter" if "adapter" in parts else "student"
    weights, optimizer = parts[student] + parts["projector"], 0 if training.save_only_model else parts["optimizer"]
    if is_fsdp_asked():  # the parts are one rank's, and the weights are written in shards and, once more, whole
        return training.world_size * (2 * weights + optimizer)
    return weights + optimizer


def check_space(parts: Mapping[str, int], training: KavaTrainingArguments) -> None:
    """Make sure that the disk of `output_dir`, which need not exist yet, holds one more checkpoint of these parts.

    Raises:
        BadRequest: with both sizes, if it does not, and any will be written.
    """
    if training.save_strategy == SaveStrategy.NO:
        return
    needed, free = checkpoint_bytes(parts, training), shutil.disk_usage(existing_folder(training.output_dir)).free
    if needed <= free:
        return
    alone = needed - parts["optimizer"]
    all_is_needed = training.save_only_model or is_fsdp_asked()  # Trainer keeps save_only_model from sharded weights
    smaller = "" if all_is_needed or alone > free else f", set save_only_model true ({size_text(alone)})"
    raise BadRequest(
        f"One checkpoint takes {size_text(needed)}, but the disk of output_dir {training.output_dir} has "
        f"only {size_text(free)} free.",
        f"Make room there, name an output_dir on a larger disk{smaller}, or write save_strategy no.",
    )
