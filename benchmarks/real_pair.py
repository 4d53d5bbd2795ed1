"""What each way of distilling is worth on a real pair: a student cut out of SmolLM2-135M-Instruct, on GSM8K.

    python -m benchmarks.real_pair run --teacher FOLDER --data train.jsonl --shapes "15 of 30" --seeds 0 1 2
    python -m benchmarks.real_pair document   # the tables of docs/effectiveness.md

Every row is a real `KavaTrainer` run of equal steps on equal examples from an equal start; a seed decides the order of
the data, and the start of what is random. Two figures of each student: cross-entropy in nats on held-out answers, and
on the questions alone as plain text, which the answers are not. Rows go to a CSV file, and what is in it already is not
run again, so a broken series goes on. The teacher's states are computed once for each example of a seed.
"""

import argparse
import csv
import itertools
import json
import os
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
from transformers import AutoConfig, logging, set_seed  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

from benchmarks.effectiveness import RememberedTeacher, read_rows  # noqa: E402
from benchmarks.real_pair_arms import ARMS, BASE, HALF_WIDTH, RATES, SHAPES, TRAINED  # noqa: E402
from benchmarks.tables import fill, markdown, mean_and_range  # noqa: E402
from kava_trainer.config.arguments import KavaArguments  # noqa: E402
from kava_trainer.config.parser import parse_arguments  # noqa: E402
from kava_trainer.data.encoding import encode_dataset  # noqa: E402
from kava_trainer.evaluation.answers import answer_cross_entropy  # noqa: E402
from kava_trainer.models.packed_attention import enable_packing  # noqa: E402
from kava_trainer.models.pruning.cut import Cut  # noqa: E402
from kava_trainer.models.student import load_student  # noqa: E402
from kava_trainer.models.teacher import OnlineTeacher, load_teacher  # noqa: E402
from kava_trainer.runs.pair.choice import find_cut  # noqa: E402
from kava_trainer.runs.pair.models import Models  # noqa: E402
from kava_trainer.runs.pair.tokenizers import load_tokenizers  # noqa: E402
from kava_trainer.runs.setup import load_data, make_trainer  # noqa: E402
from kava_trainer.trainer.trainer import KavaTrainer  # noqa: E402
from kava_trainer.utils.console import Console  # noqa: E402

CSV_FILE, DOCUMENT = ROOT / "docs" / "real_pair.csv", ROOT / "docs" / "effectiveness.md"
HELD_OUT = 100
"""Rows at the end of the data that nothing is trained on."""

BEFORE = ("15 of 30", "SFT", 1e-3, 100, 60)
"""Shape, arm, learning rate, seed and steps of the training that `TRAINED` has behind it."""

COLUMNS = (
    "shape", "arm", "learning_rate", "seed", "steps", "layers", "answers_before", "retention_before", "answers",
    "retention", "cos_sim", "seconds",
)  # fmt: skip
KEY = COLUMNS[:5]
"""What tells one measurement from another."""


