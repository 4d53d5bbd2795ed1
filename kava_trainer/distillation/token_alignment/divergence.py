"""A divergence between next tokens of two vocabularies, on spans of text that both models end at the same place."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from ...data.formats import IGNORED
from ...data.token_alignment.batching import PACKED_LENGTHS
from ...data.token_alignment.pair_encoder import TeacherTokenizers, tokenizers_agree, tokenizers_given
from ...data.token_alignment.ranges import RANGES, TEACHER_TOKENS
from ...data.token_alignment.spans import TokenSpans
from ..chunked_loss import sum_in_chunks
from ..logits_terms import Head, TeacherLogits

MOST_TOKENS = 8
"""Of a span; longer ones are left out: each of their tokens would cost logits in every span of a chunk."""


class SharedTokens(NamedTuple):
    """The tokens that two vocabularies have in common, by their ids in each [V], and which ids are left [..]."""

    student: torch.Tensor
    teacher: torch.Tensor
    student_rest: torch.Tensor
    teacher_rest: torch.Tensor
    end: torch.Tensor
    """The student's end of text, a scalar."""

    def to(self, device: torch.device) -> "SharedTokens":
        """The same on a device."""
        return SharedTokens(*(ids.to(device) for ids in self))


def shared_tokens(
    student: PreTrainedTokenizerBase | None, teacher: PreTrainedTokenizerBase | None
) -> SharedTokens | None:
    """The tokens that stand for the same bytes in both, and the end of text, however each writes it.

    None where one of the tokenizers is not given, or both have the same tokens.

    Raises:
        BadRequest: if one of the tokenizers is a slow one.
    """
    if student is None or teacher is None or tokenizers_agree(student, teacher):
        return None
    sides = (student, "student"), (teacher, "teacher")
    own, other = (TokenSpans(tokenizer, role).vocabulary() for tokenizer, role in sides)
    pairs = {own[token]: other[token] for token in own.keys() & other.keys()}
    ends = student.eos_token_id, teacher.eos_token_id
    pairs = {a: b for a, b in pairs.items() if a != ends[0] and b != ends[1]} | {ends[0]: ends[1]}
    ids = torch.tensor(sorted(pairs.items()), dtype=torch.long).view(-1, 2)
    rests = (
        sorted({*tokenizer.get_vocab().values()} - {*ids[:, side].tolist()})
        for side, (tokenizer, _) in enumerate(sides)
    )
    own_rest, other_rest = (torch.tensor(rest, dtype=torch.long) for rest in rests)
    return SharedTokens(ids[:, 0], ids[:, 1], own_rest, other_rest, torch.tensor(ends[0]))


def shared_with_each(student: PreTrainedTokenizerBase | None, teachers: TeacherTokenizers) -> list[SharedTokens | None]:
    """The `shared_tokens` of a student with each of its teachers."""
    return [shared_tokens(student, own) for own in tokenizers_given(teachers)]


class Spans(NamedTuple):
    """Spans of text as both models read them, by places among the flattened tokens of a batch; -1 behind the last one.

    Each place is that of the token before: there the logits of the next one are.
    """

    student: torch.Tensor
    """[S, W]."""
    teacher: torch.Tensor
    """[S, W']."""


