"""The pairs of models that a step is measured on, and the texts that they read."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoConfig, Qwen2Config  # noqa: E402

from kava_trainer.quickstart import STUDENT_FOLDER, TEACHER_FOLDER  # noqa: E402
from kava_trainer.quickstart.problems import generate_problems  # noqa: E402

SHARED = ROOT.parent / "shared"


@dataclass(frozen=True)
class Size:
    """A pair of models and the examples of one step."""

    teacher: Callable[[], Any]
    student: Callable[[], Any]
    tokenizer: Path
    dtype: torch.dtype
    examples: int
    batch_size: int
    max_length: int


def _middle(width: int, layers: int) -> Qwen2Config:
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": 2}
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return Qwen2Config(vocab_size=151936, tie_word_embeddings=True, **shape, **heads)


def _real(name: str) -> Any:
    return AutoConfig.from_pretrained(SHARED / "models" / name)


QWEN_TOKENIZER = SHARED / "models" / "qwen2.5-tokenizer"
SIZES = {
    "quickstart": Size(
        lambda: AutoConfig.from_pretrained(TEACHER_FOLDER), lambda: AutoConfig.from_pretrained(STUDENT_FOLDER),
        STUDENT_FOLDER, torch.float32, 32, 32, 256,
    ),
    "middle": Size(lambda: _middle(768, 12), lambda: _middle(384, 8), QWEN_TOKENIZER, torch.bfloat16, 16, 2, 512),
    "real": Size(
        lambda: _real("qwen2.5-1.5b-instruct"), lambda: _real("qwen2.5-0.5b"),
        QWEN_TOKENIZER, torch.bfloat16, 8, 2, 512,
    ),
}  # fmt: skip


def texts_of(size: Size) -> Dataset:
    """The examples of one step as text: GSM8K, or the quickstart's problems."""
    if size.tokenizer == STUDENT_FOLDER:
        return Dataset.from_list(generate_problems(size.examples, "train"))
    lines = (SHARED / "data" / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()[: size.examples]
    return Dataset.from_list([json.loads(line) for line in lines])
