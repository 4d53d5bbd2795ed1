"""What a user can ask for: three dataclasses and every check on them that needs no model.

`TrainingArguments` fields keep their names and meaning; only the defaults listed in `KavaTrainingArguments` differ.
"""

import json
import os
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from transformers import TrainingArguments

QUICKSTART = "quickstart"
"""The name that stands for the embedded teacher, student and data set wherever one of them is named."""

LayerMapping = Literal["last", "all"] | int | list[tuple[int, int]]
"""A parsed `layer_mapping`: a whole number k stands for `uniform:k`, a list holds (student, teacher) pairs."""


def parse_layer_mapping(text: str) -> LayerMapping:
    """Read `layer_mapping` without knowing the models.

    Args:
        text: `last`, `all`, `uniform:k`, or a JSON list of [student layer, teacher layer] pairs, counted from 1.

    Raises:
        ValueError: if the text is none of these. Layer 0, the embeddings, is never accepted.
    """
    if text in ("last", "all"):
        return text
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


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class ModelArguments:
    """Which teacher and which student."""

    teacher_model_name_or_path: str | None = field(
        default=None, metadata=_help("Hub id or local folder of the teacher, or 'quickstart'.")
    )
    teacher_revision: str | None = field(default=None, metadata=_help("Hub revision of the teacher."))
    teacher_quantization: Literal["none", "8bit", "4bit"] = field(
        default="none",
        metadata=_help("Load the teacher as it is, in 8 bit, or in 4 bit (NF4, double quantisation, bf16 compute)."),
    )
    teacher_dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", metadata=_help("Data type of the teacher's weights; auto takes the checkpoint's own.")
    )
    student_model_name_or_path: str | None = field(
        default=None, metadata=_help("Hub id or local folder of the student, or 'quickstart'.")
    )
    student_revision: str | None = field(default=None, metadata=_help("Hub revision of the student."))
    student_config_name: str | None = field(
        default=None,
        metadata=_help(
            "Hub id, folder or JSON file of a config: the student starts from random weights of that shape."
        ),
    )
    student_init: Literal["pretrained", "random", "teacher_layers"] = field(
        default="pretrained",
        metadata=_help(
            "Start from the student's own weights, from random ones, or from evenly spaced layers of the teacher "
            "(their widths must agree)."
        ),
    )
    student_dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", metadata=_help("Data type of the student's weights; auto takes the checkpoint's own.")
    )
    attn_implementation: str | None = field(
        default=None, metadata=_help("Attention of both models: eager, sdpa, flash_attention_2, ...")
    )
    trust_remote_code: bool = field(
        default=False, metadata=_help("Run code that a model repository brings along. Only for sources you trust.")
    )

    def __post_init__(self) -> None:
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
        if self.student_model_name_or_path and self.student_config_name:
            found.append("student_model_name_or_path and student_config_name exclude each other; keep one of them.")
        return found


@dataclass
class DataArguments:
    """Which examples."""

    dataset_name: str | None = field(
        default=None,
        metadata=_help("Hub id, a folder, a jsonl, json, csv, parquet or arrow file, or 'quickstart'."),
    )
    dataset_config_name: str | None = field(default=None, metadata=_help("Configuration of a hub data set."))
    dataset_train_split: str = field(default="train", metadata=_help("Split to train on."))
    dataset_test_split: str | None = field(
        default=None,
        metadata=_help(
            "Split to evaluate on; by default test, else validation, else a held-out part of the training split."
        ),
    )
    max_length: int = field(default=512, metadata=_help("Longest example in tokens; longer ones are cut and counted."))
    max_train_samples: int | None = field(default=None, metadata=_help("Use only the first so many examples."))
    max_eval_samples: int | None = field(default=None, metadata=_help("Evaluate on only the first so many examples."))

    def problems(self) -> list[str]:
        """One sentence for each mistake; empty when there is none."""
        found = []
        if not self.dataset_name:
            found.append("dataset_name is missing; write a hub id, a local file or folder, or 'quickstart'.")
        if self.max_length < 2:
            found.append(f"max_length is {self.max_length}; an example needs at least 2 tokens.")
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                found.append(f"{name} is {value}; write a whole number above 0, or leave it out for all examples.")
        return found


_NOT_NEGATIVE = (
    "mercator_alpha", "mercator_beta", "mercator_weight", "mse_weight", "lm_weight", "kd_weight", "anchor_weight",
    "projector_learning_rate", "learning_rate", "seed",
)  # fmt: skip
_AT_LEAST_ONE = (
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "calibration_tokens",
)  # fmt: skip


