"""From tokenised examples to what a forward pass reads: padded batches, or packed rows of one optimizer step.

Both forms name the positions where a next token is to be learned: `answer_index` [K] counts through the flattened
tokens of the batch and `next_tokens` [K] holds the tokens that follow, so the vocabulary head runs nowhere else and
nothing has to be searched on the device. Where the teacher's states are read from a cache, the collators read them, in
the data workers, and put them into the batch.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, default_data_collator

from .losses import IGNORED
from .packing import plan_packs

StatesReader = Callable[[Sequence[int]], dict[int, torch.Tensor]]
"""Gives the teacher's states [T, d_t] of an example by layer, from its token ids."""


_NOT_PASSED_ON = ("position_ids", "inputs_embeds", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
"""What other collators put into a batch and a model would have to read for its output to be right."""


def _check_examples(examples: list[dict[str, Any]]) -> None:
    if missing := [name for name in ("input_ids", "labels") if name not in examples[0]]:
        raise ValueError(
            f"An example has no {' and no '.join(missing)}, but only {', '.join(sorted(examples[0]))}. Give every "
            "example input_ids, and labels that are -100 where no answer is to be learned."
        )


def _answers(labels: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of one example that have a next token to learn, and these tokens."""
    following = torch.as_tensor(labels[1:])
    positions = (following != IGNORED).nonzero().flatten()
    return positions, following[positions]


class DistillationCollator:
    """Pads examples on the right to the longest of the batch.

    The attention mask follows from the lengths, never from the padding token: many tokenizers pad with end-of-text.

    Args:
        tokenizer: gives the padding token; its end-of-text token stands in where it has none.
        read_states: reads the teacher's states, which are then part of the batch.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, read_states: StatesReader | None = None) -> None:
        self.read_states = read_states
        self.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def reading(self, read_states: StatesReader) -> "DistillationCollator":
        """The same collator, reading the teacher's states."""
        collator = copy.copy(self)
        collator.read_states = read_states
        return collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate examples with `input_ids` and `labels`.

        Returns:
            `input_ids`, `attention_mask` and `labels` [B, T], `answer_index`, `next_tokens`, and where states are
            read `teacher_states` [B, T, d_t] by layer.
        """
        _check_examples(examples)
        input_ids = [torch.as_tensor(example["input_ids"]) for example in examples]
        labels = [torch.as_tensor(example["labels"]) for example in examples]
        answers = [_answers(example["labels"]) for example in examples]
        width = max(map(len, input_ids))
        states = _states(examples, self.read_states, lambda parts: pad_sequence(parts, batch_first=True))
        return {
            "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in input_ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            "answer_index": torch.cat([row * width + positions for row, (positions, _) in enumerate(answers)]),
            "next_tokens": torch.cat([tokens for _, tokens in answers]),
            **states,
        }


class CompletingCollator:
    """A collator of the user's own, whose batches get what KAVA needs beside the usual tensors.

    Args:
        collator: gives `input_ids` and `labels` [B, T], which are -100 where nothing is to be learned, and an
            `attention_mask` [B, T] where there is padding.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The collator's batch with `attention_mask`, `answer_index` and `next_tokens` where it has none.

        Raises:
            ValueError: if it lacks `input_ids` or `labels`, or holds what KAVA does not pass on to the models.
        """
        batch = dict(self.collator(examples))
        if missing := [name for name in ("input_ids", "labels") if batch.get(name) is None]:
            raise ValueError(
                f"The data collator gives no {' and no '.join(missing)}, but only {', '.join(batch)}. Let it give "
                "both, with labels of -100 where nothing is to be learned; or leave data_collator out."
            )
        if foreign := [name for name in _NOT_PASSED_ON if name in batch]:
            raise ValueError(
                f"The data collator gives {', '.join(foreign)}, which KAVA does not pass on to the models. Let it pad; "
                "or leave data_collator out: KAVA packs examples itself."
            )
        batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
        if "answer_index" not in batch:
            following = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED).flatten()
            batch["answer_index"] = (following != IGNORED).nonzero().flatten()
            batch["next_tokens"] = following[batch["answer_index"]]
        return batch


def choose_collator(
    given: Callable[[list[dict[str, Any]]], Mapping[str, Any]] | None, tokenizer: PreTrainedTokenizerBase | None
) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """The collator that a trainer uses.

    Args:
        given: the user's own; it is completed where it is not KAVA's.
        tokenizer: what KAVA's pads for, where there is none of the user's; without both, examples cannot be padded.
    """
    if given is None and tokenizer is not None:
        return DistillationCollator(tokenizer)
    return given if isinstance(given, DistillationCollator) else CompletingCollator(given or default_data_collator)


class JoiningCollator:
    """Joins examples end to end; `pack_step` makes rows of them once a whole optimizer step is there.

    Args:
        read_states: as for `DistillationCollator`.
    """

    def __init__(self, read_states: StatesReader | None = None) -> None:
        self.read_states = read_states

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate examples with `input_ids` and `labels`: flat tensors, and how many entries each example has."""
        _check_examples(examples)
        answers = [_answers(example["labels"]) for example in examples]
        return {
            "input_ids": torch.cat([torch.as_tensor(example["input_ids"]) for example in examples]),
            "lengths": [len(example["input_ids"]) for example in examples],
            "answer_index": torch.cat([positions for positions, _ in answers]),
            "next_tokens": torch.cat([tokens for _, tokens in answers]),
            "answers": [len(positions) for positions, _ in answers],
            **_states(examples, self.read_states, torch.cat),
        }


def _states(
    examples: list[dict[str, Any]], read: StatesReader | None, join: Callable[[list[torch.Tensor]], torch.Tensor]
) -> dict[str, dict[int, torch.Tensor]]:
    if read is None:
        return {}
    states = [read(example["input_ids"]) for example in examples]
    return {"teacher_states": {layer: join([own[layer] for own in states]) for layer in states[0]}}


def pack_step(batches: list[dict[str, Any]], budget: int) -> list[dict[str, Any]]:
    """Make packed rows of all examples of one optimizer step.

    Args:
        batches: of `JoiningCollator`.
        budget: tokens of one row; a longer example gets a row of its own.

    Returns:
        Rows with `input_ids` and `attention_mask` [1, T], `packed_lengths`, `answer_index`, `next_tokens`, and
        `teacher_states` [1, T, d_t] by layer where the batches have them.
    """
    examples = [example for batch in batches for example in _examples(batch)]
    packs = plan_packs([len(example.input_ids) for example in examples], budget)
    return [_row([examples[i] for i in pack]) for pack in packs]


@dataclass(frozen=True)
class _Example:
    input_ids: torch.Tensor
    answer_index: torch.Tensor
    next_tokens: torch.Tensor
    teacher_states: dict[int, torch.Tensor]


def _examples(batch: dict[str, Any]) -> list[_Example]:
    """The examples that a batch of `JoiningCollator` holds end to end."""
    tokens = batch["input_ids"].split(batch["lengths"])
    index, following = (batch[name].split(batch["answers"]) for name in ("answer_index", "next_tokens"))
    states = {layer: part.split(batch["lengths"]) for layer, part in batch.get("teacher_states", {}).items()}
    return [
        _Example(*parts, teacher_states={layer: own[i] for layer, own in states.items()})
        for i, parts in enumerate(zip(tokens, index, following, strict=True))
    ]


def _row(examples: list[_Example]) -> dict[str, Any]:
    input_ids = torch.cat([example.input_ids for example in examples]).unsqueeze(0)
    lengths = tuple(len(example.input_ids) for example in examples)
    starts = accumulate(lengths[:-1], initial=0)
    row = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "packed_lengths": lengths,
        "answer_index": torch.cat(
            [example.answer_index + start for example, start in zip(examples, starts, strict=True)]
        ),
        "next_tokens": torch.cat([example.next_tokens for example in examples]),
    }
    if layers := examples[0].teacher_states.keys():
        joined = {layer: torch.cat([example.teacher_states[layer] for example in examples]) for layer in layers}
        row["teacher_states"] = {layer: part.unsqueeze(0) for layer, part in joined.items()}
    return row


def as_many_rows(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The same examples in `count` packed rows or more: the longest ones are halved.

    Args:
        rows: of `pack_step`.
        count: at most the number of examples.
    """
    rows = list(rows)
    while len(rows) < count:
        _, place = max((row["input_ids"].numel(), i) for i, row in enumerate(rows) if len(row["packed_lengths"]) > 1)
        rows[place : place + 1] = cast(list[dict[str, Any]], halve(rows[place]))
    return rows


def spread(rows: list[dict[str, Any]], count: int) -> list[list[dict[str, Any]]]:
    """Deal rows out to `count` micro-batches, in order: Trainer counts these to know when a step ends.

    The last one always has exactly one row where there are several micro-batches; the first ones may stay empty.
    """
    if len(rows) <= count:
        return [[] for _ in range(count - len(rows))] + [[row] for row in rows]
    extra = len(rows) - count
    return [rows[: extra + 1], *([row] for row in rows[extra + 1 :])]


def halve(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Two rows or batches with half of the examples each; None where there is only one example.

    Args:
        row: of `pack_step` or `DistillationCollator`.
    """
    lengths, (count, width) = row.get("packed_lengths"), row["input_ids"].shape
    examples = count if lengths is None else len(lengths)
    if examples == 1:
        return None
    half = examples // 2
    cut, axis = (half, 0) if lengths is None else (sum(lengths[:half]), 1)
    parts = [_span(row, axis, 0, cut), _span(row, axis, cut, (count, width)[axis])]
    if lengths is not None:
        parts = [
            part | {"packed_lengths": own} for part, own in zip(parts, (lengths[:half], lengths[half:]), strict=True)
        ]
    return parts


def _span(row: dict[str, Any], axis: int, start: int, stop: int) -> dict[str, Any]:
    """The part of a row or batch from `start` to `stop` along the axis of tokens (1) or of examples (0)."""
    width = row["input_ids"].shape[1] if axis == 0 else 1
    first, last = start * width, stop * width
    kept = (row["answer_index"] >= first) & (row["answer_index"] < last)
    part = {"answer_index": row["answer_index"][kept] - first, "next_tokens": row["next_tokens"][kept]}
    for name in ("input_ids", "attention_mask", "labels"):
        if name in row:
            part[name] = row[name].narrow(axis, start, stop - start)
    if "teacher_states" in row:
        states = row["teacher_states"].items()
        part["teacher_states"] = {layer: own.narrow(axis, start, stop - start) for layer, own in states}
    return part
