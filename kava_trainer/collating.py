"""From tokenised examples to what a forward pass reads: padded batches, or packed rows of one optimizer step.

Both forms name the positions where a next token is to be learned: `answer_index` [K] counts through the flattened
tokens of the batch and `next_tokens` [K] holds the tokens that follow, so the vocabulary head runs nowhere else and
nothing has to be searched on the device.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from .losses import IGNORED
from .packing import plan_packs


def _answers(labels: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of one example that have a next token to learn, and these tokens."""
    following = torch.tensor(labels[1:])
    positions = (following != IGNORED).nonzero().flatten()
    return positions, following[positions]


class DistillationCollator:
    """Pads examples on the right to the longest of the batch.

    The attention mask follows from the lengths, never from the padding token: many tokenizers pad with end-of-text.

    Args:
        tokenizer: gives the padding token; its end-of-text token stands in where it has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate examples with `input_ids` and `labels` into [B, T] tensors, `answer_index` and `next_tokens`."""
        input_ids = [torch.tensor(example["input_ids"]) for example in examples]
        labels = [torch.tensor(example["labels"]) for example in examples]
        answers = [_answers(example["labels"]) for example in examples]
        width = max(map(len, input_ids))
        return {
            "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in input_ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            "answer_index": torch.cat([row * width + positions for row, (positions, _) in enumerate(answers)]),
            "next_tokens": torch.cat([tokens for _, tokens in answers]),
        }


class JoiningCollator:
    """Joins examples end to end; `pack_step` makes rows of them once a whole optimizer step is there."""

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate examples with `input_ids` and `labels`: flat tensors, and how many entries each example has."""
        answers = [_answers(example["labels"]) for example in examples]
        return {
            "input_ids": torch.cat([torch.tensor(example["input_ids"]) for example in examples]),
            "lengths": [len(example["input_ids"]) for example in examples],
            "answer_index": torch.cat([positions for positions, _ in answers]),
            "next_tokens": torch.cat([tokens for _, tokens in answers]),
            "answers": [len(positions) for positions, _ in answers],
        }


def pack_step(batches: list[dict[str, Any]], budget: int) -> list[dict[str, Any]]:
    """Make packed rows of all examples of one optimizer step.

    Args:
        batches: of `JoiningCollator`.
        budget: tokens of one row; a longer example gets a row of its own.

    Returns:
        Rows with `input_ids` and `attention_mask` [1, T], `packed_lengths`, `answer_index` and `next_tokens`.
    """
    examples = [example for batch in batches for example in _examples(batch)]
    return [_row([examples[i] for i in pack]) for pack in plan_packs([len(ids) for ids, *_ in examples], budget)]


def _examples(batch: dict[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Tokens, answer positions and next tokens of each example."""
    tokens = batch["input_ids"].split(batch["lengths"])
    answers = (batch[name].split(batch["answers"]) for name in ("answer_index", "next_tokens"))
    return list(zip(tokens, *answers, strict=True))


def _row(examples: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> dict[str, Any]:
    input_ids = torch.cat([ids for ids, _, _ in examples]).unsqueeze(0)
    lengths, index, start = [], [], 0
    for ids, positions, _ in examples:
        lengths.append(len(ids))
        index.append(positions + start)
        start += len(ids)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "packed_lengths": tuple(lengths),
        "answer_index": torch.cat(index),
        "next_tokens": torch.cat([tokens for _, _, tokens in examples]),
    }


def spread(rows: list[dict[str, Any]], count: int) -> list[list[dict[str, Any]]]:
    """Deal rows out to `count` micro-batches, in order: Trainer counts these to know when a step ends.

    The last one always has exactly one row where there are several micro-batches; the first ones may stay empty.
    """
    if len(rows) <= count:
        return [[] for _ in range(count - len(rows))] + [[row] for row in rows]
    extra = len(rows) - count
    return [rows[: extra + 1], *([row] for row in rows[extra + 1 :])]
