"""What is aligned, in which layers, and between which tokens: every kind of pair on the quickstart's models and data.

    python -m benchmarks.pair_kinds run --seeds 0 1 2
    python -m benchmarks.pair_kinds document   # the tables of docs/effectiveness.md

Every row is a real `KavaTrainer` run of the quickstart's recipe with a few arguments changed. A seed decides the
student's start, the projector's start and the order of the data. Cross-entropy is that of the answers of 500 held-out
problems, in nats for each of their *characters*, their end-of-text with them, so that students of different tokenizers
compare; exact match is counted on the first 200. Rows go to a CSV file, and what is in it already is not run again.
"""

import argparse
import csv
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

import datasets  # noqa: E402
import torch  # noqa: E402
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2ForCausalLM,
    logging,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar  # noqa: E402

from benchmarks.effectiveness import RECIPE, RememberedTeacher, read_rows  # noqa: E402
from benchmarks.pair_kinds_arms import (  # noqa: E402
    ARMS,
    BATCH,
    CHARACTERS,
    EMBEDDED,
    PIECES,
    QUICKSTART,
    READERS,
    ROWS,
    SECOND,
    SECOND_STEPS,
    STEPS,
    TABLES,
    Table,
)
from benchmarks.tables import fill, markdown, mean_and_range  # noqa: E402
from benchmarks.train_quickstart_teacher import (  # noqa: E402
    END_OF_TEXT,
    build_tokenizer,
    evaluate,
    student_config,
    teacher_config,
    train,
)
from kava_trainer.config.arguments import KavaArguments  # noqa: E402
from kava_trainer.config.parser import parse_arguments  # noqa: E402
from kava_trainer.data.formats import PROMPT  # noqa: E402
from kava_trainer.data.selection import learned_tokens  # noqa: E402
from kava_trainer.evaluation.answers import answer_cross_entropy, evaluate_model, longest_answer  # noqa: E402
from kava_trainer.models.packed_attention import enable_packing  # noqa: E402
from kava_trainer.models.student import load_student  # noqa: E402
from kava_trainer.models.teacher import OnlineTeacher, freeze, load_teacher  # noqa: E402
from kava_trainer.quickstart import SPLIT_SIZES  # noqa: E402
from kava_trainer.quickstart.problems import generate_problems  # noqa: E402
from kava_trainer.runs.pair.layers import with_chosen_layers  # noqa: E402
from kava_trainer.runs.pair.models import Models  # noqa: E402
from kava_trainer.runs.pair.tokenizers import load_tokenizers, teacher_readings  # noqa: E402
from kava_trainer.runs.setup import Data, load_data, make_trainer  # noqa: E402
from kava_trainer.trainer.trainer import KavaTrainer  # noqa: E402
from kava_trainer.utils.atomic_files import write_folder_atomically  # noqa: E402
from kava_trainer.utils.console import Console  # noqa: E402

CSV_FILE, DOCUMENT = ROOT / "docs" / "pair_kinds.csv", ROOT / "docs" / "effectiveness.md"
KEY = ("reader", "arm", "seed", "steps", "rows")
"""What tells one measurement from another."""
MEASURED = ("cos_sim", "margin", "cka")
COLUMNS = (*KEY, "cross_entropy", "exact_match", *MEASURED, "one_to_one", "merged", "left_out", "seconds")
EXACT_MATCH_SAMPLES = 200
PIECES_SIZE, UNKNOWN = int(PIECES.split()[0]), "<unk>"


def train_tokenizer(reader: str) -> PreTrainedTokenizerFast:
    """One of the student's own, trained on the quickstart's training text.

    Args:
        reader: `CHARACTERS`, whose tokens are the characters of that text, or `PIECES`, a byte-level BPE that splits
            numbers into digits as the quickstart's does.
    """
    problems = generate_problems(SPLIT_SIZES["train"])
    texts = [f"{PROMPT.format(question=problem['question'])} {problem['answer']}" for problem in problems]
    kept = {"special_tokens": [END_OF_TEXT, UNKNOWN], "show_progress": False}
    if reader == CHARACTERS:
        made = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
        made.pre_tokenizer, made.decoder = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse()
        trainer = trainers.WordLevelTrainer(**kept)
    else:
        made = Tokenizer(models.BPE())
        digits, pieces = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.pre_tokenizer, made.decoder = pre_tokenizers.Sequence([digits, pieces]), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=PIECES_SIZE, initial_alphabet=alphabet, **kept)
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, unk_token=UNKNOWN
    )


