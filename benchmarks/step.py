"""What one distillation step costs, done the usual ways and KAVA's, interleaved in one process.

    python benchmarks/step.py --size quickstart|middle|real [--ways a,b,c,d,e,f,g] [--terms hidden|all] --out FILE.csv
    python benchmarks/step.py --terms on_policy --out FILE.csv

The second measures what the student's own answers cost: `benchmarks/step_rollouts.py`.

Every way does the forward and backward passes of the same examples with the same terms in the same precision; the
optimizer, equal for all, is left out. The ways:

a  the usual loop: padding to `max_length`, all hidden states, both vocabulary heads, a key-value cache, `.item()`
b  transformers' Trainer: padding to the longest of the batch, all hidden states, both vocabulary heads
c  as TRL and DistillKit do it: as b, with the losses on float32 logits at every position of the batch
d  KAVA with the teacher beside the student
e  KAVA with the teacher's states read from a cache on disk (writing it once is not part of the step)
f  the floor: forward and backward of the student's decoder alone, packed
g  plain fine-tuning with transformers' Trainer, padding to the longest

`fraction_of_limit` is the work that the terms need (counted on KAVA's own step by `FlopCounterMode`, without padding)
over the time times the rate of this machine's own matrix product, measured in the same run.
"""

import argparse
import csv
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

import psutil  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from accelerate.utils import send_to_device  # noqa: E402
from datasets import Dataset  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel  # noqa: E402

from benchmarks import step_rollouts  # noqa: E402
from benchmarks.step_sizes import SIZES, Size, texts_of  # noqa: E402
from kava_trainer.config.arguments import KavaTrainingArguments  # noqa: E402
from kava_trainer.data.collators import DistillationCollator, JoiningCollator  # noqa: E402
from kava_trainer.data.encoding import encode_dataset  # noqa: E402
from kava_trainer.data.packing import pack_step  # noqa: E402
from kava_trainer.distillation.loss_terms import needed_teacher_layers  # noqa: E402
from kava_trainer.distillation.losses import generalized_jsd_loss, mercator_loss  # noqa: E402
from kava_trainer.distillation.targets import HiddenStateTarget, build_target  # noqa: E402
from kava_trainer.distillation.teacher_cache import CachedTeacher, TeacherCache  # noqa: E402
from kava_trainer.models.hidden_states import run_decoder  # noqa: E402
from kava_trainer.models.layers import number_of_layers  # noqa: E402
from kava_trainer.models.teacher import OnlineTeacher, TeacherSource  # noqa: E402
from kava_trainer.trainer.trainer import KavaTrainer  # noqa: E402

COLUMNS = (
    "way", "size", "terms", "examples_per_second", "tokens_per_second", "ratio_to_usual", "ratio_to_floor",
    "fraction_of_limit", "peak_memory_bytes", "seconds", "repeats", "tokens", "flops", "matrix_flops_per_second",
    "device", "torch", "transformers",
)  # fmt: skip
TERMS = {"hidden": {"mercator_weight": 1.0, "lm_weight": 0.0}, "all": {"mercator_weight": 1.0, "kd_weight": 1.0}}


