"""Which teacher, which student, which examples: what a user can ask for, and every check on it that needs no model."""

from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal, cast

from ..utils.files import missing_path

QUICKSTART = "quickstart"
"""The name that stands for the embedded teacher, student and data set wherever one of them is named."""

ALL_LINEAR = "all-linear"
"""What stands for every linear layer but the vocabulary head, as in peft."""

LARGEST_RANK = 2**14
"""Of an adapter; more is the rank of any weight there is."""

_STARTS = {"random": "random weights", "teacher_layers": "layers of the teacher"}


def help_text(text: str, unit: str | None = None) -> dict[str, str]:
    """Metadata of an argument: its effect, as `--help` and `explain` tell it.

    Args:
        text: one or more sentences.
        unit: what the value counts or is a share of, such as `tokens`; None for a plain number and for no number.
    """
    return {"help": text} if unit is None else {"help": text, "unit": unit}


@dataclass
class ModelArguments:
    """Which teacher and which student."""

    teacher_model_name_or_path: str | None = field(
        default=None, metadata=help_text("Hub id or local folder of the teacher, or 'quickstart'.")
    )
    teacher_revision: str | None = field(default=None, metadata=help_text("Hub revision of the teacher."))
    teacher_quantization: Literal["none", "8bit", "4bit"] = field(
        default="none",
        metadata=help_text(
            "Load the teacher as it is, in 8 bit, or in 4 bit (NF4, double quantisation, bf16 compute)."
        ),
    )
    teacher_dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", metadata=help_text("Data type of the teacher's weights; auto takes the checkpoint's own.")
    )
    student_model_name_or_path: str | None = field(
        default=None, metadata=help_text("Hub id or local folder of the student, or 'quickstart'.")
    )
    student_revision: str | None = field(default=None, metadata=help_text("Hub revision of the student."))
    student_config_name: str | None = field(
        default=None,
        metadata=help_text(
            "Hub id, folder or JSON file of a config: the student starts from random weights of that shape."
        ),
    )
    student_init: Literal["pretrained", "random", "teacher_layers"] = field(
        default="pretrained",
        metadata=help_text(
            "Start from the student's own weights, from random ones, or from evenly spaced layers of the teacher "
            "(their widths must agree)."
        ),
    )
    student_dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", metadata=help_text("Data type of the student's weights; auto takes the checkpoint's own.")
    )
    attn_implementation: str | None = field(
        default=None, metadata=help_text("Attention of both models: eager, sdpa, flash_attention_2, ...")
    )
    trust_remote_code: bool = field(
        default=False, metadata=help_text("Run code that a model repository brings along. Only for sources you trust.")
    )
    use_peft: bool = field(
        default=False, metadata=help_text("Train LoRA adapters on the student and leave its own weights as they are.")
    )
    student_quantization: Literal["none", "8bit", "4bit"] = field(
        default="none",
        metadata=help_text("Load the student as teacher_quantization does the teacher, to train adapters on it."),
    )
    lora_r: int = field(default=16, metadata=help_text("Rank of the adapters."))
    lora_alpha: int = field(
        default=32,
        metadata=help_text("What adapters add is multiplied by lora_alpha / lora_r; twice the rank is usual."),
    )
    lora_dropout: float = field(
        default=0.05,
        metadata=help_text("Dropout before the adapters, from 0 to below 1.", unit="share from 0 to below 1"),
    )
    lora_target_modules: list[str] | str = field(
        default=ALL_LINEAR,
        metadata=help_text(
            "Modules that get an adapter, such as q_proj,v_proj; all-linear for every linear layer but the head."
        ),
    )
    lora_modules_to_save: list[str] | str = field(
        default_factory=list,
        metadata=help_text("Modules that are trained whole beside the adapters, such as lm_head; none by default."),
    )
    merge_adapter: bool = field(
        default=True,
        metadata=help_text(
            "Export the student as a plain model with its adapters merged into it, or, with false, the adapters alone."
        ),
    )

    def __post_init__(self) -> None:
        targets = _names(self.lora_target_modules)
        self.lora_target_modules = ALL_LINEAR if targets == [ALL_LINEAR] else targets
        self.lora_modules_to_save = _names(self.lora_modules_to_save)
        if self.student_init == "pretrained" and (
            self.student_config_name or self.student_model_name_or_path == QUICKSTART
        ):
            self.student_init = "random"

    def problems(self) -> list[str]:
        """One sentence for each mistake; empty when there is none."""
        found = []
        if not self.teacher_model_name_or_path:
            found.append("teacher_model_name_or_path is missing; write a hub id, a local folder or 'quickstart'.")
        if not self.student_model_name_or_path and not self.student_config_name:
            found.append(
                "The student is missing; write student_model_name_or_path, or student_config_name for random weights."
            )
        for name in ("teacher_model_name_or_path", "student_model_name_or_path", "student_config_name"):
            found += filter(None, [missing_path(name, getattr(self, name))])
        if self.student_model_name_or_path and self.student_config_name:
            found.append("student_model_name_or_path and student_config_name exclude each other; keep one of them.")
        if self.student_init == "teacher_layers" and self.teacher_quantization != "none":
            found.append(
                "student_init teacher_layers needs the teacher's own weights; write teacher_quantization none."
            )
        return found + (self._adapter_problems() if self.use_peft else self._problems_without_adapter())

    @property
    def exports_adapter(self) -> bool:
        """Whether the finished student is its adapters alone."""
        return self.use_peft and not self.merge_adapter

    def _problems_without_adapter(self) -> list[str]:
        found = []
        if self.student_quantization != "none":
            found.append(
                f"student_quantization {self.student_quantization} leaves weights that cannot be trained themselves; "
                "write use_peft true to train adapters on them, or student_quantization none."
            )
        own = [f for f in fields(self) if f.name.startswith("lora_") or f.name == "merge_adapter"]
        if given := [f.name for f in own if getattr(self, f.name) != _default(f)]:
            be = "is" if len(given) == 1 else "are"
            found.append(
                f"{', '.join(given)} {be} given, but use_peft is false; write use_peft true, or leave out both."
            )
        return found

    def _adapter_problems(self) -> list[str]:
        found = []
        if not 1 <= self.lora_r <= LARGEST_RANK:
            found.append(f"lora_r is {self.lora_r}; write a whole number from 1 to {LARGEST_RANK}, such as 16.")
        if self.lora_alpha < 1:
            found.append(f"lora_alpha is {self.lora_alpha}; write 1 or more, such as 32.")
        if not 0 <= self.lora_dropout < 1:
            found.append(f"lora_dropout is {self.lora_dropout}; write a number from 0 to below 1.")
        if not self.lora_target_modules or (
            ALL_LINEAR in self.lora_target_modules and self.lora_target_modules != ALL_LINEAR
        ):
            found.append(
                f"lora_target_modules is {self.lora_target_modules}; write {ALL_LINEAR} alone, or the modules' names."
            )
        if self.student_init == "pretrained":
            return found
        start = _STARTS[self.student_init]
        if self.student_quantization != "none":
            found.append(
                f"student_quantization {self.student_quantization} is for a student with weights of its own, but this "
                f"one starts from {start}; write none."
            )
        if not self.merge_adapter:
            found.append(
                f"merge_adapter is false, but the student starts from {start}, which nobody could load again to put "
                "the adapters on; write merge_adapter true."
            )
        return found


def _names(value: list[str] | str) -> list[str]:
    """A list of names as it is, or in one text with commas between them."""
    parts = [value] if isinstance(value, str) else value
    return [name.strip() for part in parts for name in part.split(",") if name.strip()]


def _default(argument: Field[Any]) -> Any:
    return cast(Any, argument.default_factory)() if argument.default is MISSING else argument.default