def nats_of_a_character(model: PreTrainedModel, data: Data, batch_size: int) -> float:
    """Cross-entropy of the held-out answers, their end-of-text with them, for each of their characters."""
    held_out = data.evaluation
    mean = answer_cross_entropy(model, held_out, data.collator, batch_size)
    return mean * learned_tokens(held_out) / sum(map(len, held_out["answer_text"]))


def second_teacher(folder: Path) -> PreTrainedModel:
    """A teacher of the embedded one's shape that began elsewhere and was trained for `SECOND_STEPS` steps alone."""
    if not folder.exists():
        torch.manual_seed(1)
        model, tokenizer = Qwen2ForCausalLM(teacher_config()), build_tokenizer()
        train(model, tokenizer, SECOND_STEPS)
        print(f"The second teacher: {evaluate(model, tokenizer)}", flush=True)
        write_folder_atomically(folder, lambda path: (model.save_pretrained(path), tokenizer.save_pretrained(path)))
    return freeze(AutoModelForCausalLM.from_pretrained(folder))


class Bench:
    """What all runs share: the teachers, the states of the first, and the data in each student's tokens.

    Args:
        second: the folder of a second teacher, which is made where it is missing and wanted.
    """

    def __init__(self, second: Path) -> None:
        self._second_folder = second
        logging.set_verbosity_error()
        disable_progress_bar()
        datasets.disable_progress_bars()
        self._folder = tempfile.TemporaryDirectory()
        self._students = {reader: self._student(reader) for reader in READERS}
        arguments = self.arguments(QUICKSTART, "SFT", 0, 1, 1)
        self._teacher = load_teacher(arguments.model, arguments.training.device)
        enable_packing(self._teacher)
        self._data: dict[tuple[str, int | None, str], Data] = {}
        self._remembered: tuple[list[Any], RememberedTeacher] | None = None

    @cached_property
    def _second(self) -> PreTrainedModel:
        return second_teacher(self._second_folder)

    def _student(self, reader: str) -> str:
        """The folder of a student's tokenizer and shape, which is the quickstart's but for the tokens."""
        if reader == QUICKSTART:
            return QUICKSTART
        folder = f"{self._folder.name}/{reader}"
        tokenizer, config = train_tokenizer(reader), student_config()
        config.vocab_size, config.eos_token_id = len(tokenizer), tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
        tokenizer.save_pretrained(folder)
        config.save_pretrained(folder)
        return folder

    def arguments(self, reader: str, arm: str, seed: int, steps: int, rows: int) -> KavaArguments:
        """Of one run, which saves nothing."""
        other = {} if reader == QUICKSTART else {"student_init": "random", "max_length": 512}
        given = {
            "output_dir": f"{self._folder.name}/out", "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
            "use_cpu": True, "plain_output": True, "run_control": False, "max_eval_samples": 500, "seed": seed,
            "max_steps": steps, "warmup_steps": max(1, steps // 10), "logging_steps": 10_000,
            "per_device_train_batch_size": BATCH, "max_train_samples": rows,
            "student_model_name_or_path": self._students[reader], **other, **ARMS[arm].changes,
        }  # fmt: skip
        if len(ARMS[arm].teachers) > 1:
            places = {EMBEDDED: QUICKSTART, SECOND: str(self._second_folder)}
            given["teachers"] = json.dumps([{"model": places[name]} for name in ARMS[arm].teachers])
        return parse_arguments([str(RECIPE), *itertools.chain(*((f"--{k}", str(v)) for k, v in given.items()))])

    def _read(self, reader: str, arguments: KavaArguments) -> Data:
        key = reader, arguments.data.max_train_samples, arguments.data.token_alignment
        if key not in self._data:
            self._data[key] = load_data(Console(plain=True), arguments, load_tokenizers(arguments))
        return self._data[key]

    def _trainer(self, arm: str, arguments: KavaArguments, data: Data) -> KavaTrainer:
        training, tokenizer = arguments.training, load_tokenizers(arguments)
        readings = teacher_readings(arguments, tokenizer)
        set_seed(training.seed)
        student = load_student(arguments.model, self._teacher)
        others = [self._second] if training.choices else []
        first = self._second if ARMS[arm].teachers == (SECOND,) else self._teacher
        models = Models(first, student, tokenizer, readings=readings, others=others)
        trainer = make_trainer(training, with_chosen_layers(training, models, data.train, data.collator, None), data)
        if isinstance(trainer.teacher, OnlineTeacher) and trainer.teacher.model is self._teacher:
            trainer.terms.teacher = self._remember(trainer.teacher.layers)
        return trainer

    def _remember(self, layers: list[Any]) -> RememberedTeacher:
        """The teacher's states of some layers; those of others are forgotten."""
        if self._remembered is None or self._remembered[0] != layers:
            self._remembered = layers, RememberedTeacher(OnlineTeacher(self._teacher, layers))
        return self._remembered[1]

    def run(self, reader: str, arm: str, seed: int, steps: int, rows: int) -> dict[str, Any]:
        """Train one student and measure it."""
        arguments = self.arguments(reader, arm, seed, steps, rows)
        data = self._read(reader, arguments)
        trainer = self._trainer(arm, arguments, data)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        held_out, size = data.evaluation, trainer.args.per_device_eval_batch_size
        subset = held_out.select(range(EXACT_MATCH_SAMPLES))
        figures = evaluate_model(
            trainer.student, trainer.processing_class, subset, data.collator, size, longest_answer(held_out)
        )
        metrics = trainer.evaluate() if trainer.teacher is not None else {}
        return {
            "reader": reader, "arm": arm, "seed": seed, "steps": steps, "rows": rows,
            "cross_entropy": nats_of_a_character(trainer.student, data, size), "exact_match": figures["exact_match"],
            **{name: metrics.get(f"eval_{name}") for name in MEASURED},
            **{name: data.token_alignment.get(0, {}).get(name) for name in ("one_to_one", "merged", "left_out")},
            "seconds": round(seconds, 1),
        }  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Run what is missing and append it to the CSV file, all seeds of one arm after another."""
    bench = Bench(options.second)
    for reader, arm, seed in itertools.product(options.readers, options.arms, options.seeds):
        job, known = (
            dict(zip(KEY, (reader, arm, seed, options.steps, options.rows), strict=True)),
            read_rows(options.csv),
        )
        if reader not in ARMS[arm].readers or any(all(row[k] == str(v) for k, v in job.items()) for row in known):
            continue
        row = bench.run(**job)
        with options.csv.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if not known:
                writer.writeheader()
            writer.writerow({name: f"{v:.5g}" if isinstance(v, float) else v for name, v in row.items()})
        print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items()), flush=True)


def table(name: str, rows: list[dict[str, str]]) -> str:
    """A Markdown table of what is measured, student by student, the most training first, then the best."""
    asked = TABLES[name]
    groups: dict[tuple[str, str, str, str], list[dict[str, str]]] = {}
    for row in rows:
        key = row["reader"], row["rows"], row["steps"], row["arm"]
        if _holds(asked, *key):
            groups.setdefault(key, []).append(row)
    if not groups:
        return "Not measured yet."
    ordered = sorted(groups.items(), key=lambda item: _rank(*item))
    varies = [len(values) > 1 for values in (asked.readers, asked.rows, asked.steps)]
    lines = [
        [
            arm, *itertools.compress((reader, count, steps), varies), str(len(found)),
            mean_and_range([row["cross_entropy"] for row in found], 3),
            mean_and_range([row["exact_match"] for row in found], 1, 100.0),
            *(mean_and_range([row[figure] for row in found], 3) for figure in MEASURED),
        ]
        for (reader, count, steps, arm), found in ordered
    ]  # fmt: skip
    told = itertools.compress(("Student reads", "Examples", "Steps"), varies)
    titles = ["What", *told, "Seeds", "Nats a character", "Exact match %", "CosSim", "Margin", "CKA"]
    return markdown(titles, lines)


def _holds(asked: Table, reader: str, rows: str, steps: str, arm: str) -> bool:
    return arm in asked.arms and reader in asked.readers and int(steps) in asked.steps and int(rows) in asked.rows


def _rank(key: tuple[str, str, str, str], rows: list[dict[str, str]]) -> tuple[float, ...]:
    reader, count, steps, _ = key
    loss = statistics.mean(float(row["cross_entropy"]) for row in rows)
    return READERS.index(reader), -int(count), -int(steps), loss


def document(text: str, rows: list[dict[str, str]]) -> str:
    """The document with each table between its two marks made anew."""
    for name in TABLES:
        text = fill(text, f"pairs {name}", table(name, rows))
    return text


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "document"))
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rows", type=int, default=ROWS, help="training examples")
    parser.add_argument("--second", type=Path, default=Path(tempfile.gettempdir(), "kava-second-teacher"))
    parser.add_argument("--csv", type=Path, default=CSV_FILE)
    options = parser.parse_args()
    if options.command == "run":
        torch.set_num_threads(1)
        run(options)
        return
    DOCUMENT.write_text(document(DOCUMENT.read_text(), read_rows(options.csv)))


if __name__ == "__main__":
    main()
