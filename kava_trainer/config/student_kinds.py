"""What the terms, their tokens and the projector are by default for each kind of student.

What pays depends on where a student comes from, so these stand in place of the defaults of `KavaTrainingArguments`
wherever nobody wrote a value. What was measured is in `docs/effectiveness.md`, *A real pair*.
"""

from collections.abc import Mapping
from typing import Any

from .alignment.target_checks import ALIGNMENT_WEIGHTS
from .model_arguments import QUICKSTART

_PROJECTED = ("projector_direction", "projector_anchor", "projector_init")
"""Whoever writes one of these for a cut student wants a projector, for which the others were not measured, or says that
there is none."""

_OF_ANY_TARGET = ("layer_mapping", "kd_weight", "kd_tokens")

BY_START: dict[str, dict[str, Any]] = {
    "teacher_layers": {
        "mercator_weight": 0.0,
        "relative_mse_weight": 15.0,
        "projector_direction": "none",
        "layer_mapping": "inherited",
        "kd_weight": 0.5,
        "kd_tokens": "all",
    },
    "random": {"mercator_weight": 0.3, "kd_weight": 1.0},
    "pretrained": {},
}
"""By `student_init`. The embedded student is no such case: there a heavy alignment pays at once."""


def defaults_for(student_init: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of a kind of student, but for what somebody wrote and what that decides.

    Args:
        student_init: where the student comes from.
        given: the arguments that somebody wrote.
    """
    found = dict(BY_START.get(student_init, {}))
    weighs = not given.keys().isdisjoint(ALIGNMENT_WEIGHTS)
    if given.get("alignment_target", "hidden") != "hidden":  # nothing was measured with another
        found = (
            {name: value for name, value in found.items() if name in _OF_ANY_TARGET} if student_init != "random" else {}
        )
    if student_init == "random":
        divergence = float(given.get("kd_weight", 1.0)) > 0
        if weighs or not divergence or given.get("student_model_name_or_path") == QUICKSTART:
            return {}  # neither of the two was measured without the other
    elif not given.keys().isdisjoint(_PROJECTED) and given.get("projector_direction") != "none":
        found = {name: value for name, value in found.items() if name.startswith("kd_")}
    if weighs:
        found.pop("relative_mse_weight", None)  # one that is written says what the states are compared by
    return {name: value for name, value in found.items() if name not in given}