def coinciding_spans(inputs: Mapping[str, Any], end_of_text: torch.Tensor) -> Spans:
    """The shortest spans of text at whose ends tokens of both models end, of a batch of `collators`.

    Left out are those that begin an example, for nothing predicts their first token; that at the end of one that does
    not end with `end_of_text`, for it may be cut within a token of the teacher; and those of more than `MOST_TOKENS` of
    either model.
    """
    ranges = inputs[RANGES]
    rows, tokens = ranges.shape[:2]
    width = inputs[TEACHER_TOKENS].shape[1]
    start, end = ranges[..., 0], ranges[..., 1]  # what is read there, whatever is compared of it
    real = end > start
    before = F.pad(torch.where(real, end, 0).cummax(dim=1).values[:, :-1], (1, 0))
    begins = real & (start >= before)
    follows = F.pad(real[:, :-1], (1, 0)) & real & ~begins
    number = begins.flatten().cumsum(0) - 1
    count = int(begins.sum())
    inside = (begins | follows).flatten()  # a token that is left out ends a span
    offset = torch.arange(rows, device=ranges.device).unsqueeze(1)
    places = torch.arange(rows * tokens, device=ranges.device)
    if count == 0:
        nothing = places.new_zeros(0, 1)
        return Spans(nothing, nothing)
    first, sizes = places[begins.flatten()], torch.zeros(count, dtype=torch.long, device=ranges.device)
    sizes.index_add_(0, number[inside], torch.ones_like(number[inside]))
    theirs = (start + offset * width).flatten()[first]
    stop = theirs.clone().scatter_reduce_(0, number[inside], (end + offset * width).flatten()[inside], "amax")
    led, leads = (torch.zeros(rows * tokens, dtype=torch.bool, device=ranges.device) for _ in range(2))
    led[inputs["next_index"] + 1], leads[inputs["next_index"]] = True, True
    last = first + sizes - 1
    whole = leads[last] | (inputs["input_ids"].flatten()[last] == end_of_text)
    whole[number[real.flatten() & ~inside]] = False  # a token behind one that is left out has a part of its text
    kept = whole & led[first] & ~_first_of_examples(inputs)[theirs]
    kept &= (sizes <= MOST_TOKENS) & (stop - theirs <= MOST_TOKENS)
    return Spans(_before(first[kept], sizes[kept]), _before(theirs[kept], (stop - theirs)[kept]))


def _first_of_examples(inputs: Mapping[str, Any]) -> torch.Tensor:
    """Which of the teacher's tokens, flattened, begin an example."""
    ids = inputs[TEACHER_TOKENS]
    found = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
    found[:, 0] = True
    place = 0
    for length in inputs.get(PACKED_LENGTHS, ())[:-1]:
        place += length
        found[0, place] = True
    return found.flatten()


