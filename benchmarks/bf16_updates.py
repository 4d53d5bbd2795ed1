"""How much of an optimizer's updates weights in bfloat16 keep, and what each remedy costs, at equal steps.

    python benchmarks/bf16_updates.py --out FILE.csv [--cases middle,quickstart] [--seeds 0 1] [--ways ...]

Every run is a real `KavaTrainer` run on the quickstart's problems with its embedded teacher. All ways of a case and
seed start from the same weights, which a bfloat16 holds exactly, and see the same data in the same order. The cases:

middle      a student of 8 M random weights, at the learning rate of the home recipe
continued   the quickstart's student after 300 steps in float32, at the learning rate of the home recipe
quickstart  the quickstart's student from its start, at the quickstart's learning rate, to its end

`changed` is the share of the student's weights that a step changes, averaged over the steps after the warm-up.
`progress` is how far the weights have come along the way of the float32 run, 1 being as far as that. `distance` is how
far they end from where it ends, over the length of its way; rounding at random adds noise to it and no bias. The states
of the teacher are remembered, so `seconds_per_step` is the student's and the optimizer's time.
"""

import argparse
import csv
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

import datasets  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from transformers import AutoConfig, PreTrainedModel, Qwen2Config, TrainerCallback, logging, set_seed  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

from benchmarks.effectiveness import RECIPE, RememberedTeacher  # noqa: E402
from kava_trainer.config.arguments import KavaArguments  # noqa: E402
from kava_trainer.config.parser import parse_arguments  # noqa: E402
from kava_trainer.models.loading import build_causal_lm  # noqa: E402
from kava_trainer.models.packed_attention import enable_packing  # noqa: E402
from kava_trainer.models.teacher import OnlineTeacher, load_teacher  # noqa: E402
from kava_trainer.quickstart import STUDENT_FOLDER  # noqa: E402
from kava_trainer.runs.pair.models import Models  # noqa: E402
from kava_trainer.runs.pair.tokenizers import load_tokenizers  # noqa: E402
from kava_trainer.runs.setup import load_data, make_trainer  # noqa: E402
from kava_trainer.trainer.trainer import KavaTrainer  # noqa: E402
from kava_trainer.utils.console import Console  # noqa: E402