@dataclass
class KavaTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` plus the arguments of the distillation.

    Defaults that differ from `TrainingArguments` are those of the home case: Qwen2.5-1.5B to 0.5B on GSM8K. Those of
    the alignment are what did best without harm to a student trained before, see `docs/effectiveness.md`.
    """

    output_dir: str | None = field(default="checkpoints", metadata=_help("Where checkpoints and projectors go."))
    per_device_train_batch_size: int = field(default=2, metadata=_help("Examples in one micro-batch on one device."))
    gradient_accumulation_steps: int = field(default=16, metadata=_help("Micro-batches in one optimizer step."))
    num_train_epochs: float = field(default=1.0, metadata=_help("Passes over the training data."))
    save_steps: float = field(default=200, metadata=_help("Optimizer steps between two saves."))
    logging_steps: float = field(default=50, metadata=_help("Optimizer steps between two status lines."))
    resume_from_checkpoint: str | None = field(
        default=None, metadata=_help("A checkpoint folder, or true for the newest one in output_dir.")
    )

    mercator_alpha: float = field(default=1.0, metadata=_help("Weight of the direction inside the Mercator loss."))
    mercator_beta: float = field(default=0.01, metadata=_help("Weight of the log-magnitude in the Mercator loss."))
    mercator_weight: float = field(default=3.0, metadata=_help("Weight of the Mercator loss; 0 turns it off."))
    lm_weight: float = field(
        default=1.0, metadata=_help("Weight of the next-token loss on the answers; 0 turns it off.")
    )
    kd_weight: float = field(
        default=0.0,
        metadata=_help("Weight of the divergence from the teacher's next-token distribution on the answers."),
    )
    kd_temperature: float = field(
        default=1.0, metadata=_help("Temperature of both distributions in that divergence, above 0.")
    )
    kd_beta: float = field(
        default=0.0,
        metadata=_help("Kind of that divergence: 0 forward KL, 1 reverse KL, between them generalised Jensen-Shannon."),
    )
    mse_weight: float = field(
        default=0.0,
        metadata=_help("Weight of the squared difference of the aligned states; 0.2 beside mercator_weight 0.8."),
    )
    anchor_weight: float = field(
        default=1.0, metadata=_help("Weight of the reconstruction error where projector_anchor is reconstruction.")
    )
    alignment_schedule: Literal["constant", "linear", "cosine"] = field(
        default="constant",
        metadata=_help(
            "What becomes of mercator_weight and mse_weight over the run: they stay, or fall towards 0 at its end."
        ),
    )
    layer_mapping: str = field(
        default="last",
        metadata=_help("Layers to align: last, uniform:k, all, or pairs such as [[12, 14], [24, 28]]."),
    )
    layer_weights: list[float] | None = field(
        default=None,
        metadata=_help("Weight of each aligned pair, such as [1, 3]; equal by default. Their proportions count."),
    )
    projector_direction: Literal["teacher_to_student", "student_to_teacher"] = field(
        default="student_to_teacher",
        metadata=_help(
            "Project the teacher's states into the student's space, or the student's into the teacher's, where the "
            "teacher's own states are a target that cannot move."
        ),
    )
    projector_anchor: Literal["none", "pca", "reconstruction"] = field(
        default="none",
        metadata=_help(
            "What keeps a teacher_to_student projector from collapsing: nothing, a frozen principal subspace of the "
            "teacher's states, or a decoder that rebuilds them."
        ),
    )
    projector_init: Literal["random", "least_squares"] = field(
        default="least_squares",
        metadata=_help(
            "Start the projector from random weights, or from the least squares fit to the other side on some "
            "training examples (with the pca anchor: turn its axes towards the student's states)."
        ),
    )
    calibration_tokens: int = field(
        default=32_768,
        metadata=_help("Training tokens that the pca anchor and the least_squares start are computed from."),
    )
    projector_mlp_ratio: float = field(
        default=1.0, metadata=_help("Width of the projector's hidden layer as a multiple of its input's width.")
    )
    projector_dropout: float = field(default=0.1, metadata=_help("Dropout inside the projector, from 0 to below 1."))
    projector_learning_rate: float = field(default=1e-3, metadata=_help("Learning rate of the projector alone."))
    run_control: bool = field(
        default=False,
        metadata=_help(
            "Afterwards train a second student from the same start on the same data with the next-token loss alone."
        ),
    )
    evaluate_generation: bool = field(
        default=False,
        metadata=_help("Also let teacher and student answer the evaluation problems and count exact matches."),
    )
    generation_max_new_tokens: int | None = field(
        default=None, metadata=_help("Longest generated answer; by default twice the longest reference answer.")
    )
    final_dir: str | None = field(
        default=None, metadata=_help("Where final_student and final_projector.pth go; output_dir by default.")
    )
    plain_output: bool = field(default=False, metadata=_help("No emoji and no progress bars."))

    def __post_init__(self) -> None:
        if isinstance(self.layer_mapping, (list, tuple)):
            self.layer_mapping = json.dumps(self.layer_mapping)
        found = self.problems()
        try:
            super().__post_init__()
        except (ValueError, ImportError) as error:
            found.append(str(error))
        if found:
            raise ValueError("\n".join(found))
        self.dataloader_pin_memory &= self.device.type != "cpu"
        if self.final_dir is None:
            self.final_dir = self.output_dir

    @property
    def aligns(self) -> bool:
        """Whether any term compares hidden states."""
        return self.mercator_weight > 0 or self.mse_weight > 0

    @property
    def calibrates(self) -> bool:
        """Whether the projectors start from a calibration pass."""
        return self.aligns and (self.projector_anchor == "pca" or self.projector_init == "least_squares")

    def _not_supported(self) -> list[tuple[str, str]]:
        """What `TrainingArguments` offers and KAVA would not really do, with what to use instead."""

        def launched(engine: str) -> bool:
            return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"

        config = self.accelerator_config
        dispatches = config.get("dispatch_batches") if isinstance(config, dict) else False
        offers = [
            ("fsdp", self.fsdp or launched("FSDP"), "start several processes without it (DDP)"),
            ("deepspeed", self.deepspeed or launched("DEEPSPEED"), "start several processes without it (DDP)"),
            ("accelerator_config.dispatch_batches", dispatches, "leave it out"),
        ]
        return [(name, instead) for name, value, instead in offers if value]

    def problems(self) -> list[str]:
        """One sentence for each mistake in the distillation's own arguments; empty when there is none."""
        found = [f"{n} is {getattr(self, n)}; it cannot be negative." for n in _NOT_NEGATIVE if getattr(self, n) < 0]
        found += [f"{name} is not supported yet; {instead}." for name, instead in self._not_supported()]
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            found.append(f"num_train_epochs is {self.num_train_epochs}; write a number above 0, or set max_steps.")
        found += [f"{n} is {getattr(self, n)}; write 1 or more." for n in _AT_LEAST_ONE if getattr(self, n) < 1]
        if not self.aligns and self.lm_weight == 0 and self.kd_weight == 0:
            found.append("mercator_weight, mse_weight, lm_weight and kd_weight are all 0: nothing would be trained.")
        if self.kd_temperature <= 0:
            found.append(f"kd_temperature is {self.kd_temperature}; write a number above 0, such as 1.0.")
        if not 0 <= self.kd_beta <= 1:
            found.append(f"kd_beta is {self.kd_beta}; write a number from 0 to 1.")
        found += [*self._projector_problems(), *self._control_problems()]
        if self.generation_max_new_tokens is not None and self.generation_max_new_tokens < 1:
            found.append(f"generation_max_new_tokens is {self.generation_max_new_tokens}; write 1 or more.")
        return found

    def _control_problems(self) -> list[str]:
        if not self.run_control:
            return []
        found = []
        if not self.aligns and self.kd_weight == 0:
            found.append("run_control is true, but the run itself has the next-token loss alone; write false.")
        unrepeatable = {"lr_scheduler_type": "reduce_lr_on_plateau", "train_sampling_strategy": "group_by_length"}
        for name in (name for name, value in unrepeatable.items() if getattr(self, name) == value):
            found.append(f"run_control cannot repeat {name} {unrepeatable[name]}; write another, or run_control false.")
        return found

    def _projector_problems(self) -> list[str]:
        found = []
        if self.projector_mlp_ratio <= 0:
            found.append(f"projector_mlp_ratio is {self.projector_mlp_ratio}; write a number above 0, such as 1.0.")
        if not 0 <= self.projector_dropout < 1:
            found.append(f"projector_dropout is {self.projector_dropout}; write a number from 0 to below 1.")
        if self.projector_direction == "student_to_teacher" and self.projector_anchor != "none":
            found.append(
                f"projector_anchor {self.projector_anchor} holds a projector of the teacher's states, but "
                "projector_direction student_to_teacher has none; its target cannot collapse. Write none."
            )
        if self.projector_anchor == "reconstruction" and self.anchor_weight == 0:
            found.append("anchor_weight is 0, so projector_anchor reconstruction would hold nothing; raise it.")
        if self.layer_weights is not None and not (self.layer_weights and min(self.layer_weights) > 0):
            found.append(f"layer_weights is {self.layer_weights}; write one number above 0 for each pair of layers.")
        try:
            parse_layer_mapping(self.layer_mapping)
        except ValueError as error:
            found.append(str(error))
        return found


@dataclass
class KavaArguments:
    """All that one run was asked for."""

    model: ModelArguments
    data: DataArguments
    training: KavaTrainingArguments

    def to_dict(self) -> dict[str, Any]:
        """Every argument with its value, secrets masked, ready for JSON."""
        own = {f.name: getattr(part, f.name) for part in (self.model, self.data) for f in fields(part)}
        return {**own, **self.training.to_dict()}
