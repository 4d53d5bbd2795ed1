"""Cutting a student out of its teacher in a script."""

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from transformers import PreTrainedModel

from ...config.model_arguments import ModelArguments
from ...config.student_cut import cut_problems
from ...data.collators import DistillationCollator
from ...models.layers import number_of_layers
from ...models.loading import build_causal_lm, load_causal_lm
from ...models.pruning.cut import Cut, choose_cut, cut_request
from ...models.pruning.student import cut_config, fill_student
from ...utils.errors import BadRequest
from .choice import SEARCH_TOKENS, calibration_batches


def cut_student(
    teacher: PreTrainedModel,
    num_layers: int | None = None,
    examples: Any = None,
    *,
    layers: str | list[int] = "importance",
    importance: Literal["search", "block_influence"] = "search",
    intermediate_size: int | None = None,
    num_attention_heads: int | None = None,
    collator: Callable[[list[Any]], dict[str, Any]] | None = None,
    tokens: int = SEARCH_TOKENS,
    batch_size: int = 8,
    seed: int = 42,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> tuple[PreTrainedModel, Cut]:
    """Make a student of a part of a teacher's layers, neurons and attention heads, with its weights.

    The cut's `inherited_layers` say which of the teacher's layers each of the student's came from. To compare the two
    as a run of the command line does, give them to `KavaTrainer(inherited_layers=...)`, with the arguments
    `layer_mapping` inherited, `projector_direction` none, `mercator_weight` 0, `relative_mse_weight` 15, `kd_weight`
    0.5 and `kd_tokens` all.

    Args:
        teacher: a causal language model, which stays as it is. One that bitsandbytes has quantised is read once more,
            as plain weights, from where it was loaded.
        num_layers: layers that are kept; by default all, or those that `layers` names.
        examples: tokenised, each with `input_ids` and `labels` as `encode` gives them; some of them tell what is
            important. Not needed where `layers` are named, or `uniform`, and the width stays.
        layers: `importance`, `uniform` (evenly spaced), or blocks of the teacher counted from 0.
        importance: `search` for the blocks that the next-token loss rises least without, or `block_influence`.
        intermediate_size: neurons of each feed-forward block that are kept; all by default.
        num_attention_heads: attention heads that are kept, in whole groups that share keys and values; all by default.
        collator: pads examples; a `DistillationCollator` by default.
        tokens: that importance is measured on.
        batch_size: examples at a time at most.
        seed: of the draw among the examples.
        revision: of the hub repository that a quantised teacher was loaded from, whose files are read once more.
        dtype: of the student's weights; the teacher's by default, or those of its files where it is quantised.

    Returns:
        The student, on the CPU and in training mode, and what it was made of.

    Raises:
        BadRequest: if the teacher has no such part, its family cannot be cut so, or examples are missing. It calls
            the arguments what a run calls them, with `student_` before.
    """
    asked = ModelArguments(
        teacher_model_name_or_path=teacher.name_or_path,
        student_init="teacher_layers",
        student_num_layers=num_layers,
        student_layers=layers,  # type: ignore[arg-type]
        student_layer_importance=importance,
        student_intermediate_size=intermediate_size,
        student_num_attention_heads=num_attention_heads,
    )
    if wrong := list(cut_problems(asked)):
        raise BadRequest.of(*wrong)
    request = cut_request(asked, teacher.config)
    batches: list[dict[str, Any]] = []
    if request.reads_text(number_of_layers(teacher)):
        if examples is None:
            raise BadRequest("What is important in a teacher is measured on text;", "give cut_student examples.")
        batches = calibration_batches(examples, collator or DistillationCollator(), tokens, seed, batch_size)
    cut = choose_cut(teacher, request, batches)
    source = teacher
    if getattr(teacher, "is_quantized", False):
        source = load_causal_lm(teacher.name_or_path or "", "teacher", revision, "auto", asked).eval()
    student = build_causal_lm(cut_config(source.config, cut), "auto", asked)
    student = cast(Any, student).to(dtype or source.dtype)  # transformers gives `to` a type that fits no data type
    fill_student(source, student, cut)
    return student.train(), cut
