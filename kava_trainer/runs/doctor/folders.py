"""Checks of what a run writes to and finds there: memory, disk, teacher cache, output folder."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import SaveStrategy

from ...config.alignment.teachers import cache_folders, other_teachers
from ...config.arguments import KavaArguments
from ...config.launcher import is_fsdp_asked
from ...distillation.loss_terms import needed_teacher_layers
from ...distillation.projector_files import restore_projectors
from ...distillation.state_shards import bytes_per_token
from ...distillation.teacher_cache import MANIFEST, TeacherCache, teacher_identity
from ...models.attention.capture import hidden_layers
from ...models.layers import number_of_layers, state_width
from ...trainer.checkpoint import PROJECTOR_FILE, list_checkpoints, resolve_checkpoint
from ...trainer.trainer import KavaTrainer
from ...utils.console import apart, size_text
from ...utils.files import check_cache_space, check_folder, existing_folder
from ...utils.memory import free_memory_bytes
from ..advice import memory_shortage
from ..identity import check_output_dir, check_resumable, earlier_run, run_identity
from ..resources import check_space, checkpoint_bytes, describe_estimate, estimate_memory, try_to_estimate
from ..start import check_places
from .data import Examples
from .findings import Checkup
from .machine import expected_processes
from .models import Pair


def check_memory(checkup: Checkup, arguments: KavaArguments) -> dict[str, int] | None:
    """What training will take of each device beside what is free; the parts, where they can be told."""
    parts, reason = try_to_estimate(lambda: estimate_memory(arguments))
    if parts is None:
        checkup.ok(f"no estimate: {reason}.")
        return None
    device = arguments.training.device
    (total, shown), free = describe_estimate(parts, device), free_memory_bytes(device)
    estimated, there = apart(total, free, 2, size_text)
    text = f"an estimated {estimated} on {device} ({shown}), where {there} are free."
    if problem := memory_shortage(sum(parts.values()), arguments):
        checkup.warn_of(replace(problem, what=text))
    else:
        checkup.ok(text)
    return parts


def check_disk(checkup: Checkup, arguments: KavaArguments, parts: dict[str, int] | None) -> None:
    """Whether the folders can be made and written to, and hold one checkpoint."""
    training = arguments.training
    for name in ("output_dir", "final_dir"):
        check_folder(name, getattr(training, name))
    check_places(training)
    free = size_text(shutil.disk_usage(existing_folder(training.output_dir)).free)
    if parts is None or training.save_strategy == SaveStrategy.NO:
        checkup.ok(f"{training.output_dir} can be written to, {free} are free.")
        return
    check_space(parts, training)
    needed = checkpoint_bytes(parts, training)
    checkup.ok(f"a checkpoint takes {size_text(needed)} in {training.output_dir}, where {free} are free.")
    kept = training.save_total_limit
    if kept and (kept + 1) * needed > shutil.disk_usage(existing_folder(training.output_dir)).free:
        checkup.warn(
            f"{kept} checkpoints are kept, and one more is written before the oldest goes: "
            f"{size_text((kept + 1) * needed)}.",
            "Lower save_total_limit, or name an output_dir on a larger disk.",
        )


def check_cache(
    checkup: Checkup, arguments: KavaArguments, pair: Pair, examples: Examples, trainer: KavaTrainer
) -> None:
    """Whether the teacher cache is this teacher's and whole, and its disk holds what is missing, as far as known."""
    training = arguments.training
    named, parts = [arguments.model, *other_teachers(arguments)], pair.target.parts
    for number, folder in cache_folders(training).items():
        teacher = pair.teachers[number]
        layers = hidden_layers(needed_teacher_layers(training, parts[number], number_of_layers(teacher)))
        if not layers:
            checkup.ok("no loss term reads the teacher, so nothing is cached.")
            return
        if training.aligns and training.layer_mapping == "cka":
            checkup.ok(f"{folder} will hold the layers that the run chooses by CKA.")
            return
        there = 0
        if (folder.exists() and not folder.is_dir()) or not folder.exists() or not any(folder.iterdir()):
            check_folder("teacher_cache_dir", folder)
        else:  # which a cache only reads
            identity = teacher_identity(named[number], teacher, trainer.accelerator.mixed_precision)
            if named[number].teacher_quantization != "none" and (folder / MANIFEST).is_file():
                identity["dtype"] = _written_dtype(folder / MANIFEST, identity["dtype"])
            cache = TeacherCache(folder, identity, layers, training.teacher_cache_dtype)
            cache.verify()
            layers, there = cache.layers, sum(path.stat().st_size for path in cache.shards.paths)
        tokens = examples.tokens()
        size = tokens * bytes_per_token(state_width(teacher, layers), len(layers), training.teacher_cache_dtype)
        check_cache_space(folder, max(size - there, 0))
        checkup.ok(f"about {size_text(size)} in {folder} for {tokens} tokens; {size_text(there)} are there already.")


def _written_dtype(manifest: Path, expected: str) -> str:
    """The type of a quantised teacher as it was written: bitsandbytes decides on it when it loads the weights."""
    try:
        return json.loads(manifest.read_text(encoding="utf-8"))["dtype"]
    except (OSError, ValueError, KeyError, TypeError):  # the cache tells what is wrong with it
        return expected


def check_output(
    checkup: Checkup,
    arguments: KavaArguments,
    pair: Pair,
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Whether an earlier run is in the output folder, and what this one would go on from."""
    training, output = arguments.training, Path(arguments.training.output_dir)
    resumption = resolve_checkpoint(training.resume_from_checkpoint, output)
    for folder, reason in resumption.skipped:
        checkup.warn(f"{folder} would be skipped: {reason}.", f"Delete {folder}.")
    checkpoints, checkpoint = list_checkpoints(output), resumption.checkpoint
    if checkpoints or checkpoint:
        digest = examples.digest(tokenizer, arguments)
        identity = run_identity(arguments, digest) | {"world_size": expected_processes(training)}
        if checkpoint is not None:
            found = check_resumable(checkpoint, identity)
            if found.training:
                checkup.warn(
                    f"The run differs from {checkpoint}: {'; '.join(found.training)}.",
                    "Write what the checkpoint was written with, if the run is to be the same one.",
                )
            if not is_fsdp_asked() and training.layer_mapping not in ("inherited", "cka"):  # which the run will know
                restore_projectors(
                    pair.target.projectors, checkpoint / PROJECTOR_FILE, pair.target.use, pair.target.decoders
                )
        check_output_dir(output, identity, resuming=checkpoint is not None)
    if checkpoint is not None:
        checkup.ok(f"the run goes on from {checkpoint}.")
    elif (there := earlier_run(output)) is not None:
        resume = ", or write resume_from_checkpoint true to go on from the newest checkpoint." if checkpoints else "."
        checkup.warn(f"{there}, which this one would replace.", f"Name another output_dir to keep what it left{resume}")
    else:
        checkup.ok(f"{output} is {'there, without a run in it' if output.exists() else 'new'}.")
