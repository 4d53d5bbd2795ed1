"""Bytes and weights of a pair that fits no single GPU: Qwen2.5-32B teaches 7B on eight, under FSDP2 in bfloat16.

    python benchmarks/large_pair.py

Nothing is loaded: the models are built from their sizes without storage, and the memory estimate plays a micro-batch
through on fake tensors. What eight processes share out is divided by eight. `scaling.py` makes the table of it.
"""

import csv
import json
import math
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kava_trainer.config import launcher  # noqa: E402
from kava_trainer.config.model_arguments import ModelArguments  # noqa: E402
from kava_trainer.config.parser import parse_arguments  # noqa: E402
from kava_trainer.models.sharding.sizes import gathered_of_teacher  # noqa: E402
from kava_trainer.models.sizes import model_bytes, weight_bytes  # noqa: E402
from kava_trainer.runs.pair.held import meta_teacher, share_bytes  # noqa: E402
from kava_trainer.runs.resources import estimate_memory  # noqa: E402

FILE = ROOT / "benchmarks" / "results" / "large-pair.csv"
GPUS, LENGTH = 8, 4096

_COMMON = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 152064, "dtype": "bfloat16",
    "max_position_embeddings": 32768, "tie_word_embeddings": False, "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip

SIZES = {
    "teacher": {
        "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
        "num_key_value_heads": 8,
    },
    "student": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
}  # fmt: skip
"""Of Qwen2.5-32B and 7B, as their config files have them."""

ASKED = {
    "dataset_name": "quickstart", "student_init": "random", "student_dtype": "float32", "bf16": "true",
    "use_cpu": "true", "teacher_sharding": "none", "gradient_checkpointing": "true", "max_length": LENGTH,
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "kd_weight": 1, "optim": "adamw_torch_fused",
}  # fmt: skip
"""Of the run: hidden states of the last layer and the divergence, micro-batches of one example."""


def write_configs(folder: Path) -> dict[str, Path]:
    """A folder with a config for each of the pair."""
    found = {}
    for role, sizes in SIZES.items():
        found[role] = folder / role
        found[role].mkdir()
        (found[role] / "config.json").write_text(json.dumps({**_COMMON, **sizes}))
    return found


def whole_parts(folders: dict[str, Path]) -> dict[str, int]:
    """The memory estimate of one process under FSDP2, which holds everything."""
    os.environ["ACCELERATE_USE_FSDP"], os.environ["FSDP_VERSION"] = "true", "2"
    launcher.SHARDING_DEVICES.add("cpu")
    names = {"teacher_model_name_or_path": folders["teacher"], "output_dir": folders["teacher"] / "out"}
    names["student_config_name"] = folders["student"] / "config.json"
    return estimate_memory(
        parse_arguments([word for name, value in {**names, **ASKED}.items() for word in (f"--{name}", str(value))])
    )


def count_pair() -> dict[str, int]:
    """Bytes of one of the GPUs, and weights, by name."""
    with TemporaryDirectory() as folder:
        folders = write_configs(Path(folder))
        parts = whole_parts(folders)
        models = {role: meta_teacher(ModelArguments(str(own)), role) for role, own in folders.items()}
    teacher = models["teacher"]
    trained = ("student", "projector", "gradients", "optimizer")
    return {
        "teacher, whole": model_bytes(teacher),
        "teacher, 4-bit": model_bytes(teacher, "4bit"),
        "teacher, spread": share_bytes(teacher, GPUS),
        "teacher, gathered": gathered_of_teacher(teacher),
        "head": weight_bytes(teacher.get_output_embeddings().parameters()),
        "trained": math.ceil(sum(parts[name] for name in trained) / GPUS),
        "gathered": parts["gathered weights"],
        "micro-batch": parts["micro-batch"],
        **{f"weights, {role}": own.num_parameters() for role, own in models.items()},
        **{f"embeddings, {role}": own.get_input_embeddings().weight.numel() for role, own in models.items()},
    }


def main() -> None:
    """Write the counts."""
    with FILE.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "count"])
        writer.writerows(count_pair().items())


if __name__ == "__main__":
    main()
