"""Which runs `benchmarks/effectiveness.py` makes: what each row of its tables changes in the quickstart recipe."""

import itertools
from typing import Any

BASE = {
    "mercator_weight": 30.0, "layer_mapping": "last", "projector_direction": "teacher_to_student",
    "projector_anchor": "pca", "projector_init": "random", "projector_mlp_ratio": 1.0, "projector_dropout": 0.1,
    "projector_learning_rate": 1e-3,
}  # fmt: skip
"""What a row has where it says nothing else, in place of the quickstart recipe's own alignment."""

SFT = {"mercator_weight": 0.0, "lm_weight": 1.0, "kd_weight": 0.0}
WAYS = {
    "t2s none": {"projector_direction": "teacher_to_student", "projector_anchor": "none"},
    "t2s pca": {"projector_direction": "teacher_to_student", "projector_anchor": "pca"},
    "t2s reconstruction": {"projector_direction": "teacher_to_student", "projector_anchor": "reconstruction"},
    "s2t": {"projector_direction": "student_to_teacher", "projector_anchor": "none"}
    | {"projector_mlp_ratio": 2.0, "projector_dropout": 0.0, "projector_learning_rate": 3e-3},
}
"""The last way starts from the narrower states, so its projector is given more width."""


KD = {"kd_weight": 3.0, "kd_temperature": 1.0}
"""The divergence that did best beside the next-token loss in the group `kd`."""


def _grid() -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {"SFT": SFT}
    for way, weight in itertools.product(WAYS, (0.3, 1.0, 3.0, 30.0)):
        rows[f"{way}, weight {weight:g}, last"] = WAYS[way] | {"mercator_weight": weight}
    for way in WAYS:
        base = WAYS[way] | {"mercator_weight": 30.0}
        rows[f"{way}, weight 30, uniform:2"] = base | {"layer_mapping": "uniform:2"}
        rows[f"{way}, weight 30, last + KD"] = base | KD
    return rows


def _together() -> dict[str, dict[str, Any]]:
    """Alignment and divergence in one run: is it their proportion, or their order?"""
    pca, linear = WAYS["t2s pca"] | {"mercator_weight": 30.0}, {"alignment_schedule": "linear"}
    return {
        "t2s pca, weight 100, last + KD": pca | KD | {"mercator_weight": 100.0},
        "t2s pca, weight 30, last, linear to 0": pca | linear,
        "t2s pca, weight 30, last, linear to 0 + KD": pca | KD | linear,
    }


def _divergences() -> dict[str, dict[str, Any]]:
    return {
        f"SFT + KD {weight:g}, T {temperature:g}": SFT | {"kd_weight": weight, "kd_temperature": temperature}
        for weight, temperature in itertools.product((1.0, 3.0, 10.0), (1.0, 2.0))
    }


def _starts() -> dict[str, dict[str, Any]]:
    """The closed-form start against the random one, for both projectors that train."""
    wide = {"projector_mlp_ratio": 4.0, "projector_dropout": 0.0}
    ways = {"t2s reconstruction": {}, "t2s reconstruction, wide, no dropout": wide, "s2t": {}}
    rows = {}
    for (way, shape), start in itertools.product(ways.items(), ("random", "least_squares")):
        base = WAYS[way.split(",")[0]] | shape
        rows[f"{way}, weight 30, start {start}"] = base | {"mercator_weight": 30.0, "projector_init": start}
    return rows


def _trained() -> dict[str, dict[str, Any]]:
    """A student that has learned for one run before, as pretrained students have, trained for one more."""
    student = {"trained": True, "learning_rate": 3e-3}
    pca = student | WAYS["t2s pca"] | {"mercator_weight": 30.0}
    s2t = student | WAYS["s2t"]
    fit = {"projector_init": "least_squares"}
    return {
        "SFT": student | SFT,
        "SFT + KD": student | SFT | KD,
        "t2s pca, weight 30": pca,
        "t2s pca, weight 30, turned towards the student": pca | fit,
        "s2t, weight 3": s2t | {"mercator_weight": 3.0},
        "s2t, weight 3, start least_squares": s2t | {"mercator_weight": 3.0} | fit,
    }


def _finalists() -> dict[str, dict[str, Any]]:
    """The two ways that were best in the grid, with one pair of layers and with two, and what they have to beat."""
    two, fit = {"layer_mapping": "uniform:2"}, {"projector_init": "least_squares"}
    s2t = WAYS["s2t"] | {"mercator_weight": 30.0}
    return {
        "SFT": SFT,
        "SFT + KD": SFT | KD,
        "t2s pca, weight 30, last": {},
        "t2s pca, weight 30, uniform:2": two,
        "s2t, weight 30, last, start least_squares": s2t | fit,
        "s2t, weight 30, uniform:2": s2t | two,
        "s2t, weight 30, uniform:2, start least_squares": s2t | two | fit,
    }


GROUPS = {
    "kd": _divergences,
    "grid": _grid,
    "together": _together,
    "start": _starts,
    "trained": _trained,
    "finalists": _finalists,
}
