"""What each way of distilling is worth on the quickstart pair, at equal steps on equal data.

    python benchmarks/effectiveness.py run --workers 2
    python benchmarks/effectiveness.py run --workers 2 --groups finalists --seeds 0 1 2 3 4 5 6 7
    python benchmarks/effectiveness.py document   # the tables of docs/effectiveness.md

Every run is a real `KavaTrainer` run with the quickstart recipe and a few arguments changed; a seed decides the
student's start, the projector's start and the order of the data. Rows go to a CSV file, and what is in it already is
not run again. The teacher's states are computed once in each worker and remembered by their tokens, which changes no
figure and saves the larger half of the time.
"""

import argparse
import csv
import functools
import hashlib
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
from torch.nn.utils.rnn import pad_sequence  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402
from transformers import TrainerCallback, logging, set_seed  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

from benchmarks.effectiveness_grid import BASE, GROUPS, SFT  # noqa: E402
from benchmarks.tables import fill, mean_and_range  # noqa: E402
from kava_trainer.config.arguments import KavaArguments  # noqa: E402
from kava_trainer.config.layer_mapping import resolve_layer_pairs  # noqa: E402
from kava_trainer.config.parser import parse_arguments  # noqa: E402
from kava_trainer.evaluation.answers import evaluate_model, longest_answer  # noqa: E402
from kava_trainer.models.packed_attention import enable_packing  # noqa: E402
from kava_trainer.models.student import load_student  # noqa: E402
from kava_trainer.models.teacher import OnlineTeacher, load_teacher  # noqa: E402
from kava_trainer.runs.pair.models import Models  # noqa: E402
from kava_trainer.runs.pair.tokenizers import load_tokenizers  # noqa: E402
from kava_trainer.runs.setup import load_data, make_trainer  # noqa: E402
from kava_trainer.trainer.trainer import KavaTrainer  # noqa: E402
from kava_trainer.utils.atomic_files import write_folder_atomically  # noqa: E402
from kava_trainer.utils.console import Console  # noqa: E402

RECIPE = ROOT / "training_args" / "quickstart.json"
CSV_FILE, DOCUMENT = ROOT / "docs" / "effectiveness.csv", ROOT / "docs" / "effectiveness.md"
FIGURES = (
    "cross_entropy", "exact_match", "cos_sim", "centred_cos_sim", "margin", "cka", "student_effective_rank",
    "target_effective_rank", "collapsed", "step_of_cos_sim_0.90", "margin_at_0.90", "train_seconds",
)  # fmt: skip
EXACT_MATCH_SAMPLES, MOST_SEEDS = 200, 8
LEARNING = (
    "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps", "mercator_weight", "mse_weight", "lm_weight", "kd_weight", "kd_temperature",
    "kd_beta", "anchor_weight", "alignment_schedule", "layer_mapping", "projector_direction", "projector_anchor",
    "projector_init", "projector_mlp_ratio", "projector_dropout", "projector_learning_rate",
)  # fmt: skip
"""What decides a run's figures; rows with equal values and equal seeds are one measurement."""
COLUMNS = ("seed", "trained", *FIGURES, *LEARNING)


def arguments_of(changes: dict[str, Any], seed: int = 0, folder: str = "unused") -> KavaArguments:
    """The quickstart recipe with the row's alignment, saving nothing."""
    changes = BASE | {name: value for name, value in changes.items() if name != "trained"} | {
        "output_dir": folder, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        "plain_output": True, "run_control": False, "seed": seed, "max_eval_samples": 500, "logging_steps": 1,
    }  # fmt: skip
    return parse_arguments([str(RECIPE), *itertools.chain(*((f"--{k}", str(v)) for k, v in changes.items()))])


def identity(changes: dict[str, Any], seed: int) -> dict[str, str]:
    """The columns of the CSV file that tell one measurement from another."""
    return {"seed": str(seed), "trained": str(changes.get("trained", False)), **_learning(json.dumps(changes))}


@functools.cache
def _learning(changes: str) -> dict[str, str]:
    training = arguments_of(json.loads(changes)).training
    return {name: str(getattr(training, name)) for name in LEARNING}


