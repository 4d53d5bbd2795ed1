"""Models of the shapes of Qwen2.5-1.5B and 0.5B with random weights, and examples as long as GSM8K's, without a hub."""

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM  # noqa: E402

from benchmarks.step_sizes import Size  # noqa: E402
from kava_trainer.quickstart import STUDENT_FOLDER  # noqa: E402

VOCABULARY, MEAN_LENGTH = 151936, 160
BATCH, LONGEST = 16, 512


def _qwen(width: int, layers: int, heads: int, intermediate: int) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=2, intermediate_size=intermediate, tie_word_embeddings=True, rope_theta=1e6,
        max_position_embeddings=32768,
    )  # fmt: skip


def teacher_config() -> Qwen2Config:
    """The shape of Qwen2.5-1.5B."""
    return _qwen(1536, 28, 12, 8960)


def student_config() -> Qwen2Config:
    """The shape of Qwen2.5-0.5B."""
    return _qwen(896, 24, 14, 4864)


QWEN = Size(teacher_config, student_config, STUDENT_FOLDER, torch.bfloat16, 4 * BATCH, BATCH, LONGEST)
"""A step of rows of up to 8,192 tokens, which fill a GPU."""


def gsm8k_like(count: int) -> list[dict[str, Any]]:
    """Examples of random tokens, half of each an answer, of 80 to 240 tokens."""
    torch.manual_seed(0)
    lengths = torch.randint(MEAN_LENGTH // 2, MEAN_LENGTH * 3 // 2, (count,)).tolist()
    examples = []
    for length in lengths:
        ids = torch.randint(VOCABULARY, (length,)).tolist()
        examples.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]})
    return examples


def save_pair(folder: Path, small: bool) -> tuple[str, str]:
    """Folders of a teacher and a student that read the quickstart's tokens; small ones of two layers."""
    tokenizer, places = AutoTokenizer.from_pretrained(STUDENT_FOLDER), []
    for name, config in (("teacher", teacher_config()), ("student", student_config())):
        if small:
            config.update({"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2})
            config.update({"num_attention_heads": 4, "vocab_size": len(tokenizer)})
            config.layer_types = ["full_attention"] * 2
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() and not small else "cpu"):
            model = Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16)
        places.append(str(folder / name))
        model.save_pretrained(places[-1])
        tokenizer.save_pretrained(places[-1])
    return places[0], places[1]
