"""What a student keeps of its teacher: asked for, chosen, and written down."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from transformers import PreTrainedConfig, PreTrainedModel

from ...config.model_arguments import ModelArguments
from ...config.student_cut import LayerChoice, parse_student_layers
from ...utils.errors import BadRequest
from ..layers import config_layers, find_blocks, number_of_layers
from .importance import block_influence
from .search import Removal, search_layers
from .skipping import skipped
from .text import Batch
from .width import Width, activities, config_heads, feed_forward_size, head_groups_of, most_active, neurons_of


@dataclass(frozen=True)
class CutRequest:
    """How much of a teacher a student shall be."""

    layers: int
    """Blocks that are kept."""
    choice: LayerChoice
    """Which: `importance`, `uniform`, or their numbers, counted from 0."""
    importance: Literal["search", "block_influence"] = "search"
    intermediate_size: int | None = None
    """Neurons of each feed-forward block that are kept; None for all."""
    num_attention_heads: int | None = None
    """Attention heads that are kept; None for all."""

    def reads_text(self, teacher_layers: int) -> bool:
        """Whether the choice depends on what a teacher of so many layers makes of some text."""
        cuts_width = self.intermediate_size is not None or self.num_attention_heads is not None
        return cuts_width or (self.choice == "importance" and self.layers < teacher_layers)


@dataclass(frozen=True)
class Cut:
    """What of a teacher a student is made of."""

    method: str
    """How its blocks were chosen: `search`, `block_influence`, `uniform`, `list`, or `all` where none is left out."""
    teacher_layers: int
    kept: list[int]
    """Blocks of the teacher, counted from 0, in their order."""
    importance: list[float] | None = None
    """Block influence of each of the teacher's blocks; None where it was not measured."""
    removals: list[Removal] = field(default_factory=list)
    """What the search left out, in its order, with the loss after it."""
    neurons: list[list[int]] | None = None
    """Neurons of each kept block that are kept; None for all."""
    head_groups: list[list[int]] | None = None
    """Groups of attention heads with one key and value head, likewise."""

    @property
    def removed(self) -> list[int]:
        """Blocks of the teacher that the student lacks."""
        return sorted(set(range(self.teacher_layers)) - set(self.kept))

    @property
    def inherited_layers(self) -> list[int]:
        """For each layer of the student the teacher's layer that it came from, both counted from 1."""
        return [block + 1 for block in self.kept]

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left out."""
        return not self.removed and self.neurons is None and self.head_groups is None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types; the neurons, or groups of heads, of a block are the bits of one hexadecimal number."""
        found = asdict(self)
        for name in ("neurons", "head_groups"):
            found[name] = found[name] and [hex(sum(1 << entry for entry in kept)) for kept in found[name]]
        return found

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Cut":
        """The cut that `to_dict` has written; what is not known here is left out."""
        found = {entry.name: content[entry.name] for entry in fields(cls) if entry.name in content}
        found["removals"] = [Removal(**removal) for removal in found.get("removals", [])]
        for name in ("neurons", "head_groups"):
            if found.get(name) is not None:
                numbers = [int(text, 16) for text in found[name]]
                found[name] = [[bit for bit in range(one.bit_length()) if one >> bit & 1] for one in numbers]
        return cls(**found)


def evenly_spaced(depth: int, count: int) -> list[int]:
    """`count` of `depth` blocks, evenly spaced, the first and the last among them; the first alone where it is one."""
    return [round(index * (depth - 1) / max(count - 1, 1)) for index in range(count)]


def cut_request(
    arguments: ModelArguments, teacher: PreTrainedConfig, student: PreTrainedConfig | None = None
) -> CutRequest:
    """What the arguments ask for of a teacher.

    Args:
        arguments: of a student that `is_cut`.
        teacher: its config.
        student: the config that gives the student's depth, where one is named.

    Raises:
        BadRequest: if the teacher has no such layers, neurons or heads.
    """
    choice, depth = parse_student_layers(arguments.student_layers), config_layers(teacher)
    if student is not None:
        count, asked = config_layers(student), "the student's config"
    elif isinstance(choice, list):
        count, asked = len(choice), "student_layers"
    else:
        count, asked = arguments.student_num_layers or depth, "student_num_layers"
    if isinstance(choice, list) and choice[-1] >= depth:
        raise BadRequest(
            f"student_layers names block {choice[-1]}, but the teacher has the blocks 0 to {depth - 1};",
            "write some of these.",
        )
    if isinstance(choice, list) and len(choice) != count:
        raise BadRequest(
            f"student_layers names {len(choice)} blocks, but {asked} has {count} layers;", "let them agree."
        )
    if count > depth:
        raise BadRequest(
            f"{asked} asks for {count} layers, but the teacher, whose layers they are, has {depth};",
            f"write {depth - 1} or less.",
        )
    neurons, heads = arguments.student_intermediate_size, arguments.student_num_attention_heads
    request = CutRequest(count, choice, arguments.student_layer_importance, neurons, heads)
    _check_width(request, teacher)
    as_wide = neurons == feed_forward_size(teacher), heads == config_heads(teacher)[0]
    return replace(
        request,
        intermediate_size=None if as_wide[0] else neurons,
        num_attention_heads=None if as_wide[1] else heads,
    )


