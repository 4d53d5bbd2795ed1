"""KAVA: distil a frozen teacher language model into a smaller student by aligning hidden states.

What is listed in `__all__` is imported from where it is defined when it is first asked for, so that a mistake in a
command line does not wait for torch and transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .utils.before_imports import leave_out

leave_out()  # before anything imports the libraries

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from .config.arguments import KavaTrainingArguments as KavaTrainingArguments
    from .data.collators import DistillationCollator as DistillationCollator
    from .data.encoding import encode as encode
    from .distillation.losses import generalized_jsd_loss as generalized_jsd_loss
    from .distillation.losses import mercator_loss as mercator_loss
    from .distillation.projector import ElasticBottleneck as ElasticBottleneck
    from .distillation.projector import ProjectorConfig as ProjectorConfig
    from .distillation.projector_files import export_projectors as export_projectors
    from .distillation.projector_files import load_projectors as load_projectors
    from .distillation.rollouts.files import rollout_examples as rollout_examples
    from .distillation.targets import AttentionTarget as AttentionTarget
    from .distillation.targets import HiddenStateTarget as HiddenStateTarget
    from .distillation.targets import KeyValueTarget as KeyValueTarget
    from .distillation.targets import RelationsTarget as RelationsTarget
    from .distillation.targets import SeveralTargets as SeveralTargets
    from .distillation.targets import build_target as build_target
    from .distillation.targets import build_targets as build_targets
    from .distillation.teachers.several import SeveralTeachers as SeveralTeachers
    from .evaluation.final_answer_match import metric_path as metric_path
    from .models.hidden_states import HiddenStateCapture as HiddenStateCapture
    from .models.teacher import OnlineTeacher as OnlineTeacher
    from .runs.finish import write_report as write_report
    from .runs.pair.library import cut_student as cut_student
    from .trainer.trainer import KavaTrainer as KavaTrainer

_HOMES = {
    "config.arguments": ["KavaTrainingArguments"],
    "models.hidden_states": ["HiddenStateCapture"],
    "data.collators": ["DistillationCollator"],
    "data.encoding": ["encode"],
    "evaluation.final_answer_match": ["metric_path"],
    "distillation.losses": ["generalized_jsd_loss", "mercator_loss"],
    "distillation.projector": ["ElasticBottleneck", "ProjectorConfig"],
    "distillation.projector_files": ["export_projectors", "load_projectors"],
    "distillation.rollouts.files": ["rollout_examples"],
    "distillation.targets": [
        "AttentionTarget",
        "HiddenStateTarget",
        "KeyValueTarget",
        "RelationsTarget",
        "SeveralTargets",
        "build_target",
        "build_targets",
    ],
    "distillation.teachers.several": ["SeveralTeachers"],
    "models.teacher": ["OnlineTeacher"],
    "runs.pair.library": ["cut_student"],
    "runs.finish": ["write_report"],
    "trainer.trainer": ["KavaTrainer"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME_OF)]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
