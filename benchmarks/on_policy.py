"""Where the student's own answers pay: on-policy distillation against ways without it, on the quickstart pair.

    python -m benchmarks.on_policy run --workers 2
    python -m benchmarks.on_policy document   # the tables of docs/on-policy.md

Every row is a real `KavaTrainer` run of equal optimizer steps of 32 examples from an equal start. A seed decides the
student's start, the order of the data and the sampling. Cross-entropy is in nats on the answers of 500 held-out
problems; exact match is counted on the first 200 of them. The teacher runs beside the student, and no state is
remembered, so that seconds compare. Rows go to a CSV file, and what is in it already is not run again.
"""

import argparse
import csv
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

import datasets  # noqa: E402
import torch  # noqa: E402
from filelock import FileLock  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402
from transformers import logging, set_seed  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

from benchmarks.effectiveness import read_rows  # noqa: E402
from benchmarks.on_policy_arms import ARMS, BASE, ON_POLICY, SETTINGS, SFT, STATES, WITHOUT, same_width  # noqa: E402
from benchmarks.tables import fill, markdown, mean_and_range  # noqa: E402
from kava_trainer.config.arguments import KavaArguments  # noqa: E402
from kava_trainer.config.layer_mapping import resolve_layer_pairs  # noqa: E402
from kava_trainer.config.parser import parse_arguments  # noqa: E402
from kava_trainer.distillation.rollouts.sampling import Sampling, sample_answers  # noqa: E402
from kava_trainer.evaluation.answers import answer_cross_entropy, evaluate_model, longest_answer  # noqa: E402
from kava_trainer.models.generation.generate import stop_tokens  # noqa: E402
from kava_trainer.models.packed_attention import enable_packing  # noqa: E402
from kava_trainer.models.student import load_student  # noqa: E402
from kava_trainer.models.teacher import load_teacher  # noqa: E402
from kava_trainer.quickstart import SPLIT_SIZES  # noqa: E402
from kava_trainer.quickstart.problems import generate_problems  # noqa: E402
from kava_trainer.runs.pair.choice import find_cut  # noqa: E402
from kava_trainer.runs.pair.models import Models  # noqa: E402
from kava_trainer.runs.pair.tokenizers import load_tokenizers  # noqa: E402
from kava_trainer.runs.setup import Data, load_data, make_trainer  # noqa: E402
from kava_trainer.trainer.trainer import KavaTrainer  # noqa: E402
from kava_trainer.utils.atomic_files import write_atomically, write_folder_atomically  # noqa: E402
from kava_trainer.utils.console import Console  # noqa: E402

CSV_FILE, DOCUMENT = ROOT / "docs" / "on_policy.csv", ROOT / "docs" / "on-policy.md"
KEY = ("setting", "arm", "seed", "steps")
"""What tells one measurement from another."""
COLUMNS = (
    *KEY,
    "cross_entropy_before",
    "exact_match_before",
    "cross_entropy",
    "exact_match",
    "rollout_length",
    "seconds",
)
EXACT_MATCH_SAMPLES = 200
_QUICKSTART = {"student_model_name_or_path": "quickstart"}


