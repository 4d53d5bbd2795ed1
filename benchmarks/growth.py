"""How the cost of a token grows with the length of the examples, the row, the mapped layers and the epochs.

    python benchmarks/growth.py --out FILE.csv [--plot FILE.png]

The middle pair of `step.py` with the Mercator loss alone, on examples of random tokens: the usual loop, KAVA beside its
teacher, and KAVA with a cache, interleaved, median of several. One thing varies at a time. Growth with the epochs
follows from what was measured once: writing the cache, and one epoch with and without it.
"""

import argparse
import csv
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.step import Bench  # noqa: E402
from benchmarks.step_sizes import SIZES  # noqa: E402

COLUMNS = ("what", "value", "way", "seconds", "tokens", "microseconds_per_token")
LENGTHS, BUDGETS, LAYERS, EPOCHS = (64, 128, 256, 512, 1024), (512, 1024, 2048, 4096, 8192), (1, 2, 4, 8), 6
WAYS = {"a": "usual loop", "d": "KAVA", "e": "KAVA, cached"}


def examples_of(length: int, count: int) -> list[dict[str, Any]]:
    """Examples of random tokens, half of each an answer."""
    tokens = torch.randint(1, 150_000, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]} for ids in tokens]


def make(device: torch.device, length: int, total: int, budget: int, mapping: str = "last") -> Bench:
    """A bench on `total` tokens in examples of `length`, with rows of `budget` tokens."""
    count = total // length
    size = replace(SIZES["middle"], examples=count, batch_size=min(count, budget // length), max_length=length)
    return Bench(size, "hidden", device, examples_of(length, count), mapping)


def medians(bench: Bench, repeats: int, ways: str = "ade") -> dict[str, float]:
    """Median seconds of each way, and of writing the cache."""
    start = time.perf_counter()
    bench.write_cache()
    found: dict[str, list[float]] = {way: [] for way in ways} | {"writing": [time.perf_counter() - start]}
    for repeat in range(repeats + 1):
        for way in ways:
            bench.prepare()
            start = time.perf_counter()
            getattr(bench, way)()
            bench.wait()
            if repeat > 0:
                found[way].append(time.perf_counter() - start)
    return {way: statistics.median(seconds) for way, seconds in found.items()}


def measure(device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """All rows of the CSV file."""
    rows = []

    def note(what: str, value: int, tokens: int, seconds: dict[str, float]) -> None:
        for way, time_taken in seconds.items():
            row = {"what": what, "value": value, "way": way, "seconds": time_taken, "tokens": tokens}
            rows.append(row | {"microseconds_per_token": 1e6 * time_taken / tokens})
        print(what, value, {way: f"{time_taken:.3f} s" for way, time_taken in seconds.items()}, flush=True)

    for length in LENGTHS:
        note("length", length, 4096, medians(make(device, length, 4096, 1024), repeats))
    for budget in BUDGETS:
        note("budget", budget, 8192, medians(make(device, 128, 8192, budget), repeats))
    for layers in LAYERS:
        note("layers", layers, 2048, medians(make(device, 128, 2048, 1024, f"uniform:{layers}"), repeats))
    once = medians(make(device, 128, 4096, 1024), repeats)
    for epochs in range(1, EPOCHS + 1):
        note("epochs", epochs, 4096 * epochs, {
            "a": once["a"] * epochs, "d": once["d"] * epochs, "e": once["writing"] + once["e"] * epochs
        })  # fmt: skip
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Four panels: microseconds a token over length, row, layers; seconds over epochs."""
    from matplotlib import pyplot

    titles = {
        "length": "Tokens of an example", "budget": "Tokens of a row", "layers": "Mapped layers", "epochs": "Epochs",
    }  # fmt: skip
    figure, panels = pyplot.subplots(1, 4, figsize=(14, 3.4), layout="constrained")
    for panel, (what, title) in zip(panels, titles.items(), strict=True):
        unit = "seconds" if what == "epochs" else "microseconds_per_token"
        for way, name in WAYS.items():
            points = [(float(r["value"]), float(r[unit])) for r in rows if r["what"] == what and r["way"] == way]
            panel.plot(*zip(*points, strict=True), marker="o", label=name)
        if what != "epochs":
            panel.set_xscale("log", base=2)
        panel.set(xlabel=title, ylabel=unit.replace("_", " "), ylim=(0, None))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.grid(alpha=0.3)
    panels[-1].legend(loc="upper left")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure, write the CSV file, and plot it if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    rows = measure(torch.device("cuda" if torch.cuda.is_available() else "cpu"), arguments.repeats)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