COLUMNS = (
    "case", "way", "seed", "optimizer", "dtype", "autocast", "learning_rate", "steps", "parameters", "changed",
    "progress", "distance", "loss", "cos_sim", "cross_entropy", "bytes_per_parameter", "seconds_per_step", "device",
    "torch", "transformers", "torchao", "torch_optimi",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Which student is trained, and for how long.

    Args:
        changes: of the quickstart recipe.
        config: of the student.
        before: steps in float32 at the quickstart's learning rate that come first.
    """

    changes: dict[str, Any]
    config: Qwen2Config | None = None
    before: int = 0


@dataclass(frozen=True)
class Way:
    """How weights are kept and updated.

    Args:
        dtype: of the weights.
        optim: as in the arguments.
        optim_args: as in the arguments.
        autocast: whether the passes are in bfloat16 though the weights are not.
    """

    dtype: torch.dtype
    optim: str = "adamw_torch_fused"
    optim_args: str | None = None
    autocast: bool = False


def _middle() -> Qwen2Config:
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    return Qwen2Config(vocab_size=512, tie_word_embeddings=True, eos_token_id=0, bos_token_id=None, **sizes, **heads)


HOME = {"learning_rate": 5e-5, "warmup_steps": 10}
CASES = {
    "middle": Case({**HOME, "max_steps": 50, "per_device_train_batch_size": 16}, _middle()),
    "continued": Case({**HOME, "max_steps": 300}, before=300),
    "quickstart": Case({}),
}
NO_BLOCK = 2**40
"""More than any weight has elements: torchao then keeps the states as they are, in the data type of the weight."""

FULL, HALF = torch.float32, torch.bfloat16
WAYS = {
    "float32": Way(FULL),
    "float32, bf16 passes": Way(FULL, autocast=True),
    "float32, bf16 passes, 8-bit states": Way(FULL, "adamw_torch_8bit", autocast=True),
    "bf16": Way(HALF),
    "bf16, 8-bit states": Way(HALF, "adamw_torch_8bit"),
    "bf16, 8-bit states, rounded at random": Way(HALF, "adamw_torch_8bit", "bf16_stochastic_round=True"),
    "bf16, 8-bit states in blocks of 64, rounded at random": Way(
        HALF, "adamw_torch_8bit", "bf16_stochastic_round=True,block_size=64"
    ),
    "bf16, rounded at random": Way(HALF, "adamw_torch_8bit", f"bf16_stochastic_round=True,block_size={NO_BLOCK}"),
    "bf16, Kahan": Way(HALF, "optimi.AdamW"),
}


class Watch(TrainerCallback):
    """Counts the weights that each step after the warm-up changes, and the time that the counting takes."""

    def __init__(self, student: PreTrainedModel, warmup: int) -> None:
        self._parameters, self._warmup = list(student.parameters()), warmup
        self.shares: list[float] = []
        self.seconds = 0.0

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Keep the weights."""
        start = time.perf_counter()
        self._before = [parameter.detach().clone() for parameter in self._parameters]
        self.seconds += time.perf_counter() - start

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare them."""
        start = time.perf_counter()
        if state.global_step >= self._warmup:
            pairs = zip(self._before, self._parameters, strict=True)
            changed = sum(int((old != new).sum()) for old, new in pairs)
            self.shares.append(changed / sum(parameter.numel() for parameter in self._parameters))
        self.seconds += time.perf_counter() - start


def installed(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def weights_of(student: PreTrainedModel) -> torch.Tensor:
    """All weights in one float32 vector."""
    return torch.cat([parameter.detach().float().flatten() for parameter in student.parameters()])


def tensor_bytes(value: Any) -> int:
    """Bytes of a state: of a tensor, or of the tensors that a quantised one is made of."""
    if not isinstance(value, torch.Tensor):
        return 0
    if hasattr(value, "tensor_attrs"):
        return sum(tensor_bytes(getattr(value, name)) for name in value.tensor_attrs)
    return value.numel() * value.element_size()


def bytes_per_parameter(student: PreTrainedModel, optimizer: torch.optim.Optimizer) -> float:
    """Bytes of weights, gradients and states of the student for each of its parameters."""
    parameters = list(student.parameters())
    states = sum(tensor_bytes(value) for p in parameters for value in optimizer.state[p].values())
    weights = sum(p.numel() * p.element_size() for p in parameters)
    return (2 * weights + states) / sum(p.numel() for p in parameters)


def store_as(student: PreTrainedModel, dtype: torch.dtype) -> None:
    """Keep the weights in a data type; what is no weight, such as the rotary frequencies, stays in float32."""
    for parameter in student.parameters():
        parameter.data = parameter.data.to(HALF).to(dtype)


class Bench:
    """What all runs share: data, tokenizer, the remembered teacher, and the starts."""

    def __init__(self, examples: int | None = None) -> None:
        logging.set_verbosity_error()
        disable_progress_bar()
        datasets.disable_progress_bars()
        self._folder = Path(tempfile.mkdtemp())
        self._limit = {} if examples is None else {"max_train_samples": examples, "max_eval_samples": 16}
        self._teachers: dict[tuple[int, ...], RememberedTeacher] = {}
        arguments = self.arguments({}, 0)
        tokenizer = load_tokenizers(arguments)
        self._data = load_data(Console(plain=True), arguments, tokenizer)
        self._models = Models(load_teacher(arguments.model, arguments.training.device), None, tokenizer)
        enable_packing(self._models.teacher)

    def arguments(self, changes: dict[str, Any], seed: int) -> KavaArguments:
        """The quickstart recipe with the case's and the way's arguments, saving nothing."""
        changes = {
            "output_dir": self._folder, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
            "use_cpu": not torch.cuda.is_available(), "plain_output": True, "run_control": False, "seed": seed,
            "logging_steps": 10_000, **self._limit, **changes,
        }  # fmt: skip
        return parse_arguments([str(RECIPE), *(word for k, v in changes.items() for word in (f"--{k}", str(v)))])

    def start(self, case: Case, seed: int, before: int | None = None) -> PreTrainedModel:
        """The student that every way of a case starts from."""
        config = case.config or AutoConfig.from_pretrained(STUDENT_FOLDER)
        set_seed(seed)
        student = build_causal_lm(config, "float32", self.arguments({}, seed).model).train()
        if before := case.before if before is None else before:
            warm = {"max_steps": before, "lr_scheduler_type": "constant_with_warmup"}
            self._trainer(student, self.arguments(warm, seed)).train()
        store_as(student, FULL)
        return student

    def _trainer(self, student: PreTrainedModel, arguments: KavaArguments) -> KavaTrainer:
        models = Models(self._models.teacher, student, self._models.tokenizer)
        set_seed(arguments.training.seed)
        trainer = make_trainer(arguments.training, models, self._data)
        layers = tuple(trainer.teacher.layers)
        self._teachers.setdefault(layers, RememberedTeacher(OnlineTeacher(self._models.teacher, list(layers))))
        trainer.terms.teacher = self._teachers[layers]
        return trainer

    def train(
        self, student: PreTrainedModel, case: Case, way: Way, seed: int, changes: dict[str, Any]
    ) -> tuple[dict[str, Any], torch.Tensor]:
        """Train one copy of the start in one way; the figures of its row, and its weights at the end."""
        store_as(student, way.dtype)
        trainers_own = not way.optim.startswith("optimi")
        options = {"optim": way.optim} if trainers_own else {}
        options |= {"optim_args": way.optim_args} if way.optim_args else {}
        arguments = self.arguments({**case.changes, **changes, **options, "bf16": way.autocast}, seed)
        trainer = self._trainer(student, arguments)
        if not trainers_own:
            kwargs = trainer.get_optimizer_cls_and_kwargs(trainer.args)[1]
            kwargs.pop("fused")
            import optimi  # for this way alone

            trainer.optimizer, trainer.optimizer_cls_and_kwargs = None, (optimi.AdamW, kwargs)
        watch = Watch(student, trainer.args.warmup_steps)
        trainer.add_callback(watch)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start - watch.seconds
        figures, training = trainer.evaluate(), trainer.args
        return {
            "optimizer": f"{way.optim} {way.optim_args or ''}".strip(), "dtype": str(way.dtype).removeprefix("torch."),
            "autocast": way.autocast, "learning_rate": training.learning_rate, "steps": trainer.state.global_step,
            "parameters": sum(p.numel() for p in student.parameters()),
            "changed": sum(watch.shares) / len(watch.shares), "loss": figures["eval_loss"],
            "cos_sim": figures["eval_cos_sim"], "cross_entropy": figures["eval_lm_loss"],
            "bytes_per_parameter": bytes_per_parameter(student, trainer.optimizer),
            "seconds_per_step": seconds / trainer.state.global_step,
        }, weights_of(student)  # fmt: skip


def rows_of(
    bench: Bench, name: str, ways: Iterable[str], seed: int, changes: dict[str, Any], before: int | None = None
) -> Iterable[dict[str, Any]]:
    """The rows of one case and seed, as they are measured; the float32 way comes first, as the reference."""
    case = CASES[name]
    start = bench.start(case, seed, before)
    begin = weights_of(start)
    reference: torch.Tensor | None = None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu x {torch.get_num_threads()}"
    shared = {
        "case": name, "seed": seed, "device": f"{device} ({platform.machine()})", "torch": torch.__version__,
        **{name: installed(name) for name in ("transformers", "torchao", "torch_optimi")},
    }  # fmt: skip
    for way in ("float32", *(way for way in ways if way != "float32")):
        student = copy_of(start)
        figures, end = bench.train(student, case, WAYS[way], seed, changes)
        reference = end if reference is None else reference
        travelled = reference - begin
        distance = (end - reference).norm() / travelled.norm()
        progress = (end - begin) @ travelled / travelled.norm() ** 2
        yield {**shared, "way": way, **figures, "progress": progress.item(), "distance": distance.item()}


def copy_of(student: PreTrainedModel) -> PreTrainedModel:
    """A student of the same weights and buffers, without the hooks that a trainer has put on the first."""
    twin: nn.Module = type(student)(student.config)
    twin.load_state_dict(student.state_dict())
    return twin.train()


def main() -> None:
    """Measure, and write each row to the CSV file as it comes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, help="in place of the case's own, for trying out")
    parser.add_argument("--examples", type=int, help="of training, for trying out")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    changes = {} if arguments.steps is None else {"max_steps": arguments.steps, "warmup_steps": 1}
    names = arguments.cases.split(",")
    if unknown := set(names) - set(CASES):
        parser.error(f"--cases knows {', '.join(CASES)}, not {', '.join(sorted(unknown))}")
    bench = Bench(arguments.examples)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for seed in arguments.seeds:
            for name in names:
                for row in rows_of(bench, name, arguments.ways, seed, changes, arguments.steps):
                    writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})
                    file.flush()
                    print({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items() if k in COLUMNS[:17]})


if __name__ == "__main__":
    main()