class Bench:
    """What all runs share: the teacher, its answers, and students as far as they are trained before.

    Args:
        folder: keeps them for later runs.
    """

    def __init__(self, folder: Path) -> None:
        logging.set_verbosity_error()
        disable_progress_bar()
        datasets.disable_progress_bars()
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._problems = generate_problems(SPLIT_SIZES["train"])
        arguments = self._arguments(self._rows("plenty", "answers"), {**SFT, **_QUICKSTART}, 0, 1)
        self._tokenizer = load_tokenizers(arguments)
        self._teacher = load_teacher(arguments.model, arguments.training.device)
        enable_packing(self._teacher)
        self._data: dict[str, Data] = {}

    def _arguments(self, rows: str, changes: dict[str, Any], seed: int, steps: int) -> KavaArguments:
        given = {
            **BASE, "dataset_name": rows, "max_steps": steps, "seed": seed, "output_dir": f"{self._folder}/out",
            **changes,
        }  # fmt: skip
        given["warmup_steps"] = max(1, given["max_steps"] // 10)
        return parse_arguments(list(itertools.chain(*((f"--{name}", str(value)) for name, value in given.items()))))

    def _rows(self, setting: str, kind: str) -> str:
        """The folder of a setting's data set; the held-out problems are those of the quickstart."""
        asked = SETTINGS[setting]
        count = asked.answered if kind == "answers" else asked.prompts
        folder = self._folder / f"{kind}-{count}"
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                rows = self._problems[:count]
                if kind == "prompts":
                    rows = [{"question": row["question"]} for row in rows]
                elif kind == "teacher":
                    answers = self._teachers_answers()
                    rows = [
                        {"question": row["question"], "answer": own} for row, own in zip(rows, answers, strict=False)
                    ]
                splits = {"train": rows, "test": generate_problems(SPLIT_SIZES["test"], "test")}
                write_folder_atomically(folder, lambda path: _write_splits(path, splits))
        return str(folder)

    def _teachers_answers(self) -> list[str]:
        """One answer of the teacher's to each training problem, sampled as it is."""
        file = self._folder / "teacher.json"
        with FileLock(f"{file}.lock"):
            if not file.exists():
                data = self._loaded("plenty", "answers").train
                prompts = [row["input_ids"][: row["prompt_length"]] for row in data]
                ends = stop_tokens(self._teacher, self._tokenizer)
                size = BASE["on_policy_max_new_tokens"]
                sampling = Sampling(
                    1.0, 1.0, size, tuple(ends), self._tokenizer.pad_token_id, 0, 500, len(self._tokenizer)
                )
                torch.manual_seed(0)
                with torch.no_grad():
                    answers = sample_answers(prompts, self._teacher, sampling).tokens
                texts = [self._tokenizer.decode(own, skip_special_tokens=True).strip() for own in answers]
                write_atomically(file, lambda path: path.write_text(json.dumps(texts)))
            return json.loads(file.read_text())

    def _loaded(self, setting: str, kind: str) -> Data:
        rows = self._rows(setting, kind)
        if rows not in self._data:
            changes = {**SFT, **_QUICKSTART, "on_policy_fraction": float(kind == "prompts"), "kd_weight": 1.0}
            self._data[rows] = load_data(Console(plain=True), self._arguments(rows, changes, 0, 1), self._tokenizer)
        return self._data[rows]

    def _trainer(self, arguments: KavaArguments, data: Data, cut: Any = None) -> KavaTrainer:
        set_seed(arguments.training.seed)
        student = load_student(arguments.model, self._teacher, cut=cut)
        return make_trainer(arguments.training, Models(self._teacher, student, self._tokenizer, cut), data)

    def _start(self, setting: str, seed: int) -> tuple[str, list[tuple[int, int]]]:
        """The folder of the student that a setting begins with, once for a seed, and its pairs of layers if cut."""
        asked, data = SETTINGS[setting], self._loaded(setting, "answers")
        folder = self._folder / f"student-{setting.replace(', ', '-').replace(' ', '-')}-{seed}"
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                student = {"student_num_layers": 2} if asked.cut else _QUICKSTART
                changes = {**SFT, **asked.before, **student}
                arguments = self._arguments(self._rows(setting, "answers"), changes, seed, 1)
                cut = find_cut(Console(plain=True), arguments, self._teacher, data.train, data.collator)
                trainer = self._trainer(arguments, data, cut)
                trainer.train()
                kept = [layer + 1 for layer in cut.kept] if cut else []
                write_atomically(f"{folder}.json", lambda path: path.write_text(json.dumps(kept)))
                write_folder_atomically(folder, trainer.save_student)
        kept = json.loads(Path(f"{folder}.json").read_text())
        depth = self._teacher.config.num_hidden_layers
        return str(folder), resolve_layer_pairs("inherited", len(kept), depth, kept) if kept else []

    def _figures(self, trainer: KavaTrainer, data: Data) -> tuple[float, float]:
        held_out, size = data.evaluation, trainer.args.per_device_eval_batch_size
        subset = held_out.select(range(EXACT_MATCH_SAMPLES))
        longest = longest_answer(held_out)
        figures = evaluate_model(trainer.student, self._tokenizer, subset, data.collator, size, longest)
        return answer_cross_entropy(trainer.student, held_out, data.collator, size), figures["exact_match"]

    def run(self, setting: str, arm: str, seed: int, steps: int) -> dict[str, Any]:
        """Train one student and measure it before and after."""
        way = ARMS[arm]
        folder, layers = self._start(setting, seed)
        changes = {**way.changes, "student_model_name_or_path": folder}
        if way.states:
            changes |= same_width(layers) if layers else STATES
        data = self._loaded(setting, way.rows)
        trainer = self._trainer(self._arguments(self._rows(setting, way.rows), changes, seed, steps), data)
        before = self._figures(trainer, data)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        after = self._figures(trainer, data)
        lengths = [line["rollout_length"] for line in trainer.state.log_history if "rollout_length" in line]
        values = (setting, arm, seed, steps, *before, *after, lengths[-1] if lengths else None, round(seconds, 1))
        return dict(zip(COLUMNS, values, strict=True))


def _write_splits(folder: Path, splits: dict[str, list[dict[str, str]]]) -> None:
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


_bench: Bench | None = None


def _work(job: tuple[Path, tuple[str, str, int, int]]) -> dict[str, Any]:
    """One row of the CSV, in a worker process that keeps its `Bench`."""
    global _bench
    folder, row = job
    _bench = _bench or Bench(folder)
    return _bench.run(*row)


def run(options: argparse.Namespace) -> None:
    """Run what is missing and append it to the CSV file, all arms of one seed after another."""
    known = read_rows(options.csv)
    done = {tuple(row[name] for name in KEY) for row in known}
    asked = [
        (setting, arm, seed, options.steps or SETTINGS[setting].steps)
        for seed, setting, arm in itertools.product(options.seeds, options.settings, options.arms)
        if setting in ARMS[arm].only
    ]
    jobs = [(options.folder, row) for row in asked if tuple(map(str, row)) not in done]
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // options.workers)
    with (
        options.csv.open("a", newline="") as file,
        context.Pool(options.workers, torch.set_num_threads, (threads,)) as pool,
    ):
        writer = csv.DictWriter(file, COLUMNS)
        if not known:
            writer.writeheader()
        for row in tqdm(pool.imap_unordered(_work, jobs), total=len(jobs), desc="Runs"):
            writer.writerow({name: f"{v:.5g}" if isinstance(v, float) else v for name, v in row.items()})
            file.flush()


def table(setting: str, rows: list[dict[str, str]]) -> str:
    """A Markdown table of what is measured of a setting: the longest runs first, then the lowest cross-entropy."""
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        if row["setting"] == setting:
            groups.setdefault((row["steps"], row["arm"]), []).append(row)
    if not groups:
        return "Not measured yet."
    ordered = sorted(
        groups.items(),
        key=lambda item: (-int(item[0][0]), statistics.mean(float(r["cross_entropy"]) for r in item[1])),
    )
    start = max(groups.values(), key=len)
    lines = [["before", "", str(len(start)), *_cells(start, "cross_entropy_before", "exact_match_before"), ""]]
    for (steps, arm), found in ordered:
        cells = _cells(found, "cross_entropy", "exact_match")
        lines.append([arm, steps, str(len(found)), *cells, mean_and_range([row["seconds"] for row in found], 0)])
    return markdown(["What", "Steps", "Seeds", "Cross-entropy", "Exact match %", "Seconds"], lines)


def _cells(rows: list[dict[str, str]], loss: str, matches: str) -> list[str]:
    return [
        mean_and_range([row[loss] for row in rows], 3),
        mean_and_range([row[matches] for row in rows], 1, 100.0),
    ]


def document(text: str, rows: list[dict[str, str]]) -> str:
    """The document with the table of each setting between its two marks made anew."""
    for setting in SETTINGS:
        text = fill(text, f"on-policy {setting}", table(setting, rows))
    return text


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "document"))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[*WITHOUT, *ON_POLICY])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="optimizer steps of every way, in place of the setting's own")
    parser.add_argument("--workers", type=int, default=1, help="processes, which share the cores")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "kava-on-policy"))
    parser.add_argument("--csv", type=Path, default=CSV_FILE)
    options = parser.parse_args()
    if options.command == "run":
        run(options)
    else:
        DOCUMENT.write_text(document(DOCUMENT.read_text(), read_rows(options.csv)))


if __name__ == "__main__":
    main()