class RememberedTeacher:
    """A teacher whose states are computed once for each sequence of tokens and kept in memory.

    Args:
        teacher: the teacher that runs where a sequence is new.
    """

    def __init__(self, teacher: OnlineTeacher) -> None:
        self._teacher = teacher
        self._known: dict[bytes, dict[int, torch.Tensor]] = {}
        self.hidden_size, self.num_layers, self.head = teacher.hidden_size, teacher.num_layers, teacher.head

    def features(self, inputs: dict[str, Any]) -> dict[int, torch.Tensor]:
        """As `OnlineTeacher.features`; states at padding are 0."""
        examples = _examples_of(inputs)
        keys = [example.numpy().tobytes() for example in examples]
        new = {key: example for key, example in zip(keys, examples, strict=True) if key not in self._known}
        if new:
            lengths = tuple(len(example) for example in new.values())
            row = torch.cat(list(new.values())).unsqueeze(0)
            states = self._teacher.features(
                {"input_ids": row, "attention_mask": torch.ones_like(row), "packed_lengths": lengths}
            )
            for layer, tensor in states.items():
                for key, part in zip(new, tensor[0].split(lengths), strict=True):
                    self._known.setdefault(key, {})[layer] = part.clone()
        layers = self._known[keys[0]]
        if "packed_lengths" in inputs:
            return {layer: torch.cat([self._known[key][layer] for key in keys]).unsqueeze(0) for layer in layers}
        return {layer: pad_sequence([self._known[key][layer] for key in keys], batch_first=True) for layer in layers}


def _examples_of(inputs: dict[str, Any]) -> list[torch.Tensor]:
    """The tokens of each example of a batch, padded or packed."""
    if "packed_lengths" in inputs:
        return list(inputs["input_ids"][0].split(inputs["packed_lengths"]))
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    return [row[:length] for row, length in zip(inputs["input_ids"], lengths, strict=True)]


