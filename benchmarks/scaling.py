"""The tables of docs/scaling.md: what ran on what, and what a billion tokens need on 8 and on 64 GPUs.

    python benchmarks/scaling.py

The latter is arithmetic: the cost of a token is the one that `step.py` counted, the figures of the GPU are its maker's,
and the share of its peak that is reached is assumed, because no GPU was at hand. The former is what `matrix.py` found.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.tables import fill, markdown  # noqa: E402
from kava_trainer.distillation.state_shards import bytes_per_token  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT, STEP, MATRIX = ROOT / "docs" / "scaling.md", RESULTS / "step-real-hidden.csv", RESULTS / "matrix.csv"
LARGE = RESULTS / "large-pair.csv"
TOKENS, STEP_TOKENS = 1e9, 2**20
GPU_MEMORY, LARGE_TOKENS = 80e9, 4096
"""Of one GPU; of a micro-batch of the large pair, see `large_pair.py`."""

# NVIDIA H100 SXM, as its data sheet has it: dense bf16, NVLink in one direction, and one 400 Gb/s port a GPU.
PEAK, NVLINK, NETWORK, SHARE = 989e12, 450e9, 50e9, 0.4
GPUS_OF_A_NODE = 8

TEACHER_BLOCKS, STUDENT_BLOCKS, STUDENT = 1.310e9, 0.358e9, 0.494e9
"""Weights of Qwen2.5-1.5B and 0.5B without embeddings, and all of the student's."""
TEACHER_4BIT, TEACHER_BF16, WIDTH = 1.14e9, 3.09e9, 1536
MICRO_BATCH = 0.83e9
"""Bytes of a micro-batch of the 8 GB recipe, 1,024 tokens, beside gradients (docs/performance.md)."""


@dataclass(frozen=True)
class Need:
    """What a run needs on some number of GPUs, with the teacher beside the student or its states on disk."""

    gpus: int
    cached: bool

    @property
    def flops(self) -> float:
        """Of one token."""
        whole = counted_flops()
        return whole * 6 * STUDENT_BLOCKS / (6 * STUDENT_BLOCKS + 2 * TEACHER_BLOCKS) if self.cached else whole

    @property
    def seconds_of_a_step(self) -> float:
        """Of computing alone."""
        return STEP_TOKENS * self.flops / (self.gpus * PEAK * SHARE)

    @property
    def seconds_of_exchange(self) -> float:
        """Of the gradients in bf16: a ring sends 2 (N - 1) / N times their size from each GPU."""
        rate = NVLINK if self.gpus <= GPUS_OF_A_NODE else NETWORK
        return 2 * (self.gpus - 1) / self.gpus * 2 * STUDENT / rate

    @property
    def minutes(self) -> tuple[float, float]:
        """Of the run: where the exchange hides behind the backward pass, and where none of it does."""
        steps, compute, exchange = TOKENS / STEP_TOKENS, self.seconds_of_a_step, self.seconds_of_exchange
        return steps * max(compute, exchange) / 60, steps * (compute + exchange) / 60

    @property
    def disk_rate(self) -> float:
        """Bytes a second that a node reads from the cache."""
        tokens = STEP_TOKENS / max(self.seconds_of_a_step, self.seconds_of_exchange)
        return tokens * bytes_per_token(WIDTH, 1, "bfloat16") * min(1, GPUS_OF_A_NODE / self.gpus) if self.cached else 0


def counted_flops() -> float:
    """Of one token of KAVA's own step beside the teacher, as `step.py` counted them."""
    with STEP.open(newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["way"] == "d")
    return float(row["flops"]) / float(row["tokens"])


def time_table() -> str:
    """Time and traffic."""
    header = [
        "GPUs", "teacher", "GFLOP a token", "s a step: computing", "s a step: gradients", "minutes", "GPU hours",
        "read from the cache, a node",
    ]  # fmt: skip
    rows = []
    for need in (Need(gpus, cached) for gpus in (1, 8, 64) for cached in (False, True)):
        low, high = need.minutes
        minutes = f"{low:.1f}" if need.gpus == 1 else f"{low:.1f} to {high:.1f}"
        exchange = "0" if need.gpus == 1 else f"{need.seconds_of_exchange:.3f}"
        disk = f"{need.disk_rate / 1e9:.1f} GB/s" if need.cached else ""
        rows.append([
            str(need.gpus), "cached" if need.cached else "online", f"{need.flops / 1e9:.2f}",
            f"{need.seconds_of_a_step:.3f}", exchange, minutes, f"{low * need.gpus / 60:.1f}", disk,
        ])  # fmt: skip
    return markdown(header, rows)


def cache_table() -> str:
    """Size of the cache."""
    rows = []
    for layers in (1, 4):
        for dtype in ("bfloat16", "int8"):
            size = bytes_per_token(WIDTH, layers, dtype)
            rows.append([f"{layers}, {dtype}", f"{size:,}", f"{TOKENS * size / 1e12:.2f} TB"])
    return markdown(["Mapped layers, type", "bytes a token", "a billion tokens"], rows)


