"""Teacher and student of a run, and their tokenizers."""

from dataclasses import dataclass, field

import datasets
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ...config.alignment.teachers import other_teachers
from ...config.arguments import KavaArguments
from ...data.collators import DistillationCollator
from ...data.streaming import ExampleStream
from ...data.token_alignment.pair_encoder import Readings
from ...distillation.teachers.several import role_of
from ...models.layers import hidden_size, number_of_layers
from ...models.lora import trained_parameters
from ...models.pruning.cut import Cut
from ...models.sharding.choice import choose_holding
from ...models.sizes import parameter_count
from ...models.student import load_student
from ...models.teacher import load_teacher
from ...utils.console import Console
from ...utils.progress_bar import working
from .choice import find_cut
from .held import describe_holding
from .tokenizers import check_role_reads, teacher_readings

_BESIDE = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "modules_to_save"}
"""Parts of the names of parameters that peft adds to a model's own."""


@dataclass
class Models:
    """The pair and their tokenizers."""

    teacher: PreTrainedModel
    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    """The student's."""
    cut: Cut | None = None
    """What the student was made of, where it was cut out of the teacher."""
    chosen_layers: list[int] | None = None
    """The teacher's layer for each of the student's, where `layer_mapping` cka chose them."""
    readings: Readings = field(default_factory=dict)
    """How those teachers read whose tokens are others."""
    others: list[PreTrainedModel] = field(default_factory=list)
    """The teachers behind the first one, where there are several."""

    @property
    def teachers(self) -> list[PreTrainedModel]:
        """All of them."""
        return [self.teacher, *self.others]

    @property
    def by_role(self) -> dict[str, PreTrainedModel]:
        """All models by what they are called."""
        return {**{role_of(number): own for number, own in enumerate(self.teachers)}, "student": self.student}

    def tokenizer_of(self, role: str) -> PreTrainedTokenizerBase:
        """What the teacher reads with where `role` is `teacher`, else what the student does."""
        own = self.readings.get(0) if role == "teacher" else None
        return self.tokenizer if own is None else own.tokenizer

    @property
    def teacher_tokenizers(self) -> list[PreTrainedTokenizerBase] | None:
        """What each teacher reads with; None where all read the student's tokens."""
        if not self.readings:
            return None
        found = (self.readings.get(number) for number in range(len(self.teachers)))
        return [self.tokenizer if own is None else own.tokenizer for own in found]

    @property
    def inherited_layers(self) -> list[int] | None:
        """`chosen_layers`, else see `Cut.inherited_layers`; None for a student that was not cut out of the teacher."""
        if self.chosen_layers is not None:
            return self.chosen_layers
        return None if self.cut is None else self.cut.inherited_layers


def own_parameters(student: PreTrainedModel) -> int:
    """How many parameters a student has without its adapters, which are merged into it or left out in the end."""
    beside = (parameter for name, parameter in student.named_parameters() if _BESIDE & set(name.split(".")))
    return student.num_parameters() - sum(parameter.numel() for parameter in beside)


def _load_teachers(console: Console, arguments: KavaArguments) -> list[PreTrainedModel]:
    """All teachers, each whole on every process or spread over them; how each is held is decided before any is loaded.

    Raises:
        BadRequest: as `choose_holding` and `load_teacher`.
    """
    device, processes = arguments.training.device, arguments.training.world_size
    named = {role_of(number): own for number, own in enumerate([arguments.model, *other_teachers(arguments)])}
    held = {role: choose_holding(own, device, processes, role, fetch=True) for role, own in named.items()}
    for role, holding in held.items():
        for line in describe_holding(named[role], holding, role, processes, device.type):
            console.print(line)
    found = []
    for role, own in named.items():
        with working(f"Loading the {role}"):
            found.append(load_teacher(own, device, role, held[role].sharded))
    return found


def load_models(
    console: Console,
    arguments: KavaArguments,
    tokenizer: PreTrainedTokenizerBase,
    train: datasets.Dataset | ExampleStream | None = None,
    earlier: Cut | None = None,
) -> Models:
    """Teacher and student.

    Args:
        console: prints.
        arguments: which models.
        tokenizer: of both, or of the student.
        train: the training examples, which a student is cut out of its teacher by; only read for such a one.
        earlier: the cut that was chosen already, see `find_cut`.

    Raises:
        BadRequest: where one cannot be had, or does not fit tokenizer or lengths.
    """
    readings = teacher_readings(arguments, tokenizer)
    teacher, *others = _load_teachers(console, arguments)
    cut = find_cut(console, arguments, teacher, train, DistillationCollator(tokenizer), earlier)
    set_seed(arguments.training.seed)
    with working("Loading the student"):
        student = load_student(arguments.model, teacher, arguments.training.device, cut)
    teachers = [(role_of(number), own, readings.get(number)) for number, own in enumerate([teacher, *others])]
    for role, model, reading in (*teachers, ("student", student, None)):
        check_role_reads(model, role, tokenizer, arguments.data.max_length, reading)
        width, depth = hidden_size(model), number_of_layers(model)
        console.print(
            f"{role.capitalize()}: d_model={width}, {depth} layers, {parameter_count(model) / 1e6:.2f} M parameters, "
            f"{str(model.dtype).removeprefix('torch.')}"
        )
    if arguments.model.use_peft:
        trained = trained_parameters(student)
        console.print(f"LoRA: rank {arguments.model.lora_r}, {trained / 1e6:.2f} M parameters are trained")
    return Models(teacher, student, tokenizer, cut, readings=readings, others=others)