class Bench:
    """What all runs of one process share: data, tokenizer, teacher, and the teacher's states of one seed's examples.

    Args:
        teacher: folder of the teacher.
        data: JSONL file of questions and answers.
    """

    def __init__(self, teacher: str, data: str) -> None:
        logging.set_verbosity_error()
        disable_progress_bar()
        datasets.disable_progress_bars()
        self._cuts: dict[str, Cut | None] = {}
        self._folder = tempfile.TemporaryDirectory()
        self._given = {"teacher_model_name_or_path": teacher, "dataset_name": self._split(data)}
        half = AutoConfig.from_pretrained(teacher)
        half.hidden_size, half.intermediate_size = half.hidden_size // 2, half.intermediate_size // 2
        half.head_dim = half.hidden_size // half.num_attention_heads
        half.save_pretrained(f"{self._folder.name}/{HALF_WIDTH}")
        arguments = self.arguments("24 of 30", "SFT", 3e-4, 0, 1)
        self._tokenizer = load_tokenizers(arguments)
        self._data = load_data(Console(plain=True), arguments, self._tokenizer)
        questions = datasets.Dataset.from_list([{"text": row["question"]} for row in self._held_out])
        self._questions = encode_dataset(questions, self._tokenizer, 512, "questions", data).dataset
        self._teacher = load_teacher(arguments.model, arguments.training.device)
        enable_packing(self._teacher)
        self._source: tuple[int, RememberedTeacher] | None = None

    def _split(self, data: str) -> str:
        """A folder with the training rows and the held-out ones of a file."""
        rows = [json.loads(line) for line in Path(data).read_text(encoding="utf-8").splitlines()]
        self._held_out = rows[-HELD_OUT:]
        for name, part in (("train", rows[:-HELD_OUT]), ("test", self._held_out)):
            text = "".join(json.dumps(row) + "\n" for row in part)
            Path(self._folder.name, f"{name}.jsonl").write_text(text, encoding="utf-8")
        return self._folder.name

    def arguments(self, shape: str, arm: str, rate: float, seed: int, steps: int) -> KavaArguments:
        """Of one run, which saves nothing."""
        given = {
            **BASE, **self._given, **SHAPES[shape], **ARMS[arm], "learning_rate": rate, "max_steps": steps,
            "warmup_steps": max(1, steps // 10), "seed": seed, "output_dir": f"{self._folder.name}/out",
        }  # fmt: skip
        for name in ("student_config_name", "student_model_name_or_path"):
            if given.get(name) in (HALF_WIDTH, TRAINED):
                given[name] = f"{self._folder.name}/{given[name]}"
        return parse_arguments(list(itertools.chain(*((f"--{name}", str(value)) for name, value in given.items()))))

    def _remembered(self, seed: int) -> RememberedTeacher:
        """The states of all layers; those of another seed's examples are forgotten."""
        if self._source is None or self._source[0] != seed:
            layers = list(range(1, self._teacher.config.num_hidden_layers + 1))
            self._source = seed, RememberedTeacher(OnlineTeacher(self._teacher, layers))
        return self._source[1]

    def _figures(self, student: Any) -> tuple[float, float]:
        """Cross-entropy on the held-out answers and on the questions."""
        with torch.autocast("cpu", torch.bfloat16):
            return tuple(
                answer_cross_entropy(student, examples, self._data.collator, 10)
                for examples in (self._data.evaluation, self._questions)
            )

    def _train_before(self) -> None:
        """The student that was trained before, on the examples in an order of its own."""
        folder = Path(self._folder.name, TRAINED)
        if not folder.exists():
            shape, arm, rate, seed, steps = BEFORE
            trainer = self.trainer(self.arguments(shape, arm, rate, seed, steps), self.cut(shape))
            trainer.train()
            trainer.student.save_pretrained(folder)
            self._tokenizer.save_pretrained(folder)

    def cut(self, shape: str) -> Cut | None:
        """What a student of a shape keeps of its teacher; it is chosen once."""
        if shape not in self._cuts:
            arguments = self.arguments(shape, "SFT", RATES[0], 0, 1)
            self._cuts[shape] = find_cut(
                Console(plain=True), arguments, self._teacher, self._data.train, self._data.collator
            )
        return self._cuts[shape]

    def trainer(self, arguments: KavaArguments, cut: Cut | None) -> KavaTrainer:
        """The trainer of one run."""
        set_seed(arguments.training.seed)
        student = load_student(arguments.model, self._teacher, cut=cut)
        trainer = make_trainer(
            arguments.training,
            Models(self._teacher, student, self._tokenizer, cut),
            self._data,
        )
        if trainer.teacher is not None:
            trainer.terms.teacher = self._remembered(arguments.training.seed)
        return trainer

    def run(self, shape: str, arm: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
        """Train one student and measure it before and after."""
        if TRAINED in SHAPES[shape].values():
            self._train_before()
        cut = self.cut(shape)
        trainer = self.trainer(self.arguments(shape, arm, rate, seed, steps), cut)
        before = self._figures(trainer.student)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        after = self._figures(trainer.student)
        logged = [line for line in trainer.state.log_history if "cos_sim" in line]
        return {
            "shape": shape, "arm": arm, "learning_rate": rate, "seed": seed, "steps": steps,
            "layers": ", ".join(map(str, cut.kept if cut else [])), "answers_before": before[0],
            "retention_before": before[1], "answers": after[0], "retention": after[1],
            "cos_sim": logged[-1]["cos_sim"] if logged else None, "seconds": round(seconds, 1),
        }  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Run what is missing and append it to the CSV file, all arms of one seed after another."""
    bench = Bench(options.teacher, options.data)
    for seed, shape, rate, arm in itertools.product(options.seeds, options.shapes, options.rates, options.arms):
        job = dict(zip(KEY, (shape, arm, rate, seed, options.steps), strict=True))
        known = read_rows(options.csv)
        if any(all(row[name] == str(value) for name, value in job.items()) for row in known):
            continue
        row = bench.run(shape, arm, rate, seed, options.steps)
        with options.csv.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if not known:
                writer.writeheader()
            writer.writerow({name: f"{v:.5g}" if isinstance(v, float) else v for name, v in row.items()})
        print(", ".join(f"{name} {row[name]:.4g}" if isinstance(row[name], float) else str(row[name])
                        for name in (*KEY, "answers", "retention", "seconds")), flush=True)  # fmt: skip


def table(shape: str, rows: list[dict[str, str]]) -> str:
    """A Markdown table of what is measured of a shape, the best on the answers first."""
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        if row["shape"] == shape:
            groups.setdefault((row["steps"], row["arm"], row["learning_rate"]), []).append(row)
    lines = [
        [
            arm,
            steps,
            f"{float(rate):g}",
            str(len(found)),
            *(mean_and_range([row[name] for row in found], 2) for name in ("answers", "retention")),
        ]
        for (steps, arm, rate), found in groups.items()
    ]
    if not lines:
        return "Not measured yet."
    lines.sort(key=lambda line: (int(line[1]), float(line[4].split()[0])))
    return markdown(["What", "Steps", "Learning rate", "Seeds", "Answers", "Questions"], lines)


def document(text: str, rows: list[dict[str, str]]) -> str:
    """The document with the table of each shape between its two marks made anew."""
    for shape in SHAPES:
        text = fill(text, f"real {shape}", table(shape, rows))
    return text


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "document"))
    parser.add_argument("--teacher", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--data", help="JSONL file of GSM8K's training split")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--csv", type=Path, default=CSV_FILE)
    options = parser.parse_args()
    if options.command == "run":
        run(options)
        return
    DOCUMENT.write_text(document(DOCUMENT.read_text(), read_rows(options.csv)))


if __name__ == "__main__":
    main()