class Bench:
    """The pair, the examples of one step, and one method for each way of working through them.

    Args:
        size: which models and examples.
        terms: `hidden` (the Mercator loss alone) or `all` (with next-token loss and divergence).
        device: where it runs.
        examples: tokenised; by default those of the size.
        mapping: `layer_mapping`.
    """

    def __init__(
        self,
        size: Size,
        terms: str,
        device: torch.device,
        examples: list[dict[str, Any]] | None = None,
        mapping: str = "last",
    ) -> None:
        torch.manual_seed(0)
        self.size, self.device, self.with_logits = size, device, terms == "all"
        self.teacher, self.student = (self._model(config()) for config in (size.teacher, size.student))
        self.teacher.requires_grad_(False).eval()
        tokenizer = AutoTokenizer.from_pretrained(size.tokenizer)
        self.examples = examples or list(
            encode_dataset(texts_of(size), tokenizer, size.max_length, "Tokenizing").dataset
        )
        self.pad = DistillationCollator(tokenizer)
        self.tokens = sum(len(example["input_ids"]) for example in self.examples)
        self.answers = sum(label != -100 for example in self.examples for label in example["labels"][1:])
        args = self._arguments(terms, mapping)
        target = build_target(args, self.student, self.teacher)
        layers = needed_teacher_layers(args, target, number_of_layers(self.teacher))
        self.trainer = self._trainer(OnlineTeacher(self.teacher, layers), target, args)
        self.cache = TeacherCache(tempfile.mkdtemp(), {"teacher": "benchmark"}, layers, "bfloat16")
        self.cached_trainer = self._trainer(CachedTeacher(self.teacher, self.cache.read), target, args)
        self.target = target

    def _model(self, config: Any) -> PreTrainedModel:
        return AutoModelForCausalLM.from_config(config, dtype=self.size.dtype).to(self.device)

    def _arguments(self, terms: str, mapping: str) -> KavaTrainingArguments:
        return KavaTrainingArguments(
            output_dir=tempfile.mkdtemp(), use_cpu=self.device.type == "cpu", report_to="none", plain_output=True,
            per_device_train_batch_size=self.size.batch_size, save_strategy="no",
            projector_init="random", projector_dropout=0.0, layer_mapping=mapping,
            gradient_accumulation_steps=len(self.examples) // self.size.batch_size,
            max_tokens_per_batch=self.size.batch_size * self.size.max_length, **TERMS[terms],
        )  # fmt: skip

    def _trainer(self, teacher: TeacherSource, target: HiddenStateTarget, args: KavaTrainingArguments) -> KavaTrainer:
        data = Dataset.from_list(self.examples)
        return KavaTrainer(self.student, teacher, target, args, train_dataset=data, data_collator=self.pad)

    def write_cache(self) -> None:
        """Write the teacher's states, once."""
        examples = [example["input_ids"] for example in self.examples]
        self.cache.build(self.teacher, examples, self.cache.missing(examples), self.size.max_length)

    def _batches(self, padding: str) -> list[dict[str, torch.Tensor]]:
        """Micro-batches padded to their longest example, or to `max_length`."""
        step, batches = self.size.batch_size, []
        for start in range(0, len(self.examples), step):
            batch = self.pad(self.examples[start : start + step])
            extra = self.size.max_length - batch["input_ids"].shape[1] if padding == "max_length" else 0
            filler = {"input_ids": self.pad.pad_token_id, "attention_mask": 0, "labels": -100}
            batches.append({k: F.pad(batch[k], (0, extra), value=v).to(self.device) for k, v in filler.items()})
        return batches

    def _padded(self, padding: str, cache: bool, wait: bool, every_position: bool) -> None:
        """What most loops do: both whole models on padded batches, and the losses on what they return."""
        self.student.train()
        for batch in self._batches(padding):
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            options = {"output_hidden_states": True, "use_cache": cache}
            with torch.no_grad():
                teacher = self.teacher(**inputs, **options)
            student = self.student(**inputs, **options)
            mask = batch["attention_mask"].bool()
            loss = sum(
                mercator_loss(project(student.hidden_states[s]), teacher.hidden_states[t], mask, num_items=self.tokens)
                for project, (s, t) in zip(self.target.projectors, self.target.pairs, strict=True)
            ) / len(self.target.pairs)
            if self.with_logits:
                loss = loss + self._logits_loss(student.logits, teacher.logits, batch["labels"], every_position)
            loss.backward()
            if wait:
                loss.item()

    def _logits_loss(
        self, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, every_position: bool
    ) -> torch.Tensor:
        student, teacher, targets = student[:, :-1], teacher[:, :-1], labels[:, 1:]
        answers = targets != -100
        if not every_position:
            student, teacher, targets = student[answers], teacher[answers], targets[answers]
            answers = torch.ones_like(targets, dtype=torch.bool)
        flat = student.flatten(0, -2).float()
        lm = F.cross_entropy(flat, targets.flatten(), ignore_index=-100, reduction="sum") / self.answers
        return lm + generalized_jsd_loss(student, teacher, answers, num_items=self.answers)

    def a(self) -> None:
        """The usual loop."""
        self._padded("max_length", cache=True, wait=True, every_position=True)

    def b(self) -> None:
        """As in a subclass of transformers' Trainer."""
        self._padded("longest", cache=False, wait=False, every_position=False)

    def c(self) -> None:
        """As TRL and DistillKit do it."""
        self._padded("longest", cache=False, wait=False, every_position=True)

    def d(self) -> None:
        """KAVA with the teacher beside the student."""
        self._step(self.trainer, JoiningCollator())

    def e(self) -> None:
        """KAVA with a cache."""
        self._step(self.cached_trainer, JoiningCollator(self.cache.read))

    def _step(self, trainer: KavaTrainer, collator: JoiningCollator) -> None:
        joined = self._joined(collator)
        batches, counts = trainer.get_batch_samples(iter(joined), len(joined), self.device)
        for batch in batches:
            trainer.training_step(trainer.model, batch, counts)

    def _joined(self, collator: JoiningCollator) -> list[dict[str, Any]]:
        """What the training loader hands over, on the device."""
        step = self.size.batch_size
        batches = (collator(self.examples[start : start + step]) for start in range(0, len(self.examples), step))
        return [send_to_device(batch, self.device) for batch in batches]

    def f(self) -> None:
        """The floor: the student's decoder alone."""
        self.student.train()
        for row in pack_step(self._joined(JoiningCollator()), self.size.batch_size * self.size.max_length):
            run_decoder(self.student, row["input_ids"], packed_lengths=row["packed_lengths"]).sum().backward()

    def g(self) -> None:
        """Plain fine-tuning, padded to the longest of each batch."""
        self.student.train()
        for batch in self._batches("longest"):
            self.student(**batch, use_cache=False, num_items_in_batch=self.answers).loss.backward()

    def prepare(self) -> None:
        """Between two runs."""
        self.trainer.model.zero_grad()
        self.wait()

    def wait(self) -> None:
        """Until the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def needed_flops(self) -> int:
        """Floating-point operations of KAVA's own step: matrix products alone, and each of them once."""
        self.prepare()
        with FlopCounterMode(display=False) as counter:
            self.d()
        return counter.get_total_flops()