def _before(first: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """The places [S, W] before each token of spans that begin at some place [S] and have so many tokens [S]."""
    width = int(sizes.max()) if len(sizes) else 1
    steps = torch.arange(width, device=first.device)
    return torch.where(steps < sizes.unsqueeze(1), first.unsqueeze(1) - 1 + steps, -1)


def span_log_probabilities(logits: torch.Tensor, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities of what a model may say over spans: of each first token, times those of the tokens behind it.

    Args:
        logits: [S, W, V] at the place before each token.
        tokens: that stand there [S, W]; -1 behind the last.
        temperature: the logits are divided by it.

    Returns:
        Float32 [S, V]. Where a span has several tokens the probabilities sum to less than 1.
    """
    found = F.log_softmax(logits.float() / temperature, dim=-1)
    behind = found[:, 1:].gather(-1, tokens[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return found[:, 0] + torch.where(tokens[:, 1:] >= 0, behind, 0.0).sum(dim=1, keepdim=True)


def divergence_of_vocabularies(
    student: torch.Tensor, teacher: torch.Tensor, shared: SharedTokens, temperature: float = 1.0, beta: float = 0.0
) -> torch.Tensor:
    """How far two distributions over different vocabularies are apart (after ULD, arXiv 2402.12030, and TRL's GOLD).

    Over the tokens that both share it is the generalised Jensen-Shannon divergence of `generalized_jsd_per_token`, for
    parts of distributions: each KL(P|Q) has the mass of Q less that of P added, without which it could be below 0. Over
    the rest it is half the sum of absolute differences between the probabilities of each side, sorted.

    Args:
        student: log-probabilities [S, V], see `span_log_probabilities`.
        teacher: [S, V'].
        shared: which tokens are the same.
        temperature: see `generalized_jsd_per_token`.
        beta: see `generalized_jsd_per_token`.

    Returns:
        Float32 [S], times the squared temperature; never below 0.
    """
    own, other = student[:, shared.student], teacher[:, shared.teacher]
    if beta == 0:
        found = _kl(other, own)
    elif beta == 1:
        found = _kl(own, other)
    else:
        shares = torch.tensor([beta, 1 - beta], device=own.device).log()
        mixture = torch.logaddexp(other + shares[0], own + shares[1])
        found = beta * _kl(other, mixture) + (1 - beta) * _kl(own, mixture)
    rests = student[:, shared.student_rest].exp(), teacher[:, shared.teacher_rest].exp()
    width = max(rest.shape[1] for rest in rests)
    ranked = [F.pad(rest.sort(dim=-1, descending=True).values, (0, width - rest.shape[1])) for rest in rests]
    return (found + (ranked[0] - ranked[1]).abs().sum(dim=-1) / 2) * temperature**2


def _kl(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """KL(left | right) of log-probabilities of parts of two distributions, over the last dimension."""
    return (left.exp() * (left - right) - left.exp() + right.exp()).sum(dim=-1)


class SpanDivergence:
    """Sums the divergence over spans of a batch; it is called as `LogitsTerms` is, within the model's forward pass.

    The divergence of a span counts for each of its tokens that the term is over.

    Args:
        weight: of the sum in the total, a number or a scalar on the device.
        inputs: a batch of `collators`, with what the teacher reads.
        positions: [K] among the flattened tokens of the batch, that a token follows.
        targets: these tokens [K], `IGNORED` where one is not counted.
        teacher: its last states at its own tokens [B, U, d_t], the head that makes logits of them, and its share in the
            divergence.
        shared: which tokens are the same; None where nobody has said.
        vocabulary: logits of the student.
        temperature: see `divergence_of_vocabularies`.
        beta: likewise.

    Raises:
        ValueError: if nobody has said which tokens are the same.
    """

    def __init__(
        self,
        weight: float | torch.Tensor,
        inputs: Mapping[str, Any],
        positions: torch.Tensor,
        targets: torch.Tensor,
        teacher: TeacherLogits,
        shared: SharedTokens | None,
        vocabulary: int,
        temperature: float = 1.0,
        beta: float = 0.0,
    ) -> None:
        if shared is None:
            raise ValueError(
                "kd_weight is above 0, and the teacher reads other tokens; give KavaTrainer the tokenizers, as "
                "processing_class and teacher_tokenizer."
            )
        self._states, self._teacher_head, share, self._whole_head = teacher
        self._shared, self._options = shared.to(self._states.device), (temperature, beta)
        self._spans, self._weight = coinciding_spans(inputs, self._shared.end), weight
        self._vocabulary = vocabulary
        self._ids = inputs["input_ids"].flatten(), inputs[TEACHER_TOKENS].flatten()
        places = self._spans.student
        counted = torch.zeros_like(self._ids[0], dtype=torch.bool)
        counted[positions] = targets != IGNORED
        self._counts = (counted[places.clamp(min=0)] & (places >= 0)).sum(dim=1) * share

    def __call__(
        self, head: Head, parameters: Sequence[torch.Tensor], last_state: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The weighted total, which can be differentiated once, and the sum, which cannot. As `LogitsTerms`."""
        kept = self._counts > 0
        rows = []
        for places, states, ids in zip(self._spans, (last_state, self._states), self._ids, strict=True):
            places = places[kept]
            rows += [states.flatten(0, 1)[places.clamp(min=0)], torch.where(places >= 0, ids[places + 1], -1)]
        weights = torch.as_tensor(self._weight, dtype=torch.float32, device=last_state.device).reshape(1)
        positions = sum(part.shape[1] for part in self._spans)
        function = partial(self._chunk, head)
        with self._whole_head():
            total, sums = sum_in_chunks(
                function, (*rows, self._counts[kept]), weights, parameters, self._widest() * positions
            )
        return total, {"kd": sums[0]}

    def _widest(self) -> int:
        """The larger of both vocabularies."""
        return max(self._vocabulary, len(self._shared.teacher) + len(self._shared.teacher_rest))

    def _chunk(
        self,
        head: Head,
        states: torch.Tensor,
        tokens: torch.Tensor,
        teacher_states: torch.Tensor,
        teacher_tokens: torch.Tensor,
        counts: torch.Tensor,
    ) -> torch.Tensor:
        temperature, beta = self._options
        own = span_log_probabilities(head(states), tokens, temperature)
        other = span_log_probabilities(self._teacher_head(teacher_states), teacher_tokens, temperature)
        return (divergence_of_vocabularies(own, other, self._shared, temperature, beta) * counts).sum().reshape(1)


class JoinedTerms:
    """Several terms on logits as one."""

    def __init__(self, *terms: Any) -> None:
        self._terms = terms

    def __call__(
        self, head: Head, parameters: Sequence[torch.Tensor], last_state: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The sum of their totals, and the sums of all of them, those of one name added up. As `LogitsTerms`."""
        totals, sums = zip(*(term(head, parameters, last_state) for term in self._terms), strict=True)
        names = dict.fromkeys(name for part in sums for name in part)
        return torch.stack(totals).sum(), {name: sum(part[name] for part in sums if name in part) for name in names}