def memory_table() -> str:
    """Memory of one GPU, in parts of GB. FSDP2 spreads student, gradients and optimizer; the rest it does not."""
    whole = 2 * STUDENT  # of weights in bf16; gradients take as much, two states of 8 bits as well
    gathered = 2 * 2 * (STUDENT - STUDENT_BLOCKS + 2 * STUDENT_BLOCKS / 24)
    rows = []
    for name, gpus, sharded in (("DDP", 8, False), ("FSDP2", 8, True), ("FSDP2", 64, True)):
        parts = [3 * whole / gpus, gathered] if sharded else [4 * whole, 0.0]  # DDP has buckets of the gradients' size
        for teacher, size in (("4-bit", TEACHER_4BIT), ("bf16", TEACHER_BF16), ("cached", 0.0)):
            figures = [*parts, size, MICRO_BATCH]
            rows.append([f"{name}, {gpus} GPUs, {teacher}", *(f"{f / 1e9:.2f}" for f in (*figures, sum(figures)))])
    return markdown(["", "student, gradients, optimizer", "gathered", "teacher", "micro-batch", "sum"], rows)


def large_counts() -> dict[str, int]:
    """What `large_pair.py` has counted, by name."""
    with LARGE.open(newline="") as file:
        return {row["name"]: int(row["count"]) for row in csv.DictReader(file)}


def large_memory_table() -> str:
    """Memory of one of eight GPUs with a pair that fits none of them."""
    counts = large_counts()
    beside = [counts["trained"], counts["gathered"], counts["micro-batch"]]
    teachers = {
        "whole, bf16": (counts["teacher, whole"], 0),
        "whole, 4-bit": (counts["teacher, 4-bit"], 0),
        "spread, bf16": (counts["teacher, spread"], counts["teacher, gathered"]),
        "states cached, head spread": (counts["head"] / GPUS_OF_A_NODE, counts["head"]),
    }
    rows = []
    for name, (held, gathered) in teachers.items():
        figures = [held, gathered, *beside]
        fits = "yes" if sum(figures) < GPU_MEMORY else "no"
        rows.append([name, *(f"{figure / 1e9:.1f}" for figure in (*figures, sum(figures))), fits])
    header = [
        "Teacher", "teacher", "gathered of it", "student, gradients, optimizer", "gathered", "micro-batch", "sum",
        "fits 80 GB",
    ]  # fmt: skip
    return markdown(header, rows)


def large_step_table() -> str:
    """What a micro-batch of that pair costs each GPU, with the teacher spread over all of them, and with it whole."""
    counts = large_counts()
    teacher, student = (counts[f"weights, {role}"] for role in ("teacher", "student"))
    blocks = {role: counts[f"weights, {role}"] - counts[f"embeddings, {role}"] for role in ("teacher", "student")}
    seconds = LARGE_TOKENS * (2 * blocks["teacher"] + 8 * blocks["student"]) / (PEAK * SHARE)
    others = (GPUS_OF_A_NODE - 1) / GPUS_OF_A_NODE
    student_bytes = others * student * (2 + 2 + 4)
    rows = []
    for name, carried in (("spread", student_bytes + others * 2 * teacher), ("whole, 4-bit", student_bytes)):
        rates = [f"{carried / rate:.2f}" for rate in (NVLINK, NETWORK)]
        rows.append([name, f"{seconds:.2f}", f"{carried / 1e9:.0f}", *rates])
    return markdown(["Teacher", "s computing", "GB carried", "s over NVLink", "s over the network"], rows)


def matrix_table() -> str:
    """What `matrix.py` found, engine by engine; messages are told in the text below the table."""
    with MATRIX.open(newline="") as file:
        rows = list(csv.DictReader(file))
    teachers = list(dict.fromkeys(row["teacher"] for row in rows))
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        said = [row["outcome"].partition(":")[0], row["resume"], row["elsewhere"]]
        name = f"{row['engine']} ({row['ranks']}), {row['student']}, {row['precision']}"
        lines.setdefault(name, {})[row["teacher"]] = ", ".join(filter(None, said))
    header = ["Engine (processes), student, precision", *(f"teacher {name}" for name in teachers)]
    return markdown(header, [[name, *(found[teacher] for teacher in teachers)] for name, found in lines.items()])


def document(text: str) -> str:
    """The document with its tables made anew."""
    tables = {"time": time_table(), "cache": cache_table(), "memory": memory_table(), "matrix": matrix_table()}
    tables |= {"large memory": large_memory_table(), "large step": large_step_table()}
    for name, table in tables.items():
        text = fill(text, name, table)
    return text


def main() -> None:
    """Rewrite the document."""
    DOCUMENT.write_text(document(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
