"""What another busy process costs: a short quickstart beside one, and on the free machine, with threads that wait for
each other spinning, as OpenMP has it, and as KAVA has it.

python benchmarks/busy.py --out benchmarks/results/busy.csv
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

STEPS = 100
ENVIRONMENTS = {
    "spinning": {"GOMP_SPINCOUNT": "300000"},  # of libgomp, where nothing is set
    "kava": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
"""By name, what is set beside the user's own environment."""


def run_quickstart(environment: dict[str, str]) -> float:
    """Seconds of a quickstart of some steps, from start to end, without a control."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"max_steps": STEPS, "run_control": "false", "output_dir": folder, "final_dir": folder}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, str(ROOT / "run_kava.py"), "quickstart", *words]
        began = time.monotonic()
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, **environment}, cwd=ROOT)
        return time.monotonic() - began


def measure(environment: dict[str, str], busy: int) -> float:
    """`run_quickstart` beside some processes that keep a core busy each."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        return run_quickstart(environment)
    finally:
        for other in others:
            other.kill()
            other.wait()


def main() -> None:
    """Measure all of them in turn, some rounds, and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=list(ENVIRONMENTS), choices=list(ENVIRONMENTS))
    asked = parser.parse_args()
    seconds = defaultdict(list)
    for _ in range(asked.rounds):
        for name in asked.only:
            for busy in (0, 1):
                seconds[name, busy].append(measure(ENVIRONMENTS[name], busy))
                print(name, busy, f"{seconds[name, busy][-1]:.1f} s", flush=True)
    free = statistics.median(seconds[asked.only[0], 0])
    with asked.out.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["machine", "waiting", "busy_processes", "seconds", "against_free_spinning"])
        for (name, busy), found in seconds.items():
            median = statistics.median(found)
            table.writerow([f"cpu x {os.cpu_count()}", name, busy, f"{median:.1f}", f"{median / free:.2f}"])


if __name__ == "__main__":
    main()
