"""What there is to align, with which weights, and what does not go with each."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ...utils.errors import Problem
from ..launcher import is_fsdp_asked
from ..recipes import accelerate_config

if TYPE_CHECKING:  # which asks here
    from ..arguments import KavaTrainingArguments
    from ..model_arguments import ModelArguments

VECTOR_WEIGHTS = ("mercator_weight", "mse_weight", "relative_mse_weight")
"""Of the terms that compare vectors of both models, one space."""

WEIGHTS_OF_TARGETS = {
    "hidden": VECTOR_WEIGHTS,
    "kv": VECTOR_WEIGHTS,
    "attention": ("attention_weight",),
    "relations": ("relations_weight",),
}
"""By `alignment_target` the weights of the terms that it has."""

ALIGNMENT_WEIGHTS = tuple(dict.fromkeys(name for names in WEIGHTS_OF_TARGETS.values() for name in names))
"""Of the terms that compare what both models have inside."""

PROJECTED_TARGETS = ("hidden", "kv")
"""Values of `alignment_target` that have projectors."""

ATTENTION_TARGETS = ("kv", "attention")
"""Those that read what goes into attention."""


def target_problems(training: "KavaTrainingArguments") -> Iterator[Problem]:
    """What does not go with `alignment_target`."""
    target = training.alignment_target
    if target not in WEIGHTS_OF_TARGETS:
        yield Problem.of_value("alignment_target", target, f"write one of {', '.join(WEIGHTS_OF_TARGETS)}.")
        return
    others = set(VECTOR_WEIGHTS) - set(WEIGHTS_OF_TARGETS[target]) - {"mercator_weight"}  # whose default is above 0
    for name in sorted(name for name in others if getattr(training, name) > 0):
        yield weight_of_other_target(name, target)
    if target not in PROJECTED_TARGETS and training.projector_anchor != "none":
        what = (
            f"projector_anchor {training.projector_anchor} holds a projector, and alignment_target {target} has none;"
        )
        yield Problem("projector_anchor", what, "write none.")


def attention_problems(training: "KavaTrainingArguments") -> Iterator[Problem]:
    """What does not go with a target that reads what goes into attention, or with the shape of one."""
    target, shape = training.alignment_target, training.kv_shape
    if target != "kv" and shape != "flat":
        what = f"kv_shape {shape} is for alignment_target kv, but that is {target};"
        yield Problem("kv_shape", what, "write alignment_target kv, or leave kv_shape out.")
    if target not in ATTENTION_TARGETS:
        return
    told = f"alignment_target {target} reads what goes into attention, which"
    if target == "kv" and shape == "flat" and training.layer_weights is not None:
        what = "kv_shape flat lays all layers end to end, so layer_weights has nothing to weigh;"
        yield Problem("layer_weights", what, "leave it out, or write kv_shape headwise.")
    if training.teacher_cache_dir:
        what = f"{told} teacher_cache_dir does not hold;"
        yield Problem("teacher_cache_dir", what, "leave it out, or write alignment_target hidden or relations.")
    if training.torch_compile:
        what = f"{told} torch_compile would leave out;"
        yield Problem("torch_compile", what, "write torch_compile false.")
    if _is_reentrant(training):
        what = f"{told} has no gradient where use_reentrant is true;"
        yield Problem("gradient_checkpointing_kwargs", what, "write use_reentrant false.")
    if is_fsdp_asked():
        what = f"{told} is not supported under FSDP2;"
        yield Problem("alignment_target", what, f"start with DDP ({accelerate_config('ddp.yaml')}).")


def implementation_problems(training: "KavaTrainingArguments", model: "ModelArguments") -> list[Problem]:
    """What does not go with a target that reads what goes into attention, of how both models attend."""
    target, asked = training.alignment_target, model.attn_implementation
    if target not in ATTENTION_TARGETS or not training.reads_teacher or asked in (None, "sdpa"):
        return []
    what = f"alignment_target {target} reads what goes into sdpa attention, but attn_implementation is {asked};"
    return [Problem("attn_implementation", what, "write sdpa, or alignment_target hidden or relations.")]


def _is_reentrant(training: "KavaTrainingArguments") -> bool:
    """Whether gradient checkpointing was asked to leave the graph out, in any spelling that comes to it.

    A command line gives the options as text, whose words and digits transformers takes for what they say; of options
    that are none, torch takes any value that is true.
    """
    names = ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
    return any(_says_reentrant(given) for name in names if (given := getattr(training, name, None)))


def _says_reentrant(given: Any) -> bool:
    if not isinstance(given, str):
        return bool(given.get("use_reentrant"))
    try:
        found = json.loads(given)
    except json.JSONDecodeError:  # which transformers tells in words of its own
        return False
    value = found.get("use_reentrant") if isinstance(found, dict) else None
    if not isinstance(value, str):
        return bool(value)
    return value.lower() != "false" and value.strip("0.") != ""


def weight_of_other_target(name: str, target: str) -> Problem:
    """What to write for a weight that has no effect on what is aligned."""
    own = " or ".join(WEIGHTS_OF_TARGETS[target])
    others = " or ".join(kind for kind, names in WEIGHTS_OF_TARGETS.items() if name in names)
    what = f"{name} is above 0, but alignment_target {target} has no such term;"
    return Problem(name, what, f"write {name} 0 and set {own}, or write alignment_target {others}.")


def written_for_other_targets(training: "KavaTrainingArguments", given: frozenset[str]) -> list[Problem]:
    """Weights of the alignment that somebody wrote, and that what is aligned has no term for.

    Args:
        training: the arguments.
        given: the names of those that somebody wrote.
    """
    others = given & ({*ALIGNMENT_WEIGHTS} - {*WEIGHTS_OF_TARGETS.get(training.alignment_target, ALIGNMENT_WEIGHTS)})
    names = sorted(name for name in others if getattr(training, name) > 0)
    return [weight_of_other_target(name, training.alignment_target) for name in names]


def sharing_problems(training: "KavaTrainingArguments") -> Iterator[Problem]:
    """Projectors that cannot be shared, or that there is one of in any case."""
    target, direction = training.alignment_target, training.projector_direction
    if training.projector_sharing == "none":
        return
    why = f"alignment_target {target} has no projector" if target not in PROJECTED_TARGETS else ""
    why = why or (f"projector_direction {direction} has none" if direction == "none" else "")
    why = why or ("a bridge (projector_rank) is fitted to one pair of layers" if training.projector_rank else "")
    why = why or ("kv_shape flat has one in any case" if (target, training.kv_shape) == ("kv", "flat") else "")
    if why:
        what = f"projector_sharing {training.projector_sharing} lets all pairs of layers share a projector, but {why};"
        yield Problem("projector_sharing", what, "write none.")
