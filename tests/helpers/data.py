"""Examples and data sets that are small."""

import json
import random
from pathlib import Path


def random_examples(count: int, seed: int = 0, longest: int = 24) -> list[dict]:
    """Examples of different lengths, each with a prompt and an answer."""
    rng = random.Random(seed)
    examples = []
    for _ in range(count):
        length = rng.randint(4, longest)
        ids = [rng.randint(1, 511) for _ in range(length - 1)] + [0]
        prompt = rng.randint(1, length - 2)
        examples.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "prompt_length": prompt})
    return examples


def write_problems(path: Path, count: int = 40, seed: int = 0) -> Path:
    """A small data set of arithmetic problems as jsonl."""
    rng = random.Random(seed)
    with path.open("w") as file:
        for _ in range(count):
            a, b = rng.randint(1, 99), rng.randint(1, 99)
            question = f"What is {a}+{b}?" if rng.random() < 0.5 else f"Ben has {a} coins and buys {b} more. How many?"
            file.write(json.dumps({"question": question, "answer": f"{a}+{b}={a + b}\n#### {a + b}"}) + "\n")
    return path


def write_dataset(folder, text, name="data.jsonl"):
    (folder / name).write_text(text)
    return folder / name
