"""What `pair_kinds.py` compares: what is aligned, in which layers, and in which tokens the student reads."""

from dataclasses import dataclass, field
from typing import Any

QUICKSTART, CHARACTERS, PIECES = "quickstart", "characters", "320 tokens"

READERS = (QUICKSTART, CHARACTERS, PIECES)
"""Tokenizers of the student: the teacher's own, one token a character, and a BPE of fewer merges than the teacher's."""

BATCH, STEPS, ROWS = 8, 300, 8000

SFT = {"mercator_weight": 0.0}

HIDDEN = {"mercator_weight": 30.0}
"""The quickstart's recipe: the student's states through a projector, at the teacher's own, in two pairs of layers."""

KV = {"alignment_target": "kv"}
HEADWISE = {**KV, "kv_shape": "headwise"}
ATTENTION = {**SFT, "alignment_target": "attention"}
RELATIONS = {**SFT, "alignment_target": "relations"}


CAUSAL = "hidden, weight 30, causal"
"""Compared with those of the teacher's states alone that have read no further than the student."""

EMBEDDED, SECOND, SECOND_STEPS = "embedded", "second", 800
"""The embedded teacher, another one that is worse, and for how long that was trained."""


@dataclass(frozen=True)
class Arm:
    """One way of training."""

    changes: dict[str, Any] = field(default_factory=dict)
    """Of the quickstart's recipe."""
    readers: tuple[str, ...] = (QUICKSTART,)
    """The students that it is tried with."""
    teachers: tuple[str, ...] = (EMBEDDED,)
    """Whom it learns from."""


def _weighted(name: str, changes: dict[str, Any], weight: str, values: tuple[float, ...]) -> dict[str, Arm]:
    return {f"{name}, weight {value:g}": Arm({**changes, weight: value}) for value in values}


ARMS = {
    "SFT": Arm(SFT, READERS),
    "hidden, weight 30": Arm(HIDDEN, READERS),
    "hidden, weight 30, linear to 0": Arm({**HIDDEN, "alignment_schedule": "linear"}, READERS),
    CAUSAL: Arm({**HIDDEN, "token_alignment": "causal"}, (CHARACTERS, PIECES)),
    "hidden, weight 3": Arm({"mercator_weight": 3.0}, READERS),
    **_weighted("kv flat", KV, "mercator_weight", (10.0, 30.0, 100.0)),
    **_weighted("kv headwise", HEADWISE, "mercator_weight", (10.0, 30.0, 100.0)),
    **_weighted("attention", ATTENTION, "attention_weight", (1.0, 10.0, 100.0)),
    **_weighted("relations", RELATIONS, "relations_weight", (3.0, 30.0, 300.0)),
    "hidden, weight 30, last": Arm({**HIDDEN, "layer_mapping": "last"}),
    "hidden, weight 30, cka": Arm({**HIDDEN, "layer_mapping": "cka"}),
    "the second teacher alone": Arm(HIDDEN, teachers=(SECOND,)),
    "both teachers": Arm(HIDDEN, teachers=(EMBEDDED, SECOND)),
    "both teachers, routed": Arm({**HIDDEN, "teacher_routing": "agreement"}, teachers=(EMBEDDED, SECOND)),
}


@dataclass(frozen=True)
class Table:
    """Which measurements stand in one table."""

    arms: tuple[str, ...]
    readers: tuple[str, ...] = (QUICKSTART,)
    steps: tuple[int, ...] = (STEPS,)
    rows: tuple[int, ...] = (ROWS,)


_LAYERS = ("hidden, weight 30, last", "hidden, weight 30, cka")
_TEACHERS = tuple(name for name, arm in ARMS.items() if arm.teachers != (EMBEDDED,))

TABLES = {
    "what is aligned": Table(
        tuple(name for name, arm in ARMS.items() if QUICKSTART in arm.readers and name not in (*_LAYERS, *_TEACHERS))
    ),
    "which layers": Table(("SFT", "hidden, weight 30", *_LAYERS)),
    "several teachers": Table(("SFT", "hidden, weight 30", *_TEACHERS)),
    "which tokens": Table(
        (*(name for name, arm in ARMS.items() if arm.readers == READERS), CAUSAL), READERS, (300, 800, 1600)
    ),
    "few examples": Table(("SFT", "hidden, weight 30"), (CHARACTERS, PIECES), (800,), (50, 100, 200)),
}
"""By the name that stands in the marks of the document."""
