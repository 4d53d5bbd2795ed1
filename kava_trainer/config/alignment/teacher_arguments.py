"""What can be asked of several teachers."""

from dataclasses import dataclass
from typing import Literal

from ..model_arguments import argument
from .teachers import TeacherChoice, read_teachers


@dataclass
class SeveralTeachersArguments:
    """More than one teacher for a student."""

    teachers: str | None = argument(
        None,
        'Several teachers, in place of teacher_model_name_or_path: a list such as [{"model": "org/a", "weight": 2}, '
        '{"model": "org/b"}]. Each may have a weight (1), a revision, a quantization, a dtype, layers (a layer_mapping '
        "of its own), and cached false where teacher_cache_dir is to leave it out. The first is the one that a student "
        "is cut out of and that is measured beside it.",
    )
    teacher_routing: Literal["fixed", "agreement"] = argument(
        "fixed",
        "Which of several teachers a token learns from: all, by their weights (fixed), or rather those that it agrees "
        "with already, by a softmax over the CosSim, for kd over the overlap of both distributions (agreement).",
    )
    teacher_routing_temperature: float = argument(
        0.1, "Temperature of that softmax, above 0; the smaller, the more of a token goes to one teacher."
    )

    @property
    def choices(self) -> list[TeacherChoice]:
        """The teachers where there are several; else none."""
        return read_teachers(self.teachers)
