"""The part of its teacher that a student is, as a sentence and as a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...models.pruning.cut import Cut

_HOW = {
    "search": "those were left out, one by one, without which the next-token loss is lowest",
    "block_influence": "those are kept that change their input's direction most",
    "uniform": "evenly spaced",
    "list": "as student_layers names them",
    "all": "all of them",
}

HEADINGS = ("Teacher's layer", "Block influence", "In the student")


@dataclass(frozen=True)
class CutRow:
    """One layer of the teacher."""

    layer: str
    """Its block, counted from 0."""
    importance: str
    """Its block influence; empty where that was not measured."""
    fate: str
    """Which block of the student it is, or when it was left out."""
    is_kept: bool


def described(cut: Cut) -> dict[str, Any]:
    """What the summary tells of a cut, of plain JSON types."""
    sizes = {
        "neurons_of_a_layer": cut.neurons and len(cut.neurons[0]),
        "head_groups_of_a_layer": cut.head_groups and len(cut.head_groups[0]),
    }
    content = cut.to_dict()
    return {name: content[name] for name in content if name not in ("neurons", "head_groups")} | sizes


def cut_sentence(cut: dict[str, Any]) -> str:
    """How much of the teacher a student is and how that was chosen, of what the summary tells."""
    kept, depth = cut["kept"], cut["teacher_layers"]
    how = _HOW.get(cut["method"], cut["method"])
    neurons, groups = cut.get("neurons_of_a_layer"), cut.get("head_groups_of_a_layer")
    width = [f"{neurons} neurons" if neurons else "", f"{groups} groups of attention heads" if groups else ""]
    each = f"; of each layer the most active {' and '.join(filter(None, width))}" if any(width) else ""
    return f"{len(kept)} of the teacher's {depth} layers ({how}){each}: {blocks_text(kept)}"


def blocks_text(blocks: Sequence[int]) -> str:
    """Rising numbers for people, such as 0-3, 5, 8-9."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def cut_rows(cut: dict[str, Any]) -> list[CutRow]:
    """A row for each layer of the teacher, of what the summary tells; none where nothing was measured."""
    if cut.get("importance") is None:
        return []
    places = {block: place for place, block in enumerate(cut["kept"])}
    order = {removal["block"]: (turn, removal["loss"]) for turn, removal in enumerate(cut.get("removals", []), 1)}
    rows = []
    for block, importance in enumerate(cut["importance"]):
        fate = f"layer {places[block]}" if block in places else "left out"
        if block in order:
            turn, loss = order[block]
            fate = f"left out as number {turn}: loss {loss:.3f}"
        rows.append(CutRow(str(block), f"{importance:.4f}", fate, block in places))
    return rows


def cut_section(cut: dict[str, Any]) -> dict[str, Any]:
    """What the page of a run shows of a cut."""
    return {"sentence": cut_sentence(cut), "headings": HEADINGS, "rows": cut_rows(cut)}


def cut_lines(cut: dict[str, Any]) -> list[str]:
    """The sentence and the table for a terminal."""
    rows = [HEADINGS, *((row.layer, row.importance, row.fate) for row in cut_rows(cut))]
    lines = [f"  {layer:>15}  {importance:>15}  {fate}" for layer, importance, fate in rows]
    return [f"Student: {cut_sentence(cut)}", *(lines if len(rows) > 1 else [])]