class FirstGreat(TrainerCallback):
    """Runs the probe once, at the first step whose CosSim is 0.90; the run itself is not changed."""

    def __init__(self, trainer: KavaTrainer) -> None:
        self._trainer = trainer
        self.step: int | None = None
        self.margin: float | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Called after each step, for `logging_steps` is 1."""
        if self.step is None and logs.get("cos_sim", 0.0) >= 0.9:
            self.step = state.global_step
            self.margin = self._trainer.run_probe().mean()["margin"]


class Bench:
    """What all runs of one process share: data, tokenizer and the remembered teacher."""

    def __init__(self) -> None:
        logging.set_verbosity_error()
        disable_progress_bar()
        datasets.disable_progress_bars()
        self._folder = tempfile.TemporaryDirectory()
        arguments = arguments_of({})
        tokenizer = load_tokenizers(arguments)
        self._data = load_data(Console(plain=True), arguments, tokenizer)
        self._models = Models(load_teacher(arguments.model, arguments.training.device), None, tokenizer)
        enable_packing(self._models.teacher)
        layers = sorted({teacher for _, teacher in resolve_layer_pairs("uniform:2", 3, 4)})
        self._teacher = RememberedTeacher(OnlineTeacher(self._models.teacher, layers))

    def _trained_student(self, seed: int) -> str:
        """The folder of a student after one run with the next-token loss alone; it is made once for each seed."""
        key = hashlib.sha256(json.dumps(identity(SFT, seed)).encode()).hexdigest()[:16]
        folder = Path(tempfile.gettempdir()) / f"kava-trained-student-{key}"
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                trainer = self._trainer(arguments_of(SFT, seed, self._folder.name))
                trainer.train()
                write_folder_atomically(folder, trainer.save_student)
        return str(folder)

    def _trainer(self, arguments: KavaArguments) -> KavaTrainer:
        set_seed(arguments.training.seed)
        student = load_student(arguments.model, self._models.teacher)
        models = Models(self._models.teacher, student, self._models.tokenizer)
        trainer = make_trainer(arguments.training, models, self._data)
        if trainer.teacher is not None:
            trainer.terms.teacher = self._teacher
        return trainer

    def run(self, seed: int, changes: dict[str, Any]) -> dict[str, Any]:
        """Train one student and measure it on the 500 held-out problems; exact match on the first 200 of them."""
        changes = dict(changes)
        if changes.pop("trained", False):
            changes["student_model_name_or_path"] = self._trained_student(seed)
        trainer = self._trainer(arguments_of(changes, seed, self._folder.name))
        great = FirstGreat(trainer)
        trainer.add_callback(great)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        metrics = trainer.evaluate()
        held_out, size = self._data.evaluation, trainer.args.per_device_eval_batch_size
        subset = held_out.select(range(EXACT_MATCH_SAMPLES))
        figures = evaluate_model(
            trainer.student, self._models.tokenizer, subset, self._data.collator, size, longest_answer(held_out)
        )
        return {
            **{name: metrics.get(f"eval_{name}") for name in FIGURES},
            "cross_entropy": metrics["eval_lm_loss"],
            "exact_match": figures["exact_match"],
            "step_of_cos_sim_0.90": great.step,
            "margin_at_0.90": great.margin,
            "train_seconds": round(seconds, 1),
        }


_bench: Bench | None = None


def _work(job: tuple[int, dict[str, Any]]) -> dict[str, Any]:
    """One row of the CSV, in a worker process that keeps its `Bench`."""
    global _bench
    seed, changes = job
    _bench = _bench or Bench()
    return {**identity(changes, seed), **_bench.run(seed, changes)}


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows measured so far."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run(groups: list[str], seeds: list[int], workers: int, path: Path) -> None:
    """Run what is missing of some groups and append it to the CSV file, all groups of one seed after another."""
    known = read_rows(path)
    done = [_identity_of(row) for row in known]
    jobs = []
    for seed, group in itertools.product(seeds, groups):
        for changes in GROUPS[group]().values():
            if (key := identity(changes, seed)) not in done:
                done.append(key)
                jobs.append((seed, changes))
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // workers)
    with path.open("a", newline="") as file, context.Pool(workers, torch.set_num_threads, (threads,)) as pool:
        writer = csv.DictWriter(file, COLUMNS)
        if not known:
            writer.writeheader()
        for row in tqdm(pool.imap_unordered(_work, jobs), total=len(jobs), desc="Runs"):
            writer.writerow({name: f"{v:.5g}" if isinstance(v, float) else v for name, v in row.items()})
            file.flush()


def _identity_of(row: dict[str, str]) -> dict[str, str]:
    return {name: row[name] for name in ("seed", "trained", *LEARNING)}


def table(group: str, rows: list[dict[str, str]]) -> str:
    """A Markdown table of what is measured of a group, the best cross-entropy first."""
    shown = {
        "cross_entropy": ("Cross-entropy", 3, 1.0), "exact_match": ("Exact match %", 1, 100.0),
        "cos_sim": ("CosSim", 3, 1.0), "centred_cos_sim": ("Centred", 3, 1.0), "margin": ("Margin", 3, 1.0),
        "cka": ("CKA", 3, 1.0), "target_effective_rank": ("Rank of targets", 1, 1.0),
        "step_of_cos_sim_0.90": ("CosSim 0.90 at step", 0, 1.0),
        "margin_at_0.90": ("Margin then", 3, 1.0),
    }  # fmt: skip
    measured: list[tuple[str, list[dict[str, str]]]] = []
    for name, changes in GROUPS[group]().items():
        keys = [identity(changes, seed) for seed in range(MOST_SEEDS)]
        if found := [row for row in rows if _identity_of(row) in keys]:
            measured.append((name, found))
    if not measured:
        return "Not measured yet."
    titles = ["What", "Seeds", *(title for title, _, _ in shown.values())]
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for name, found in sorted(measured, key=lambda item: statistics.mean(float(r["cross_entropy"]) for r in item[1])):
        collapsed = sum(float(row["collapsed"] or 0) > 0 for row in found)
        label = name + (f" (collapsed in {collapsed})" if collapsed else "")
        cells = [
            mean_and_range([row[key] for row in found], digits, scale) for key, (_, digits, scale) in shown.items()
        ]
        lines.append(f"| {' | '.join([label, str(len(found)), *cells])} |")
    return "\n".join(lines)


def document(text: str, rows: list[dict[str, str]]) -> str:
    """The document with the table of each group between its two marks made anew."""
    for group in GROUPS:
        text = fill(text, group, table(group, rows))
    return text


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "document"))
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=1, help="processes, which share the cores")
    parser.add_argument("--csv", type=Path, default=CSV_FILE)
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.groups, arguments.seeds, arguments.workers, arguments.csv)
    else:
        DOCUMENT.write_text(document(DOCUMENT.read_text(), read_rows(arguments.csv)))


if __name__ == "__main__":
    main()
