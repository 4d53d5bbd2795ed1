"""`layer_mapping` cka: each layer of the student with the teacher's that is most alike, in the same order.

Linear CKA (Kornblith et al. 2019) of the hidden states on some training examples says what is alike; it is unmoved by
rotations and scale, so models of any widths compare before a projector is there.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from transformers import PreTrainedModel

from ...config.arguments import KavaTrainingArguments
from ...data.selection import draw_examples
from ...models.attention.capture import FeatureCapture
from ...models.hidden_states import run_decoder
from ...models.layers import evaluating, number_of_layers
from ...utils.console import Console
from ...utils.distributed import from_main_process, is_sharded
from ...utils.errors import BadRequest
from ...utils.progress_bar import told
from ..projector_files import kept_use

CKA_TOKENS = 2048
"""Tokens that layers are compared on; the memory grows with their square."""


class LayerChoice(NamedTuple):
    """The teacher's layer for each layer of the student, from the first on, and how alike the two are."""

    layers: list[int]
    cka: list[float]

    def lines(self) -> Iterator[str]:
        """A table for people."""
        yield "Layers by linear CKA of their states (layer_mapping cka):"
        yield "Student   Teacher      CKA"
        for own, (layer, alike) in enumerate(zip(self.layers, self.cka, strict=True), start=1):
            yield f"{own:<10}{layer:<10}{alike:>6.4f}"


def monotone_path(scores: torch.Tensor) -> list[int]:
    """For each row of scores [S, T] a column, none before that of the row above, with the highest sum; from 0."""
    best, chosen = scores[0].clone(), []
    for row in scores[1:]:
        before, at = best.cummax(dim=0)
        chosen.append(at)
        best = row + before
    path = [int(best.argmax())]
    for at in reversed(chosen):
        path.append(int(at[path[-1]]))
    return path[::-1]


def cka_of_layers(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """Linear CKA [S, T] of each layer of the student with each of the teacher, of states [N, d] of the same tokens."""
    own = torch.stack([_gram(states) for states in student])
    return torch.stack([own @ _gram(states) for states in teacher], dim=1)


def _gram(states: torch.Tensor) -> torch.Tensor:
    """The products of the centred states of all pairs of tokens [N * N], with length 1."""
    centred = states.float() - states.float().mean(dim=0)
    products = (centred @ centred.T).flatten()
    return products / products.norm().clamp(min=1e-12)


@torch.no_grad()
def choose_layers(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    examples: list[dict[str, Any]],
    collator: Callable[[list[Any]], dict[str, Any]],
    batch_size: int,
) -> LayerChoice:
    """The teacher's layer for each of the student's: the choice with the highest sum of CKA that keeps their order.

    Args:
        student: as it is before the training; the mode of both is kept.
        teacher: of the same tokenizer.
        examples: the same on every rank.
        collator: pads them.
        batch_size: examples at a time.
    """
    with told("Comparing the layers of both models"):
        states = [_states(model, examples, collator, batch_size) for model in (student, teacher)]
    alike = cka_of_layers(*states)
    path = monotone_path(alike)
    return LayerChoice([place + 1 for place in path], [alike[row, place].item() for row, place in enumerate(path)])


def _states(
    model: PreTrainedModel,
    examples: list[dict[str, Any]],
    collator: Callable[[list[Any]], dict[str, Any]],
    batch_size: int,
) -> list[torch.Tensor]:
    """The states [N, d] of every layer on the first `CKA_TOKENS` tokens."""
    layers = [*range(1, number_of_layers(model) + 1)]
    capture, kept = FeatureCapture(model, layers), [list[torch.Tensor]() for _ in layers]
    try:
        for start in range(0, len(examples), batch_size):
            batch = send_to_device(collator(examples[start : start + batch_size]), model.device)
            mask = batch.get("counted", batch["attention_mask"]).bool()
            with evaluating(model), capture as found:
                run_decoder(model, batch["input_ids"], batch["attention_mask"])
            for own, layer in zip(kept, layers, strict=True):
                own.append(found[layer][mask.to(found[layer].device)].float().cpu())
    finally:
        capture.remove()
    return [torch.cat(own)[:CKA_TOKENS] for own in kept]


@dataclass(frozen=True)
class LayerChooser:
    """`choose_layers` on examples of a training; each choice is printed.

    Raises:
        BadRequest: when it is called, if there are no training examples.
    """

    args: KavaTrainingArguments
    train: Any
    """Training examples: a data set, a stream, or any sequence of rows."""
    collator: Callable[[list[Any]], dict[str, Any]]
    """Pads them."""

    def __call__(self, student: PreTrainedModel, teacher: PreTrainedModel) -> list[int]:
        """The teacher's layer for each of the student's."""
        if self.train is None:
            raise BadRequest("layer_mapping cka compares the layers on training examples;", "give a train_dataset.")
        examples = draw_examples(self.train, CKA_TOKENS, self.args.seed)
        size = self.args.per_device_eval_batch_size
        # Where two layers are all but alike, two devices could round to different ones.
        if is_sharded(teacher):  # all ranks gather its weights for it
            own = choose_layers(student, teacher, examples, self.collator, size)
            choice = from_main_process(lambda: own)
        else:
            choice = from_main_process(lambda: choose_layers(student, teacher, examples, self.collator, size))
        console = Console(self.args.plain_output)
        for line in choice.lines():
            console.print(line)
        return choice.layers


def kept_layers(projector: Path) -> list[int]:
    """The teacher's layers that an earlier run chose, from the projector file of its checkpoint.

    Raises:
        BadRequest: as `projector_files.load_projectors`.
    """
    return [teacher for _, teacher in sorted(kept_use(projector)["pairs"])]
