"""What a user can ask of the training, and every check on it that needs no model.

`TrainingArguments` fields keep their names and meaning; only the defaults listed in `KavaTrainingArguments` differ.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from ..utils.errors import Problem, WrongArguments, problems_of
from ..utils.redaction import is_secret_name, keep_secret, without_secrets
from .alignment.target_checks import implementation_problems, written_for_other_targets
from .alignment.teacher_arguments import SeveralTeachersArguments
from .alignment.teachers import list_as_text
from .checks import (
    accelerator_problems,
    is_aligned,
    is_fit,
    is_projected,
    precision_problem,
    settle_numbers,
    settle_rank,
    training_problems,
    usual_dropout,
)
from .data_arguments import DataArguments
from .launcher import device_problem, is_fsdp_asked, sharding_problems, teacher_sharding_problems
from .model_arguments import ModelArguments, argument
from .recipes import accelerate_config

LARGEST_MICRO_BATCH = 2**24
"""No device has the memory for more tokens, and working out how much is missing would take all of this machine's."""


@dataclass
class KavaTrainingArguments(SeveralTeachersArguments, TrainingArguments):
    """`transformers.TrainingArguments` plus the arguments of the distillation.

    Defaults that differ from `TrainingArguments` are those of the home case: Qwen2.5-1.5B to 0.5B on GSM8K. Those of
    the alignment are what did best without harm to a student trained before, see `docs/effectiveness.md`.
    """

    output_dir: str = argument("checkpoints", "Where checkpoints and projectors go.")
    per_device_train_batch_size: int = argument(2, "Examples in one micro-batch on one device.", unit="examples")
    gradient_accumulation_steps: int = argument(16, "Micro-batches in one optimizer step.", unit="micro-batches")
    num_train_epochs: float = argument(1.0, "Passes over the training data.", unit="epochs")
    save_steps: float = argument(200, "Optimizer steps between two saves.", unit="optimizer steps")
    logging_steps: float = argument(50, "Optimizer steps between two status lines.", unit="optimizer steps")
    resume_from_checkpoint: str | None = argument(
        None, "A checkpoint folder, or true for the newest one in output_dir."
    )

    mercator_alpha: float = argument(1.0, "Weight of the direction inside the Mercator loss.")
    mercator_beta: float = argument(0.01, "Weight of the log-magnitude in the Mercator loss.")
    mercator_weight: float = argument(3.0, "Weight of the Mercator loss; 0 turns it off.")
    lm_weight: float = argument(1.0, "Weight of the next-token loss; 0 turns it off.")
    lm_tokens: Literal["answers", "all"] = argument(
        "answers", "What the next-token loss is a mean over: the tokens of the answers, or all that follow another."
    )
    kd_weight: float = argument(0.0, "Weight of the divergence from the teacher's next-token distribution.")
    kd_tokens: Literal["answers", "all"] = argument(
        "answers", "What that divergence is a mean over: the tokens of the answers, or all that follow another."
    )
    kd_temperature: float = argument(1.0, "Temperature of both distributions in that divergence, above 0.")
    kd_beta: float = argument(
        0.0,
        "Kind of that divergence: 0 forward KL, 1 reverse KL, between them generalised Jensen-Shannon.",
        unit="share from 0 to 1",
    )
    mse_weight: float = argument(
        0.0, "Weight of the squared difference of the aligned states; 0.2 beside mercator_weight 0.8."
    )
    relative_mse_weight: float = argument(
        0.0, "Weight of the squared difference of the aligned states as a share of the target's squared length."
    )
    attention_weight: float = argument(
        1.0, "Weight of the divergence from the teacher's attention, where alignment_target is attention."
    )
    relations_weight: float = argument(
        3.0, "Weight of the squared difference of the similarities, where alignment_target is relations."
    )
    anchor_weight: float = argument(1.0, "Weight of the reconstruction error where projector_anchor is reconstruction.")
    alignment_schedule: Literal["constant", "linear", "cosine", "stage"] = argument(
        "constant",
        "What becomes of the weights of what is aligned (mercator_weight, mse_weight, relative_mse_weight, "
        "attention_weight, relations_weight) over the run: they stay, fall towards 0 at its end, or hold in its first "
        "half alone (stage).",
    )
    kd_schedule: Literal["constant", "linear", "cosine", "stage"] = argument(
        "constant",
        "What becomes of kd_weight over the run: it stays, rises from 0 to its full value at the end, or holds in the "
        "second half alone (stage). Beside the same alignment_schedule a run goes from states to logits.",
    )
    alignment_target: Literal["hidden", "kv", "attention", "relations"] = argument(
        "hidden",
        "What is aligned in the mapped layers: the hidden states or the keys and values that a cache would hold (kv), "
        "through projectors; or, without any, to which tokens of its example each token attends (attention), or how "
        "alike these are to each other (relations).",
    )
    kv_shape: Literal["flat", "headwise"] = argument(
        "flat",
        "With alignment_target kv the heads of all mapped layers, with layer_mapping all of all layers, end to end "
        "through one projector for keys and one for values; or head by head in each pair of layers (headwise).",
    )
    layer_mapping: str = argument(
        "last",
        "Layers to align: last, uniform:k, all, inherited (each with the teacher layer that the student was cut from), "
        "cka (each with the teacher layer whose states are most like its own, in order), or pairs such as "
        "[[12, 14], [24, 28]].",
    )
    layer_weights: list[float] | None = argument(
        None, "Weight of each aligned pair, such as [1, 3]; equal by default. Their proportions count."
    )
    projector_direction: Literal["teacher_to_student", "student_to_teacher", "none"] = argument(
        "student_to_teacher",
        "Project the teacher's states into the student's space, or the student's into the teacher's, where the "
        "teacher's own states are a target that cannot move; or none, where both are equally wide.",
    )
    projector_sharing: Literal["none", "all"] = argument(
        "none", "Give each pair of layers a projector of its own, or all of them one that they share."
    )
    projector_anchor: Literal["none", "pca", "reconstruction"] = argument(
        "none",
        "What keeps a teacher_to_student projector from collapsing: nothing, a frozen principal subspace of the "
        "teacher's states, or a decoder that rebuilds them.",
    )
    projector_rank: int | str | None = argument(
        None,
        "With the pca anchor a frozen bridge of so many dimensions: the teacher's states through their first principal "
        "axes, the student's through the least squares fit to these coordinates. auto takes the highest rank whose "
        "centred CosSim on held-back training examples is at least 0.9.",
        unit="dimensions",
    )
    projector_init: Literal["random", "least_squares"] = argument(
        "least_squares",
        "Start the projector from random weights, or from the least squares fit to the other side on some "
        "training examples (with the pca anchor: turn its axes towards the student's states).",
    )
    calibration_tokens: int = argument(
        32_768,
        "Training tokens that the pca anchor and the least_squares start are computed from; where it is left out, a "
        "run that trains on fewer tokens takes as many as it trains on, 16 for each input of the fit at least.",
        unit="tokens",
    )
    projector_mlp_ratio: float = argument(
        1.0, "Width of the projector's hidden layer as a multiple of its input's width.", unit="widths of the input"
    )
    projector_dropout: float | None = argument(
        None,
        "Dropout inside the projector, from 0 to below 1; by default 0 where its start is a fit, which dropout would "
        "disturb at once, and 0.1 where it is random.",
        unit="share from 0 to below 1",
    )
    projector_learning_rate: float = argument(1e-3, "Learning rate of the projector alone.")
    max_tokens_per_batch: int | None = argument(
        None,
        "Tokens in one micro-batch, packed without padding; by default per_device_train_batch_size x max_length. "
        "0 pads each micro-batch to its longest example instead.",
        unit="tokens",
    )
    max_nonfinite_steps: int = argument(
        10,
        "A step whose loss or gradient is no finite number is skipped; so many of them in a row end the run.",
        unit="optimizer steps",
    )
    ddp_broadcast_buffers: bool | None = argument(
        False,
        "Whether several processes share out buffers in every forward pass. They are equal from the start, and "
        "where one process runs out of memory the others would wait for it.",
    )
    enable_jit_checkpoint: bool = argument(
        False, "Without effect: KAVA saves on SIGTERM, SIGUSR1 and Ctrl-C in any case."
    )
    auto_find_batch_size: bool = argument(
        False,
        "Without effect: a step that does not fit into memory is done again in smaller forward passes, and the "
        "effective batch stays what it is.",
    )
    teacher_cache_dir: str | None = argument(
        None, "Folder that the teacher's mapped states are written to once, before training, and read from ever after."
    )
    teacher_cache_dtype: Literal["bfloat16", "int8"] = argument(
        "bfloat16", "How they are stored; int8, with a scale for every 32 channels, takes half the space."
    )
    on_policy_fraction: float = argument(
        0.0,
        "Share of each optimizer step's examples whose answer the student writes itself, sampled as it is now; the "
        "teacher corrects it by kd_weight and the alignment, and the next-token loss leaves it out.",
        unit="share from 0 to 1",
    )
    on_policy_temperature: float = argument(1.0, "Temperature that these answers are sampled with, above 0.")
    on_policy_top_p: float = argument(
        1.0,
        "They are sampled from the most probable tokens that have this probability together.",
        unit="share above 0, up to 1",
    )
    on_policy_max_new_tokens: int = argument(
        256, "Longest of these answers; one that gets there has no end-of-text to learn.", unit="tokens"
    )
    rollouts_every: int = argument(
        1, "One generation of such answers serves so many optimizer steps.", unit="optimizer steps"
    )
    rollouts_from: str | None = argument(
        None,
        "File of answers that a student wrote before (python -m kava_trainer rollouts), which stand in the place of "
        "those that are sampled now. They are all that is trained on, unless on_policy_fraction, 1 by default then, "
        "is lower: that share of the examples.",
    )
    run_control: bool = argument(
        False, "Afterwards train a second student from the same start on the same data with the next-token loss alone."
    )
    evaluate_generation: bool = argument(
        False, "Also let teacher and student answer the evaluation problems and count exact matches."
    )
    generation_max_new_tokens: int | None = argument(
        None, "Longest generated answer; by default twice the longest reference answer.", unit="tokens"
    )
    final_dir: str | None = argument(None, "Where final_student and final_projector.pth go; output_dir by default.")
    logging_nan_inf_filter: bool = argument(
        False,
        "Leave losses that are no number out of the log. It waits for the device at every step, and hides what "
        "should stop the run.",
    )
    plain_output: bool = argument(False, "No emoji and no progress bars.")

    def __post_init__(self) -> None:
        settle_numbers(self)
        self.projector_rank = settle_rank(self.projector_rank)
        if self.projector_dropout is None:
            self.projector_dropout = usual_dropout(self.projector_anchor, self.projector_init)
        for name in (f.name for f in fields(self) if is_secret_name(f.name)):
            keep_secret(getattr(self, name))
        self.layer_mapping, self.teachers = list_as_text(self.layer_mapping), list_as_text(self.teachers)
        for name in ("", "_kwargs"):  # newer transformers warn of the old name, older ones know no other
            new, old = f"activation_checkpointing{name}", f"gradient_checkpointing{name}"
            if hasattr(self, new) and getattr(self, new) is None:
                setattr(self, new, getattr(self, old))
        if isinstance(self.report_to, str) and "," in self.report_to:  # a command line has no lists
            self.report_to = [name.strip() for name in self.report_to.split(",")]
        found = self.problems()
        try:
            if precision := precision_problem(self):  # Trainer's own words name a remedy that another advice undoes
                raise WrongArguments.of(precision)
            super().__post_init__()  # type: ignore[no-untyped-call]
            found += [*filter(None, [device_problem(self.device.type)]), *sharding_problems(self)]
            found += accelerator_problems(cast(AcceleratorConfig, self.accelerator_config))
        except (ValueError, ImportError) as error:
            found += problems_of(error)
        if found:
            raise WrongArguments.of(*found)
        # Else every tensor of an iterable data set's batches is cut to the batch size, the answers too.
        cast(AcceleratorConfig, self.accelerator_config).dispatch_batches = False
        self.auto_find_batch_size = False  # it would begin again from the weights reached, with another batch
        self.enable_jit_checkpoint = False  # its handler would take SIGTERM away from KAVA's
        self.dataloader_pin_memory &= self.device.type != "cpu"
        if not self.final_dir:
            self.final_dir = self.output_dir

    def stand_beside(self, *others: ModelArguments | DataArguments) -> None:
        """From now on `to_dict` also gives these arguments of the same run."""
        self._beside = others

    def to_dict(self) -> dict[str, Any]:
        """Every argument with its value, secrets masked, ready for JSON; in a run those of models and data too.

        It is what trackers take for the configuration of a run.
        """
        found = {f.name: getattr(part, f.name) for part in getattr(self, "_beside", ()) for f in fields(part)}
        found |= super().to_dict()  # type: ignore[no-untyped-call]
        return {name: without_secrets(value) if isinstance(value, str) else value for name, value in found.items()}

    @property
    def final_folder(self) -> Path:
        """Where the finished student and its projector go."""
        return Path(self.final_dir or self.output_dir)

    @property
    def aligns(self) -> bool:
        """Whether any term compares what both models have inside."""
        return is_aligned(vars(self))

    @property
    def projects(self) -> bool:
        """Whether something is aligned through projectors."""
        return is_projected(vars(self))

    @property
    def reads_teacher(self) -> bool:
        """Whether any term needs a teacher."""
        return self.aligns or self.kd_weight > 0

    @property
    def samples(self) -> bool:
        """Whether the student writes answers itself while it is trained."""
        return self.on_policy_fraction > 0 and self.rollouts_from is None

    @property
    def learns_next_tokens(self) -> bool:
        """Whether the next-token loss is a term: it has a weight, and there are answers that somebody wrote."""
        return self.lm_weight > 0 and self.on_policy_fraction < 1

    @property
    def calibrates(self) -> bool:
        """Whether the projectors start from a calibration pass."""
        return self.projects and is_fit(self.projector_anchor, self.projector_init)

    def problems(self) -> list[Problem]:
        """Every mistake in the distillation's own arguments."""
        return training_problems(self)