class PeakMemory:
    """The most memory in use within a `with` block: of the CUDA device, or of this process."""

    def __init__(self, device: torch.device) -> None:
        self._cuda, self.peak = device.type == "cuda", 0

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._done.wait(0.01):
            self.peak = max(self.peak, process.memory_info().rss)

    def __enter__(self) -> "PeakMemory":
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            self._done = threading.Event()
            self._thread = threading.Thread(target=self._watch)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._cuda:
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated()
        else:
            self._done.set()
            self._thread.join()


def matrix_rate(dtype: torch.dtype, device: torch.device, size: int) -> float:
    """Floating-point operations a second of a large square matrix product, the best of several."""
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def measure(bench: Bench, ways: list[str], repeats: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of every repeat and peak memory of each way; all ways take turns, after one round to warm up."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    peaks = dict.fromkeys(ways, 0)
    for repeat in range(repeats + 1):
        for way in ways:
            bench.prepare()
            with PeakMemory(bench.device) as memory:
                start = time.perf_counter()
                getattr(bench, way)()
                bench.wait()
                duration = time.perf_counter() - start
            if repeat > 0:
                seconds[way].append(duration)
                peaks[way] = max(peaks[way], memory.peak)
            print(f"round {repeat} way {way}: {duration:.2f} s", flush=True)
    return seconds, peaks


def rows_of(bench: Bench, arguments: argparse.Namespace, ways: list[str]) -> list[dict[str, Any]]:
    """One row of the CSV file for each way."""
    side = 2048 if bench.device.type == "cpu" else 8192
    rate = matrix_rate(bench.size.dtype, bench.device, side)
    flops = bench.needed_flops()
    if "e" in ways:
        bench.write_cache()
    seconds, peaks = measure(bench, ways, arguments.repeats)
    rate = max(rate, matrix_rate(bench.size.dtype, bench.device, side))
    median = {way: statistics.median(values) for way, values in seconds.items()}
    device = torch.cuda.get_device_name() if bench.device.type == "cuda" else f"cpu x {torch.get_num_threads()}"
    shared = {
        "size": arguments.size, "terms": arguments.terms, "repeats": arguments.repeats, "tokens": bench.tokens,
        "flops": flops, "matrix_flops_per_second": rate, "device": f"{device} ({platform.machine()})",
        "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    return [
        shared
        | {
            "way": way,
            "seconds": time_taken,
            "examples_per_second": len(bench.examples) / time_taken,
            "tokens_per_second": bench.tokens / time_taken,
            "ratio_to_usual": median["a"] / time_taken if "a" in median else None,
            "ratio_to_floor": time_taken / median["f"] if "f" in median else None,
            "fraction_of_limit": flops / rate / time_taken if way in "abcd" else None,
            "peak_memory_bytes": peaks[way],
        }
        for way, time_taken in median.items()
    ]


def write_rows(path: Path, columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    """Write the CSV file, and print what was found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    for row in rows:
        print({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items() if k in columns[:10]})


def main() -> None:
    """Measure and write the CSV file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="quickstart")
    parser.add_argument("--ways", default="a,b,c,d,e,f,g")
    parser.add_argument("--terms", choices=[*TERMS, "on_policy"], default="hidden")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.terms == "on_policy":
        if arguments.size != "quickstart" or arguments.ways != parser.get_default("ways"):
            parser.error("--terms on_policy is measured at --size quickstart, in ways of its own")
        bench = step_rollouts.RolloutBench()
        return write_rows(arguments.out, step_rollouts.COLUMNS, step_rollouts.rows_of(bench, arguments.repeats))
    ways = arguments.ways.split(",")
    if unknown := set(ways) - set("abcdefg"):
        parser.error(f"--ways knows a to g, not {', '.join(sorted(unknown))}")
    bench = Bench(SIZES[arguments.size], arguments.terms, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return write_rows(arguments.out, COLUMNS, rows_of(bench, arguments, ways))


if __name__ == "__main__":
    main()
