"""How a user names the layers that are aligned, before any model is known."""

import json
from typing import Literal

LayerMapping = Literal["last", "all"] | int | list[tuple[int, int]]
"""A parsed `layer_mapping`: a whole number k stands for `uniform:k`, a list holds (student, teacher) pairs."""

_NAMED: dict[str, LayerMapping] = {"last": "last", "all": "all"}


def parse_layer_mapping(text: str) -> LayerMapping:
    """Read `layer_mapping` without knowing the models.

    Args:
        text: `last`, `all`, `uniform:k`, or a JSON list of [student layer, teacher layer] pairs, counted from 1.

    Raises:
        ValueError: if the text is none of these. Layer 0, the embeddings, is never accepted.
    """
    if text in _NAMED:
        return _NAMED[text]
    kind, _, count = text.partition(":")
    if kind == "uniform" and count.isdigit() and int(count) > 0:
        return int(count)
    try:
        pairs = json.loads(text)
        if pairs and all(len(pair) == 2 and all(type(n) is int and n >= 1 for n in pair) for pair in pairs):
            return [tuple(pair) for pair in pairs]
    except (json.JSONDecodeError, TypeError):
        pass
    raise ValueError(
        f"layer_mapping is {text!r}; write last, all, uniform:2 (any number of pairs), or pairs of a student and a "
        "teacher layer counted from 1, such as [[12, 14], [24, 28]]."
    )