@dataclass
class KavaArguments:
    """All that one run was asked for."""

    model: ModelArguments
    data: DataArguments
    training: KavaTrainingArguments
    given: frozenset[str] = frozenset()
    """Names of the arguments that somebody wrote: in the JSON file, on the command line, or for the earlier run whose
    record is read. A default that fits the case stands aside for them. Where code makes the arguments it is empty."""
    by_kind: Mapping[str, Any] = field(default_factory=dict)
    """The defaults that the kind of student decided, see `student_kinds.defaults_for`."""

    def __post_init__(self) -> None:
        if self.training.max_tokens_per_batch is None:
            self.training.max_tokens_per_batch = self.training.per_device_train_batch_size * self.data.max_length
        self.data.accepts_prompts = self.training.on_policy_fraction == 1
        self.training.stand_beside(self.model, self.data)

    def problems(self) -> list[Problem]:
        """Every mistake that only several arguments together make."""
        batch, length = self.training.per_device_train_batch_size, self.data.max_length
        sampled = self.training.on_policy_max_new_tokens if self.training.on_policy_fraction > 0 else 0
        tokens = max(batch * (length + sampled), self.training.max_tokens_per_batch or 0)
        found = [*self.data.stream_problems(self.training), *implementation_problems(self.training, self.model)]
        if self.training.layer_mapping == "inherited" and self.model.student_init != "teacher_layers":
            what = "layer_mapping inherited needs a student that is cut out of its teacher, and this one is not;"
            found.append(Problem("layer_mapping", what, "write student_init teacher_layers, or layer_mapping all."))
        found += written_for_other_targets(self.training, self.given)
        found += teacher_sharding_problems(self.training, self.model.teacher_sharding)
        if self.model.student_quantization != "none" and is_fsdp_asked():
            what = f"student_quantization is {self.model.student_quantization}, but FSDP2 cannot spread such weights;"
            remedy = f"write none, or start with DDP ({accelerate_config('ddp.yaml')})."
            found.append(Problem("student_quantization", what, remedy))
        if tokens > LARGEST_MICRO_BATCH:
            what = f"One micro-batch could hold {tokens} tokens, more than {LARGEST_MICRO_BATCH};"
            names = [f"per_device_train_batch_size ({batch})", f"max_length ({length})"]
            names += [f"on_policy_max_new_tokens ({sampled})"] if sampled else []
            remedy = f"lower {', '.join(names)} or max_tokens_per_batch."
            found.append(Problem(None, what, remedy))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Every argument with its value, secrets masked, ready for JSON."""
        return self.training.to_dict()
