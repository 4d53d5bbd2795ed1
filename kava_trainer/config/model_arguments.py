"""Which teacher and which student: what a user can ask for, and every check on it that needs no model."""

from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal, TypeVar, cast

from ..utils.errors import Problem
from ..utils.files import missing_path
from .student_cut import asked_to_cut, cut_problems, settle_student_layers

T = TypeVar("T")

QUICKSTART = "quickstart"
"""The name that stands for the embedded teacher, student and data set wherever one of them is named."""

ALL_LINEAR = "all-linear"
"""What stands for every linear layer but the vocabulary head, as in peft."""

LARGEST_RANK = 2**14
"""Of an adapter; more is the rank of any weight there is."""

_STARTS = {"random": "random weights", "teacher_layers": "layers of the teacher"}


def argument(default: T, effect: str, unit: str | None = None) -> T:
    """A field of a dataclass: its default, its effect as `--help` and `explain` tell it, and what its value counts."""
    told = Effect(effect)
    told.unit = unit
    return field(default=default, metadata={"help": told})


class Effect(str):
    """The effect of an argument in words. `HfArgumentParser` takes whatever stands beside it for its own."""

    unit: str | None = None


@dataclass
class ModelArguments:
    """Which teacher and which student."""

    teacher_model_name_or_path: str | None = argument(None, "Hub id or local folder of the teacher, or 'quickstart'.")
    teacher_revision: str | None = argument(None, "Hub revision of the teacher.")
    teacher_quantization: Literal["none", "8bit", "4bit"] = argument(
        "none", "Load the teacher as it is, in 8 bit, or in 4 bit (NF4, double quantisation, bf16 compute)."
    )
    teacher_dtype: Literal["auto", "float32", "bfloat16"] = argument(
        "auto", "Data type of the teacher's weights; auto takes the checkpoint's own."
    )
    teacher_sharding: Literal["auto", "none", "fsdp"] = argument(
        "auto",
        "Let every process hold the whole teacher (none), or spread it over them and gather it block by block (fsdp); "
        "auto spreads one that takes more than a quarter of a device where the student is spread too.",
    )
    student_model_name_or_path: str | None = argument(None, "Hub id or local folder of the student, or 'quickstart'.")
    student_revision: str | None = argument(None, "Hub revision of the student.")
    student_config_name: str | None = argument(
        None, "Hub id, folder or JSON file of a config: the student starts from random weights of that shape."
    )
    student_init: Literal["pretrained", "random", "teacher_layers"] = argument(
        "pretrained",
        "Start from the student's own weights, from random ones, or from layers of the teacher, which student_layers "
        "chooses.",
    )
    student_num_layers: int | None = argument(
        None, "Cut the student out of the teacher: keep so many of its layers. No student is named then.", unit="layers"
    )
    student_layers: str = argument(
        "importance",
        "Which layers of the teacher such a student keeps: the important ones (importance), evenly spaced ones "
        "(uniform), or blocks counted from 0, such as [0, 1, 4].",
    )
    student_layer_importance: Literal["search", "block_influence"] = argument(
        "search",
        "What is important: search removes, one by one, the block without which the next-token loss on some training "
        "examples is lowest; block_influence, which is faster, those that change their input's direction least.",
    )
    student_intermediate_size: int | None = argument(
        None,
        "Neurons that such a student keeps in each feed-forward block, the most active ones; all by default.",
        unit="neurons",
    )
    student_num_attention_heads: int | None = argument(
        None,
        "Attention heads that such a student keeps in each layer, the most active ones, together with the heads that "
        "share their keys and values; all by default.",
        unit="heads",
    )
    student_dtype: Literal["auto", "float32", "bfloat16"] = argument(
        "auto", "Data type of the student's weights; auto takes the checkpoint's own."
    )
    attn_implementation: str | None = argument(None, "Attention of both models: eager, sdpa, flash_attention_2, ...")
    trust_remote_code: bool = argument(
        False, "Run code that a model repository brings along. Only for sources you trust."
    )
    use_peft: bool = argument(False, "Train LoRA adapters on the student and leave its own weights as they are.")
    student_quantization: Literal["none", "8bit", "4bit"] = argument(
        "none", "Load the student as teacher_quantization does the teacher, to train adapters on it."
    )
    lora_r: int = argument(16, "Rank of the adapters.")
    lora_alpha: int = argument(32, "What adapters add is multiplied by lora_alpha / lora_r; twice the rank is usual.")
    lora_dropout: float = argument(
        0.05, "Dropout before the adapters, from 0 to below 1.", unit="share from 0 to below 1"
    )
    lora_target_modules: list[str] | str = argument(
        ALL_LINEAR,
        "Modules that get an adapter, such as q_proj,v_proj; all-linear for every linear layer but the head.",
    )
    lora_modules_to_save: list[str] | str = field(
        default_factory=list,
        metadata={"help": "Modules that are trained whole beside the adapters, such as lm_head; none by default."},
    )
    merge_adapter: bool = argument(
        True,
        "Export the student as a plain model with its adapters merged into it, or, with false, the adapters alone.",
    )

    def __post_init__(self) -> None:
        self.lora_dropout = float(self.lora_dropout)  # JSON writes 0 for 0.0
        targets = _names(self.lora_target_modules)
        self.lora_target_modules = ALL_LINEAR if targets == [ALL_LINEAR] else targets
        self.lora_modules_to_save = _names(self.lora_modules_to_save)
        if self.student_init == "pretrained" and (
            self.student_config_name or self.student_model_name_or_path == QUICKSTART
        ):
            self.student_init = "random"
        self.student_layers = settle_student_layers(self.student_layers)
        named = self.student_model_name_or_path or self.student_config_name
        if self.student_init == "pretrained" and not named and asked_to_cut(self):
            self.student_init = "teacher_layers"

    def problems(self) -> Iterator[Problem]:
        """Every mistake."""
        if not self.teacher_model_name_or_path:
            name, remedy = "teacher_model_name_or_path", "write a hub id, a local folder or 'quickstart'."
            yield Problem(name, f"{name} is missing;", remedy)
        cut = list(cut_problems(self))
        if not (self.student_model_name_or_path or self.student_config_name or self.is_cut or cut):
            remedy = (
                "write student_model_name_or_path, student_num_layers to cut it out of the teacher, or "
                "student_config_name for random weights."
            )
            yield Problem(None, "The student is missing;", remedy)
        for name in ("teacher_model_name_or_path", "student_model_name_or_path", "student_config_name"):
            if problem := missing_path(name, getattr(self, name)):
                yield problem
        if self.student_model_name_or_path and self.student_config_name:
            what = "student_model_name_or_path and student_config_name exclude each other;"
            yield Problem("student_model_name_or_path", what, "keep one of them.")
        yield from cut
        yield from self._sharding_problems()
        yield from self._adapter_problems() if self.use_peft else self._problems_without_adapter()

    @property
    def teacher_name(self) -> str:
        """What the teacher is loaded from."""
        return cast(str, self.teacher_model_name_or_path)

    @property
    def student_name(self) -> str:
        """What the student or, where it has no weights of its own, its config is loaded from; else the teacher."""
        return cast(str, self.student_model_name_or_path or self.student_config_name or self.teacher_model_name_or_path)

    @property
    def is_cut(self) -> bool:
        """Whether the student is cut out of the teacher."""
        return self.student_init == "teacher_layers"

    @property
    def exports_adapter(self) -> bool:
        """Whether the finished student is its adapters alone."""
        return self.use_peft and not self.merge_adapter

    def _sharding_problems(self) -> Iterator[Problem]:
        if self.teacher_sharding != "fsdp":
            return
        if self.teacher_quantization != "none":
            kind = self.teacher_quantization
            what = f"teacher_sharding fsdp spreads plain weights, and teacher_quantization is {kind};"
            yield Problem("teacher_sharding", what, "write teacher_sharding none, or teacher_quantization none.")
        if self.is_cut:
            what = "teacher_sharding is fsdp, but the student is cut out of the teacher, which needs it whole;"
            yield Problem("teacher_sharding", what, "write none.")

    def _problems_without_adapter(self) -> Iterator[Problem]:
        if self.student_quantization != "none":
            yield Problem(
                "student_quantization",
                f"student_quantization {self.student_quantization} leaves weights that cannot be trained themselves;",
                "write use_peft true to train adapters on them, or student_quantization none.",
            )
        own = [f for f in fields(self) if f.name.startswith("lora_") or f.name == "merge_adapter"]
        if given := [f.name for f in own if getattr(self, f.name) != _default(f)]:
            what = f"{', '.join(given)} {'is' if len(given) == 1 else 'are'} given, but use_peft is false;"
            yield Problem(given[0], what, "write use_peft true, or leave out both.")

    def _adapter_problems(self) -> Iterator[Problem]:
        if not 1 <= self.lora_r <= LARGEST_RANK:
            yield Problem.of_value("lora_r", self.lora_r, f"write a whole number from 1 to {LARGEST_RANK}, such as 16.")
        if self.lora_alpha < 1:
            yield Problem.of_value("lora_alpha", self.lora_alpha, "write 1 or more, such as 32.")
        if not 0 <= self.lora_dropout < 1:
            yield Problem.of_value("lora_dropout", self.lora_dropout, "write a number from 0 to below 1.")
        targets = self.lora_target_modules
        if not targets or (ALL_LINEAR in targets and targets != ALL_LINEAR):
            yield Problem.of_value("lora_target_modules", targets, f"write {ALL_LINEAR} alone, or the modules' names.")
        if self.student_init == "pretrained":
            return
        start = _STARTS[self.student_init]
        if self.student_quantization != "none":
            what = (
                f"student_quantization {self.student_quantization} is for a student with weights of its own, but this "
                f"one starts from {start};"
            )
            yield Problem("student_quantization", what, "write none.")
        if not self.merge_adapter:
            what = (
                f"merge_adapter is false, but the student starts from {start}, which nobody could load again to put "
                "the adapters on;"
            )
            yield Problem("merge_adapter", what, "write merge_adapter true.")


def _names(value: list[str] | str) -> list[str]:
    """A list of names as it is, or in one text with commas between them."""
    parts = [value] if isinstance(value, str) else value
    return [name.strip() for part in parts for name in part.split(",") if name.strip()]


def _default(entry: Field[Any]) -> Any:
    return cast(Any, entry.default_factory)() if entry.default is MISSING else entry.default
