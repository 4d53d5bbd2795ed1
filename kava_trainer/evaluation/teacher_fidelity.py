"""What quantising does to a teacher: its states and answers on the probe beside those of its unquantised weights.

The unquantised teacher reads the probe and is freed before the quantised one is loaded, so the two are never in memory
together, and neither comes on top of what the training takes.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate.utils import release_memory, send_to_device
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config.arguments import KavaArguments
from ..config.layer_mapping import resolve_layer_pairs
from ..data.collators import DistillationCollator
from ..data.selection import choose_examples
from ..data.token_alignment.pair_encoder import TeacherReading
from ..data.token_alignment.ranges import read_by_the_teacher
from ..models.layers import config_layers, number_of_layers
from ..models.loading import build_causal_lm, check_reads, load_config
from ..models.sizes import model_bytes
from ..models.student import foreseen_layers, student_config
from ..models.teacher import OnlineTeacher, load_teacher, quantization_config
from ..utils.console import Console, apart, fixed, size_text
from ..utils.distributed import from_main_process
from ..utils.memory import free_memory_bytes
from ..utils.progress_bar import with_progress
from .answers import answer_loss_sum, perplexity
from .diagnostics import STATUSES, centred_cosine
from .probe import PROBE_TOKENS

FAITHFUL_COS_SIM = STATUSES[0][0]
"""A student succeeds with this CosSim to its teacher. A quantised teacher that is further than that from what it was
has lost more than a successful student may miss."""

FAITHFUL_PERPLEXITY = 1.1
"""Quantising usually costs a few per cent of perplexity; a tenth more is no rounding any more."""

MOST_ON_CPU = 32_000_000_000
"""Bytes of weights that a CPU may run beside an accelerator. Larger ones take many minutes for a probe, and several
processes would give up waiting for each other."""

_SPARE = 1_000_000_000
"""Bytes for the passes over single examples, beside a tenth of the weights."""

MOST_LAYERS_SHOWN = 4
"""Of more layers only the worst is printed; the summary has them all."""

_FIGURES = (
    "layers", "perplexity", "reference_perplexity", "cross_entropy", "reference_cross_entropy", "tokens", "examples",
    "reference_dtype", "reference_device", "reason",
)  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """What a teacher makes of the probe."""

    states: dict[int, torch.Tensor]
    """[N, d_t] of all tokens by layer, on the CPU."""
    cross_entropy: float
    """Mean over the answer tokens, in nats."""
    dtype: str
    """Type of its unquantised weights."""


@torch.no_grad()
def read_examples(
    model: PreTrainedModel,
    layers: list[int],
    examples: list[dict[str, Any]],
    collator: Callable[[list[Any]], dict[str, Any]],
    description: str = "Reading the probe",
) -> Reading:
    """Let a teacher read examples one by one, which takes the least memory.

    Args:
        model: the teacher; it is frozen.
        layers: whose states are kept, in the convention of `hidden_states`.
        examples: with `input_ids` and `labels`.
        collator: a `DistillationCollator`.
        description: of the progress bar.
    """
    depth = number_of_layers(model)
    teacher = OnlineTeacher(model, sorted({*layers, depth}))
    kept: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    total, count = 0.0, 0
    for example in with_progress(examples, description, "example"):
        batch = send_to_device(collator([example]), model.device)
        states = cast(dict[int, torch.Tensor], teacher.features(batch))
        total += answer_loss_sum(model, states[depth], batch)
        count += len(batch["next_tokens"])
        for layer, parts in kept.items():
            parts.append(states[layer][0].cpu())
    states = {layer: torch.cat(parts) for layer, parts in kept.items()}
    return Reading(states, total / max(count, 1), str(model.dtype).removeprefix("torch."))


def compare_readings(reference: Reading, quantised: Reading) -> dict[str, Any]:
    """How far a quantised teacher is from its unquantised self.

    Returns:
        `layers`: for each layer the mean over tokens of the cosine between both states (`cos_sim`), the cosine that the
        worst hundredth of the tokens stays below (`cos_sim_p01`), and the mean after subtracting each side's mean state
        (`centred_cos_sim`). Beside them `cross_entropy` in nats and `perplexity` of the answers, both of the
        unquantised teacher with `reference_` before their names, its `reference_dtype`, and the number of `tokens`.
    """
    layers = {}
    for layer, states in reference.states.items():
        cosines = F.cosine_similarity(quantised.states[layer].float(), states.float(), dim=-1, eps=1e-6)
        layers[str(layer)] = {
            "cos_sim": cosines.mean().item(),
            "cos_sim_p01": torch.quantile(cosines, 0.01).item(),
            "centred_cos_sim": centred_cosine(quantised.states[layer], states),
        }
    return {
        "layers": layers,
        "perplexity": perplexity(quantised.cross_entropy),
        "reference_perplexity": perplexity(reference.cross_entropy),
        "cross_entropy": quantised.cross_entropy,
        "reference_cross_entropy": reference.cross_entropy,
        "tokens": len(next(iter(reference.states.values()))),
        "reference_dtype": reference.dtype,
    }


def _worst(layers: dict[str, dict[str, float]]) -> str:
    """The layer with the lowest CosSim, or one that has none."""
    return min(layers, key=lambda layer: -math.inf if math.isnan(cos := layers[layer]["cos_sim"]) else cos)


def poor_fidelity(figures: dict[str, Any]) -> str | None:
    """What is poor in the figures of `compare_readings`, as a clause; None where both teachers are close."""
    layer, found = _worst(figures["layers"]), []
    cos_sim = figures["layers"][layer]["cos_sim"]
    if not cos_sim >= FAITHFUL_COS_SIM:  # so that NaN is poor too
        shown = apart(cos_sim, FAITHFUL_COS_SIM, 4, fixed)[0]
        found.append(f"its states at layer {layer} have a CosSim of {shown}, below {FAITHFUL_COS_SIM}")
    ratio = perplexity(figures["cross_entropy"] - figures["reference_cross_entropy"])
    if not ratio <= FAITHFUL_PERPLEXITY:
        shown = apart(ratio, FAITHFUL_PERPLEXITY, 3)[0]
        found.append(f"its perplexity is {shown} times as high, more than {FAITHFUL_PERPLEXITY}")
    return " and ".join(found) or None


def choose_device(weights: int, device: torch.device) -> torch.device | str:
    """Where an unquantised teacher can be run for a moment: on the device, else on the CPU; else why nowhere.

    Its `weights` take so many bytes; a tenth and 1 GB more are asked for.
    """
    needed, host = int(1.1 * weights) + _SPARE, torch.device("cpu")
    free = {place: free_memory_bytes(place) for place in dict.fromkeys((device, host))}
    if needed <= min(free.values()):  # on its way to a device it passes through the host's memory
        return device
    shown = " and ".join(f"{size_text(size)} on {place}" for place, size in free.items())
    reason = f"The unquantised teacher needs {size_text(needed)} for a moment, and {shown} are free"
    if needed > free[host]:
        return f"{reason}."
    return host if weights <= MOST_ON_CPU else f"{reason}; it is too large to be run on the CPU."


class TeacherFidelity:
    """Measures what quantising the teacher of a run costs; does nothing where it is not quantised.

    The main process measures, and the others wait for it. What memory does not allow is left out with the reason, and
    ends no run.

    Args:
        console: prints.
        arguments: of the run.
        tokenizer: of the run.
        dataset: held-out examples, or training examples where there are none.
        held_out: which of the two they are.
        collator: makes a batch of one.
        reading: of the teacher, where its tokens are others than the run's.
    """

    def __init__(
        self,
        console: Console,
        arguments: KavaArguments,
        tokenizer: PreTrainedTokenizerBase,
        dataset: Any,
        held_out: bool,
        collator: Callable[[list[Any]], dict[str, Any]],
        reading: TeacherReading | None = None,
    ) -> None:
        self._console, self._arguments, self._reading = console, arguments, reading
        self._tokenizer = tokenizer if reading is None else reading.tokenizer
        self._dataset, self._held_out = dataset, held_out
        self._collator = collator if reading is None else DistillationCollator(reading.tokenizer)
        self._kind = arguments.model.teacher_quantization
        self._name = f"{self._kind.removesuffix('bit')}-bit teacher"
        self._examples: list[dict[str, Any]] = []
        self._reference: Reading | None = None
        self._where: torch.device | str = ""

    def read_unquantised(self) -> None:
        """Let the unquantised teacher read the probe, and free it. Call it before the quantised one is loaded.

        Raises:
            BadRequest: on all ranks, if the teacher cannot be had, or does not fit tokenizer, lengths or layers.
        """
        if self._kind != "none":
            from_main_process(self._read_unquantised)

    def compare(self, teacher: PreTrainedModel) -> dict[str, Any] | None:
        """Let the quantised teacher read the same, tell how far it is from the unquantised one, and warn if it is far.

        Args:
            teacher: quantised, and whole on this process's device.

        Returns:
            The entry `teacher_fidelity` of the summary, on all ranks; None where the teacher is not quantised.
        """
        return from_main_process(lambda: self._compare(teacher)) if self._kind != "none" else None

    def _read_unquantised(self) -> None:
        quantization_config(self._kind)  # a missing package is told before a long load
        model, device = self._arguments.model, self._arguments.training.device
        config = load_config(cast(str, model.teacher_model_name_or_path), "teacher", model.teacher_revision, model)
        if getattr(config, "quantization_config", None) is not None:
            self._where = "The teacher's weights are stored quantised, so there is nothing to compare with."
            return
        with torch.device("meta"):
            weights = model_bytes(build_causal_lm(config, model.teacher_dtype, model))
        self._where = choose_device(weights, device)
        if isinstance(self._where, str):
            return
        self._examples = read_by_the_teacher(choose_examples(self._dataset, PROBE_TOKENS))
        self._console.print(f"Unquantised teacher, to compare with: {size_text(weights)} on {self._where} for a moment")
        try:
            self._reference = self._read_and_free(self._where)
        except torch.OutOfMemoryError:
            self._where = f"Memory ran out on {self._where} with the unquantised teacher."
        release_memory()
        if device.type == "cuda":  # the peak of the run is to be that of its training
            torch.cuda.reset_peak_memory_stats(device)

    def _read_and_free(self, device: torch.device) -> Reading:
        """The unquantised teacher exists in here only."""
        arguments = self._arguments
        model = load_teacher(dataclasses.replace(arguments.model, teacher_quantization="none"), device)
        check_reads(model, "teacher", self._tokenizer, arguments.data.max_length if self._reading is None else 0)
        depths = config_layers(student_config(arguments.model)), number_of_layers(model)
        inherited = foreseen_layers(arguments.model)
        pairs = resolve_layer_pairs(arguments.training.layer_mapping, *depths, inherited)
        return read_examples(
            model, sorted({layer for _, layer in pairs}), self._examples, self._collator, "Unquantised teacher"
        )

    def _compare(self, teacher: PreTrainedModel) -> dict[str, Any]:
        reference, self._reference = self._reference, None
        figures = {"quantization": self._kind, **dict.fromkeys(_FIGURES)}
        if reference is None:
            self._console.print(f"What quantising costs the teacher was not measured. {self._where}")
            return figures | {"reason": self._where}
        layers, title = list(reference.states), self._name.capitalize()
        quantised = read_examples(teacher, layers, self._examples, self._collator, title)
        figures |= compare_readings(reference, quantised)
        figures |= {"reference_device": str(self._where), "examples": "held-out" if self._held_out else "training"}
        self._tell(figures)
        return figures

    def _tell(self, figures: dict[str, Any]) -> None:
        perplexities = apart(figures["perplexity"], figures["reference_perplexity"], 4)
        self._console.print(
            f"{self._name} against {figures['reference_dtype']} on {figures['tokens']} {figures['examples']} tokens: "
            f"{_shown(figures['layers'])}, perplexity {' against '.join(perplexities)}"
        )
        if (problem := poor_fidelity(figures)) is not None:
            milder = "8bit or none" if self._kind == "4bit" else "none"
            self._console.warn(
                f"The {self._name} is far from what it was unquantised: {problem}. The student will learn that too. "
                f"Write teacher_quantization {milder}; where memory is short, a teacher_cache_dir frees the teacher "
                "before the training."
            )


def _shown(layers: dict[str, dict[str, float]]) -> str:
    """CosSim of a few layers, or of the worst of many."""
    if len(layers) <= MOST_LAYERS_SHOWN:
        return "CosSim " + ", ".join(f"{row['cos_sim']:.4f} at layer {layer}" for layer, row in layers.items())
    worst = _worst(layers)
    return f"CosSim of {len(layers)} layers at least {layers[worst]['cos_sim']:.4f}, at layer {worst}"
