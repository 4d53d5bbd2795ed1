"""From tokenised examples to batches: padded, or joined end to end for `packing` to make rows of.

Both forms name the positions where a next token is to be learned: `answer_index` [K] counts through the flattened
tokens of the batch and `next_tokens` [K] holds the tokens that follow, so the vocabulary head runs nowhere else and
nothing has to be searched on the device. `next_index` [M] names all positions that are followed by a token of the same
example, for terms that are means over all tokens. Where the teacher's states are read from a cache, the collators read
them, in the data workers, and put them into the batch.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import has_length

from .formats import IGNORED, WRITTEN
from .packing import followed_positions
from .token_alignment.batching import joined, padded, teacher_parts, tokens_of
from .token_alignment.ranges import of_teacher, readers

StatesReader = Callable[[Sequence[int]], dict[int, torch.Tensor]]
"""Gives the teacher's states [T, d_t] of an example by layer, from the token ids that it reads."""

StatesReaders = StatesReader | Mapping[int, StatesReader]
"""One, or some of several teachers' by their numbers from 0."""

_NOT_PASSED_ON = ("position_ids", "inputs_embeds", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
"""What other collators put into a batch and a model would have to read for its output to be right."""


class DistillationCollator:
    """Pads examples on the right to the longest of the batch.

    The attention mask follows from the lengths, never from the padding token: many tokenizers pad with end-of-text.

    Args:
        tokenizer: gives the padding token; its end-of-text token stands in where it has none. Without a tokenizer it is
            token 0, which no loss sees either.
        read_states: reads the teacher's states, which are then part of the batch; those of several by their numbers.
    """

    _needs_labels = False

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None = None, read_states: StatesReaders | None = None
    ) -> None:
        self.read_states = read_states
        known = () if tokenizer is None else (tokenizer.pad_token_id, tokenizer.eos_token_id)
        self.pad_token_id = next((token for token in known if token is not None), 0)

    def for_training(self) -> "DistillationCollator":
        """The same collator, refusing examples without labels, of which nothing can be learned."""
        collator = copy.copy(self)
        collator._needs_labels = True
        return collator

    def reading(self, read_states: StatesReaders | None) -> "DistillationCollator":
        """The same collator, reading the teacher's states, or no longer."""
        collator = copy.copy(self)
        collator.read_states = read_states
        return collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate examples with `input_ids` and `labels`.

        Returns:
            `input_ids`, `attention_mask` and `labels` [B, T], `answer_index`, `next_tokens`, `next_index`, and where
            states are read `teacher_states` [B, T, d_t] by layer; also the `origins` [B, T] of examples that have them.
            Of examples that the teacher reads in other tokens there are `teacher_input_ids` and
            `teacher_attention_mask` [B, U], `teacher_ranges` [B, T, 2 or 3] within each example, and `teacher_widest`,
            the most tokens of a range; `teacher_states` are [B, U, d_t] then.
            Examples of which none has labels, which can be predicted on and not learned, give `input_ids` and
            `attention_mask` alone. Where nothing is learned an example of no tokens has a row too, so that predictions
            are those of the examples one by one; then `counted` [B, T] says which tokens are real.
        """
        if not self._needs_labels and not any("labels" in example for example in examples):
            return self._unlabelled(examples)
        input_ids, labels = _tokens(examples, self._keeps_empty())
        answers, origins = [_answers(own) for own in labels], _origins(examples)
        width = max(map(len, input_ids))
        teacher = teacher_parts(examples, input_ids)
        read = tokens_of(teacher)
        states = _states(examples, input_ids, read, self.read_states, partial(pad_sequence, batch_first=True))
        return {
            "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in input_ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            "answer_index": torch.cat([row * width + positions for row, (positions, _) in enumerate(answers)]),
            "next_tokens": torch.cat([tokens for _, tokens in answers]),
            "next_index": torch.cat(
                [
                    row * width + followed_positions(len(ids), origins[row] if origins else None)
                    for row, ids in enumerate(input_ids)
                ]
            ),
            **({"origins": pad_sequence(origins, batch_first=True, padding_value=WRITTEN)} if origins else {}),
            **self._counted(examples, input_ids),
            **padded(teacher),
            **states,
        }

    def _keeps_empty(self) -> bool:
        return not self._needs_labels and self.read_states is None  # no states are kept of what stands for nothing

    def _counted(self, examples: list[dict[str, Any]], input_ids: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Which tokens [B, T] count, where some stand for an example without any."""
        empty = [len(_real(example)[0]) == 0 for example in examples]
        if not self._keeps_empty() or not any(empty):
            return {}
        real = [torch.full_like(ids, not none) for ids, none in zip(input_ids, empty, strict=True)]
        return {"counted": pad_sequence(real, batch_first=True).bool()}

    def _unlabelled(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        labelled = [{**example, "labels": example["input_ids"]} for example in examples]
        input_ids, _ = _tokens(labelled, keep_empty=True)
        return {
            "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in input_ids], batch_first=True),
        }


class JoiningCollator:
    """Joins examples end to end; `pack_step` makes rows of them once a whole optimizer step is there.

    Args:
        read_states: as for `DistillationCollator`.
    """

    def __init__(self, read_states: StatesReaders | None = None) -> None:
        self.read_states = read_states

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate examples with `input_ids` and `labels`: flat tensors, and how many entries each example has."""
        input_ids, labels = _tokens(examples)
        answers, origins = [_answers(own) for own in labels], _origins(examples)
        teacher = teacher_parts(examples, input_ids)
        read = tokens_of(teacher)
        return {
            "input_ids": torch.cat(input_ids),
            "lengths": list(map(len, input_ids)),
            "answer_index": torch.cat([positions for positions, _ in answers]),
            "next_tokens": torch.cat([tokens for _, tokens in answers]),
            "answers": [len(positions) for positions, _ in answers],
            **({"origins": torch.cat(origins)} if origins else {}),
            **joined(teacher),
            **_states(examples, input_ids, read, self.read_states, torch.cat),
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
        """The collator's batch, see `completed`."""
        return _complete(self.collator(examples))


def separated(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The examples of a batch that was made for training, each again with `input_ids` and `labels` [T] on the host.

    Where the batch holds teacher states each also has its own: `teacher_states` [T, d_t] by layer, where they were.

    Raises:
        ValueError: if the batch holds tokens of its own for the teacher.
    """
    if readers(batch):
        raise ValueError("Nobody knows what of a student's own answer is which of a teacher's other tokens.")
    batch = {name: own.cpu() if isinstance(own, torch.Tensor) else own for name, own in batch.items()}
    if "lengths" in batch:
        tokens = batch["input_ids"].split(batch["lengths"])
        index, following = (batch[name].split(batch["answers"]) for name in ("answer_index", "next_tokens"))
        labels = [torch.full_like(own, IGNORED) for own in tokens]
        for own, positions, answers in zip(labels, index, following, strict=True):
            own[positions + 1] = answers
    else:
        real = [own.bool() for own in batch["attention_mask"]]
        tokens, labels = (
            [own[mask] for own, mask in zip(batch[name], real, strict=True)] for name in ("input_ids", "labels")
        )
    states = _separated_states(batch)
    return [{"input_ids": own, "labels": labels[i], **states(i)} for i, own in enumerate(tokens)]


def _separated_states(batch: Mapping[str, Any]) -> Callable[[int], dict[str, dict[int, torch.Tensor]]]:
    """What gives the teacher states of each example of a batch; nothing where it holds none."""
    if "teacher_states" not in batch:
        return lambda i: {}
    lengths = batch["lengths"] if "lengths" in batch else batch["attention_mask"].sum(dim=1).tolist()
    parts = {
        layer: own.split(lengths) if "lengths" in batch else [row[:n] for row, n in zip(own, lengths, strict=True)]
        for layer, own in batch["teacher_states"].items()
    }
    return lambda i: {"teacher_states": {layer: own[i] for layer, own in parts.items()}}


def completed(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """A batch of anybody's making with what KAVA needs beside the usual tensors; what it has stays as it is.

    Raises:
        ValueError: if it lacks `input_ids` or `labels`, or holds what KAVA does not pass on to the models.
    """
    if "answer_index" not in batch:
        return _complete(batch)
    return batch if "next_index" in batch else {**batch, "next_index": _followed(batch)}


def _complete(given: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with all that `DistillationCollator` gives where it has it not. Raises as `completed`."""
    batch = dict(given)
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
    if batch["labels"].shape != batch["input_ids"].shape:
        shapes = f"{list(batch['labels'].shape)} and {list(batch['input_ids'].shape)}"
        raise ValueError(
            f"labels and input_ids of a batch have the shapes {shapes}. Give every token a label, or -100."
        )
    batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
    if "answer_index" not in batch:
        following = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED).flatten()
        real = batch["attention_mask"].bool().flatten()
        batch["answer_index"] = (real & (following != IGNORED)).nonzero().flatten()
        batch["next_tokens"] = following[batch["answer_index"]]
    batch.setdefault("next_index", _followed(batch))
    return batch


def _followed(batch: Mapping[str, Any]) -> torch.Tensor:
    """Positions [M] among the flattened tokens of a padded batch that a real token, or an answer, follows."""
    real = batch["attention_mask"].bool()
    found = torch.nn.functional.pad(real[:, :-1] & real[:, 1:], (0, 1)).flatten()
    found[batch["answer_index"]] = True
    return found.nonzero().flatten()


def check_rows(name: str, dataset: Any) -> None:
    """Raise `ValueError` for a data set, or one of several by name, that is empty or was not tokenised.

    Args:
        name: that the user knows it by.
        dataset: rows, a dictionary of data sets, or None; of one without columns and length nothing is known.
    """
    if isinstance(dataset, Mapping):
        for key, part in dataset.items():
            check_rows(f"{name}[{key!r}]", part)
        return
    if has_length(dataset) and len(dataset) == 0:
        raise ValueError(f"{name} holds no examples.")
    columns = getattr(dataset, "column_names", None)
    if columns is not None and "input_ids" not in columns:
        raise ValueError(
            f"{name} has the columns {', '.join(columns)}, and no input_ids. Tokenise it first: "
            "kava_trainer.encode(dataset, tokenizer)."
        )


def choose_collator(
    given: Callable[[list[dict[str, Any]]], Mapping[str, Any]] | None, tokenizer: PreTrainedTokenizerBase | None
) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """The collator that a trainer uses.

    Args:
        given: the user's own; it is completed where it is not KAVA's.
        tokenizer: what KAVA's pads for, where there is none of the user's.
    """
    if given is None:
        return DistillationCollator(tokenizer)
    return given if isinstance(given, DistillationCollator) else CompletingCollator(given)


def _tokens(examples: list[dict[str, Any]], keep_empty: bool = False) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Token ids and labels of each example, without what its own `attention_mask` says is padding.

    One token stands for an example of no tokens, which teaches nothing, where such are kept or there is no other; else
    they are left out.
    """
    if missing := [name for name in ("input_ids", "labels") if name not in examples[0]]:
        raise ValueError(
            f"An example has no {' and no '.join(missing)}, but only {', '.join(sorted(examples[0]))}. Give every "
            "example input_ids, and labels that are -100 where no answer is to be learned."
        )
    pairs, nothing = [_real(example) for example in examples], (torch.zeros(1).long(), torch.full((1,), IGNORED))
    if keep_empty:
        pairs = [pair if len(pair[0]) else nothing for pair in pairs]
    pairs = [pair for pair in pairs if len(pair[0])] or [nothing]
    return [ids for ids, _ in pairs], [labels for _, labels in pairs]


def _real(example: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    ids, labels = (torch.as_tensor(example[name], dtype=torch.long) for name in ("input_ids", "labels"))
    if len(ids) != len(labels):
        raise ValueError(
            f"An example has {len(ids)} input_ids and {len(labels)} labels. Give every token a label: its own id, or "
            "-100 where nothing is to be learned."
        )
    mask = example.get("attention_mask")
    if mask is None or all(mask):
        return ids, labels
    real = torch.as_tensor(mask, dtype=torch.bool)
    return ids[real], labels[real]


def _origins(examples: list[dict[str, Any]]) -> list[torch.Tensor]:
    """Whose each token of each example is; none where all are of the data."""
    if "origins" not in examples[0]:
        return []
    return [torch.as_tensor(example["origins"], dtype=torch.int8) for example in examples]


def _answers(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of one example that have a next token to learn, and these tokens."""
    following = labels[1:]
    positions = (following != IGNORED).nonzero().flatten()
    return positions, following[positions]


def _states(
    examples: list[dict[str, Any]],
    input_ids: list[torch.Tensor],
    read: Mapping[int, list[torch.Tensor]],
    given: StatesReaders | None,
    join: Callable[[list[torch.Tensor]], torch.Tensor],
) -> dict[str, dict[int, torch.Tensor]]:
    """The states of each teacher on a batch by layer: those that its examples bring along, else those that are `given`.

    A teacher with tokens of its own has them in `read`, by its number; the others read `input_ids`.
    """
    if "teacher_states" in examples[0]:
        found = {0: [example["teacher_states"] for example in examples]}
    else:
        by_teacher = given if isinstance(given, Mapping) else {} if given is None else {0: given}
        found = {
            number: [states_of(ids.tolist()) for ids in read.get(number, input_ids)]
            for number, states_of in by_teacher.items()
        }
    return {
        f"{of_teacher(number)}states": {layer: join([own[layer] for own in states]) for layer in states[0]}
        for number, states in found.items()
    }
