"""Memory and time of a stream of 1,000,000 examples, from files through the trainer's loader to packed rows.

python benchmarks/streaming_memory.py memory --out benchmarks/results/streaming-memory.csv
python benchmarks/streaming_memory.py index --out benchmarks/results/streaming-index.csv
"""

import argparse
import csv
import json
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402
import torch  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from kava_trainer.config.arguments import KavaTrainingArguments  # noqa: E402
from kava_trainer.config.data_arguments import DataArguments  # noqa: E402
from kava_trainer.data.collators import JoiningCollator  # noqa: E402
from kava_trainer.data.packing import pack_step  # noqa: E402
from kava_trainer.data.stream_sources import open_rows  # noqa: E402
from kava_trainer.data.streaming import ExampleStream, open_stream, stream_loader  # noqa: E402
from kava_trainer.distillation.state_shards import Shards, example_key, write_shard  # noqa: E402
from kava_trainer.quickstart import STUDENT_FOLDER  # noqa: E402

FILES, BATCH, ACCUMULATION, ROW_TOKENS, MEGABYTE = 20, 8, 4, 1024, 1e6


def resident() -> float:
    """Megabytes of this process that are in memory."""
    return psutil.Process().memory_info().rss / MEGABYTE


def write_files(folder: Path, count: int) -> None:
    """Different word problems, a line each, in several files."""
    for number in range(FILES):
        with (folder / f"part-{number:02}.jsonl").open("w") as file:
            for row in range(number * count // FILES, (number + 1) * count // FILES):
                question = f"Ben has {row} coins and buys {7 * row} more. How many coins does Ben have then?"
                file.write(json.dumps({"question": question, "answer": f"{row}+{7 * row}={8 * row}"}) + "\n")


def open_examples(folder: Path) -> ExampleStream:
    """The stream over these files, with the default shuffle buffer."""
    asked = DataArguments(dataset_name=str(folder / "*.jsonl"), max_eval_samples=100, streaming=True)
    rows, _ = open_rows(asked)
    return open_stream(rows, AutoTokenizer.from_pretrained(STUDENT_FOLDER), 128, asked.shuffle_buffer, seed=42)


def loader_of(stream: ExampleStream, folder: Path):
    """The trainer's loader."""
    args = KavaTrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none")
    return iter(stream_loader(stream, JoiningCollator(), args, BATCH))


def seconds_to_resume(state: dict, folder: Path) -> float:
    """How long a new process waits for its first batch from there."""
    stream = open_examples(folder)
    stream.restore(state)
    started = time.perf_counter()
    next(loader_of(stream, folder))
    return time.perf_counter() - started


def memory_rows(count: int, samples: int) -> list[dict]:
    """Examples so far, time and memory at several moments of one pass; then the way back to each of them."""
    rows, states = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder, count + 200)
        stream = open_examples(folder)
        loader, done, started = loader_of(stream, folder), 0, time.perf_counter()
        while done < count:
            batches = list(islice(loader, ACCUMULATION))
            pack_step(batches, ROW_TOKENS)
            for batch in batches:
                stream.note(batch["place"])
            before, done = done, done + BATCH * ACCUMULATION
            if before * samples // count < done * samples // count or before == 0:
                rows.append({"examples": done, "seconds": time.perf_counter() - started, "resident_mb": resident()})
                states.append(stream.state())
                print(rows[-1], flush=True)
        for row, state in zip(rows, states, strict=True):
            row["seconds_to_resume"] = seconds_to_resume(state, folder)
    return rows


def index_rows(count: int, samples: int) -> list[dict]:
    """What a teacher cache keeps in memory to find so many examples, and what it takes for a moment to read that."""
    rows, shard, state = [], 10_000, torch.zeros(1, 8)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for start in range(0, count, shard):
            keys = [example_key([number >> 16, number & 0xFFFF]) for number in range(start, start + shard)]
            write_shard(folder, keys, [{1: state}] * shard, "bfloat16", "fingerprint")
            done = start + shard
            if start * samples // count < done * samples // count:
                before, started = resident(), time.process_time()
                shards = Shards(folder, "fingerprint")
                seconds = time.process_time() - started
                assert [done - 1 >> 16, done - 1 & 0xFFFF] in shards
                grown = resident() - before
                rows.append(
                    {"examples": done, "cpu_seconds": seconds, "index_mb": shards.nbytes / MEGABYTE, "grown_mb": grown}
                )
                print(rows[-1], flush=True)
                del shards
    return rows


def main() -> None:
    """Measure one part and write its CSV file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["memory", "index"])
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = {"memory": memory_rows, "index": index_rows}[asked.part](asked.examples, asked.samples)
    with asked.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({name: round(value, 3) for name, value in row.items()} for row in rows)


if __name__ == "__main__":
    main()