def _check_width(request: CutRequest, teacher: PreTrainedConfig) -> None:
    """Make sure that a teacher is at least as wide as asked for. Raises `BadRequest` if it is not."""
    if (neurons := request.intermediate_size) is not None and neurons > (most := feed_forward_size(teacher)):
        raise BadRequest(
            f"student_intermediate_size is {neurons}, but the teacher's feed-forward blocks have {most} neurons;",
            f"write less than {most}.",
        )
    if (heads := request.num_attention_heads) is not None:
        most, group, _ = config_heads(teacher)
        if heads > most or heads % group:
            sizes = ", ".join(str(size) for size in range(group, most + 1, group))
            shared = "" if group == 1 else f", of which each {group} share a key and a value"
            raise BadRequest(
                f"student_num_attention_heads is {heads}, but the teacher has {most} attention heads{shared};",
                f"write one of {sizes}.",
            )


def choose_cut(teacher: PreTrainedModel, request: CutRequest, batches: Sequence[Batch]) -> Cut:
    """Decide what a student keeps of a teacher.

    Args:
        teacher: a causal language model, which may be quantised; it is left in the mode it came in.
        request: what is asked for.
        batches: of a collator, of the text that importance is measured on; read only where the request `reads_text`.

    Raises:
        BadRequest: if the model cannot be cut so.
    """
    depth = number_of_layers(teacher)
    importance, removals, method = None, [], "uniform"
    if isinstance(request.choice, list):
        kept, method = request.choice, "list"
    elif request.layers == depth:
        kept, method = list(range(depth)), "all"
    elif request.choice == "uniform":
        kept = evenly_spaced(depth, request.layers)
    else:
        importance, method = block_influence(teacher, batches), request.importance
        if request.importance == "search":
            removals = search_layers(teacher, batches, request.layers)
            kept = sorted(set(range(depth)) - {removal.block for removal in removals})
        else:
            kept = most_important(importance, request.layers)
    neurons, groups = _choose_width(teacher, request, kept, batches)
    return Cut(method, depth, list(kept), importance, removals, neurons, groups)


def most_important(importance: Sequence[float], keep: int) -> list[int]:
    """The `keep` blocks of the highest importance, in their own order; of equal ones the earlier."""
    order = sorted(range(len(importance)), key=lambda block: -importance[block])
    return sorted(order[:keep])


def _choose_width(
    teacher: PreTrainedModel, request: CutRequest, kept: Sequence[int], batches: Sequence[Batch]
) -> tuple[list[list[int]] | None, list[list[int]] | None]:
    """The neurons and the groups of heads of each kept block that are kept, measured without the other blocks."""
    widths = cut_widths(teacher, request, kept)
    if not widths:
        return None, None
    with skipped(teacher, set(range(number_of_layers(teacher))) - set(kept)):
        found = activities(teacher, [width for width, _ in widths], batches)
    chosen = {width.what: most_active(own, keep) for (width, keep), own in zip(widths, found, strict=True)}
    return chosen.get("neurons"), chosen.get("heads")


def cut_widths(teacher: PreTrainedModel, request: CutRequest, kept: Sequence[int]) -> list[tuple[Width, int]]:
    """The widths of the kept blocks that are cut, each with how many are kept. Raises `BadRequest` as `neurons_of`."""
    if request.intermediate_size is None and request.num_attention_heads is None:
        return []
    blocks = find_blocks(teacher)
    own, found = [blocks[number] for number in kept], []
    if request.intermediate_size is not None:
        found.append((neurons_of(teacher.config, own), request.intermediate_size))
    if request.num_attention_heads is not None:
        group = config_heads(teacher.config)[1]
        found.append((head_groups_of(teacher.config, own), request.num_attention_heads // group))
    return found


def planned_cut(request: CutRequest, teacher: PreTrainedConfig) -> Cut:
    """A cut of the size asked for, made without text: where that would choose, evenly spaced and first parts stand in.

    It tells what such a student needs, and whether the family can be cut so.
    """
    depth = config_layers(teacher)
    kept, method = evenly_spaced(depth, request.layers), "all" if request.layers == depth else "uniform"
    if isinstance(request.choice, list):
        kept, method = request.choice, "list"
    neurons, heads = request.intermediate_size, request.num_attention_heads
    return Cut(
        method,
        depth,
        list(kept),
        neurons=None if neurons is None else [list(range(neurons))] * len(kept),
        head_groups=None if heads is None else [list(range(heads // config_heads(teacher)[1]))] * len(kept),
    )
