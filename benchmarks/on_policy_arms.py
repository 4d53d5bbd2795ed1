"""What `on_policy.py` compares: where a student stands and what is there to learn from, and the ways of training it."""

from dataclasses import dataclass, field
from typing import Any

BASE: dict[str, Any] = {
    "teacher_model_name_or_path": "quickstart", "max_length": 256, "per_device_train_batch_size": 32,
    "gradient_accumulation_steps": 1, "per_device_eval_batch_size": 100, "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine", "use_cpu": True, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    "plain_output": True, "logging_steps": 10, "on_policy_max_new_tokens": 80,
}  # fmt: skip
"""Of every run; no answer of the data set is longer than 79 tokens."""


@dataclass(frozen=True)
class Setting:
    """A student, and what there is to learn from."""

    answered: int
    """Problems of the training split that have their written answer."""
    prompts: int
    """Problems whose question is known; the teacher can answer them, and the student."""
    before: dict[str, Any]
    """The training with the next-token loss on the written answers that the student has behind it."""
    steps: int
    """Optimizer steps of every way."""
    cut: bool = False
    """Whether the student is two blocks cut out of its teacher's four; else it is as narrow as the quickstart's."""


_FAST = {"learning_rate": 5e-3}
SETTINGS = {
    "few answers": Setting(500, 8000, {"max_steps": 150}, 300, cut=True),
    "trained out": Setting(300, 300, {"max_steps": 150}, 300, cut=True),
    "cut": Setting(8000, 8000, {"max_steps": 20}, 100, cut=True),
    "plenty": Setting(8000, 8000, {"max_steps": 600, **_FAST}, 100),
    "few answers, narrow": Setting(500, 8000, {"max_steps": 300, **_FAST}, 100),
    "trained out, narrow": Setting(1000, 1000, {"max_steps": 900, **_FAST}, 100),
}

SFT: dict[str, Any] = {"mercator_weight": 0.0, "kd_weight": 0.0, "relative_mse_weight": 0.0, "lm_weight": 1.0}
_NO_LM = {"lm_weight": 0.0}
_KD = {"kd_weight": 3.0}
_OWN, _HALF = {"on_policy_fraction": 1.0}, {"on_policy_fraction": 0.5}
_HOT = {"on_policy_temperature": 1.5}
_FORWARD, _JSD, _REVERSE = {"kd_beta": 0.0}, {"kd_beta": 0.5}, {"kd_beta": 1.0}
_BRIDGE = {
    "mercator_weight": 30.0, "layer_mapping": "uniform:2", "projector_direction": "teacher_to_student",
    "projector_anchor": "pca", "projector_rank": 8,
}  # fmt: skip
_THEN_LOGITS = {"alignment_schedule": "stage", "kd_schedule": "stage"}
STATES = {
    "mercator_weight": 30.0, "layer_mapping": "uniform:2", "projector_direction": "student_to_teacher",
    "projector_init": "least_squares", "projector_mlp_ratio": 2.0, "projector_dropout": 0.0,
    "projector_learning_rate": 3e-3,
}  # fmt: skip
"""The alignment of the quickstart's recipe, for a student narrower than its teacher."""


def same_width(pairs: list[tuple[int, int]]) -> dict[str, Any]:
    """The alignment of a student cut out of its teacher: each layer with the one that it came from, no projector."""
    return {
        "relative_mse_weight": 15.0,
        "projector_direction": "none",
        "layer_mapping": str([list(pair) for pair in pairs]),
    }


@dataclass(frozen=True)
class Arm:
    """A way of training."""

    changes: dict[str, Any]
    states: bool = False
    """Whether the alignment that suits the setting is added."""
    rows: str = "answers"
    """`answers` that were written, `teacher`: its own answers to all prompts, or `prompts` alone."""
    only: tuple[str, ...] = field(default=tuple(SETTINGS))
    """The settings that it is tried in."""


def _own(changes: dict[str, Any], states: bool = False, only: tuple[str, ...] = tuple(SETTINGS)) -> Arm:
    return Arm({**SFT, **_NO_LM, **_OWN, **changes}, states, "prompts", only)


_NARROW = tuple(name for name, setting in SETTINGS.items() if not setting.cut)
_SCARCE = tuple(name for name, setting in SETTINGS.items() if setting.answered < setting.prompts)

WITHOUT = {
    "SFT": Arm(SFT),
    "SFT + KD": Arm({**SFT, **_KD}),
    "SFT + states": Arm(SFT, states=True),
    "SFT on the teacher's answers": Arm(SFT, rows="teacher"),
    "SFT on the teacher's answers + KD": Arm({**SFT, **_KD}, rows="teacher", only=_SCARCE),
    "SFT on the teacher's answers + states": Arm(SFT, states=True, rows="teacher", only=_SCARCE),
}
"""Ways in which the student writes nothing."""

ON_POLICY = {
    "half: SFT + KD, forward": Arm({**SFT, **_KD, **_HALF, **_FORWARD}),
    "half: SFT + KD, forward, sampled at 1.5": Arm({**SFT, **_KD, **_HALF, **_FORWARD, **_HOT}),
    "half: SFT + KD, JSD": Arm({**SFT, **_KD, **_HALF, **_JSD}),
    "half: SFT + KD, reverse": Arm({**SFT, **_KD, **_HALF, **_REVERSE}),
    "own: KD, forward": _own({**_KD, **_FORWARD}),
    "own: KD, forward, sampled at 1.5": _own({**_KD, **_FORWARD, **_HOT}),
    "own: KD, JSD": _own({**_KD, **_JSD}),
    "own: KD, reverse": _own({**_KD, **_REVERSE}),
    "half: SFT + states": Arm({**SFT, **_HALF}, states=True),
    "own: states": _own({}, states=True),
    "own: bridge of rank 8": _own(_BRIDGE, only=_NARROW),
    "own: states, then KD, reverse": _own({**_KD, **_REVERSE, **_THEN_LOGITS}, states=True),
    "own: KD, forward + states": _own({**_KD, **_FORWARD}, states=True),
    "half: SFT on the teacher's answers + KD, sampled at 1.5": Arm(
        {**SFT, **_KD, **_HALF, **_HOT}, rows="teacher", only=_SCARCE
    ),
    "half: SFT on the teacher's answers + states": Arm({**SFT, **_HALF}, True, "teacher", _SCARCE),
}
"""Ways in which the teacher corrects what the student wrote: `half` of the examples of a step, or all of its `own`."""

ARMS = {**WITHOUT, **ON_POLICY}
