"""Which tokens of a batch a term on logits is a mean over, and how many they are."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, cast

import torch

from ..data.formats import IGNORED, SAMPLED
from .logits_terms import AGREEMENT


class CountedTokens(NamedTuple):
    """What a term on logits is a mean over."""

    kind: Literal["answers", "all"]
    written: bool
    """Whether the answers that the student wrote itself are left out, where there are any."""


def widest(kinds: Mapping[str, CountedTokens]) -> CountedTokens:
    """The tokens that all terms' own are among."""
    kind, written = {own.kind for own in kinds.values()}, {own.written for own in kinds.values()}
    return CountedTokens("all" if "all" in kind else "answers", written == {True})


def count_tokens(inputs: Mapping[str, Any], num_items: torch.Tensor | None, tokens: CountedTokens) -> torch.Tensor:
    """How many tokens of a kind a batch has, or with `num_items` the whole optimizer step."""
    if num_items is not None:
        place = (1 if tokens.kind == "answers" else 2) + (3 if tokens.written else 0)
        if place >= len(num_items):
            raise ValueError(
                f"num_items_in_batch holds {len(num_items)} counts, but a term is a mean over others; give three, of "
                "the real tokens, of those of answers, and of those that follow another of their example."
            )
        return num_items[place]
    if tokens.kind == "answers":
        targets = _written(inputs, tokens, inputs["answer_index"], inputs["next_tokens"])
        return (targets != IGNORED).sum()
    targets = _written(inputs, tokens, inputs["next_index"], torch.zeros_like(inputs["next_index"]))
    return (_is_counted(inputs, inputs["next_index"]) & (targets != IGNORED)).sum()


def _written(
    inputs: Mapping[str, Any], tokens: CountedTokens, positions: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """The tokens [K] that follow positions [K], `IGNORED` where the student wrote them and that is not to count."""
    if not tokens.written:
        return targets
    return targets.masked_fill(is_sampled(inputs, positions), IGNORED)


def is_sampled(inputs: Mapping[str, Any], positions: torch.Tensor) -> torch.Tensor:
    """Whether the token that follows each of some positions [K] is the student's own."""
    return cast(torch.Tensor, inputs["origins"].flatten()[positions + 1] == SAMPLED)


def _is_counted(inputs: Mapping[str, Any], positions: torch.Tensor) -> torch.Tensor:
    """At which positions [K] among the flattened tokens a token counts."""
    if "counted" in inputs:
        return inputs["counted"].flatten()[positions]
    return torch.ones_like(positions, dtype=torch.bool)


def ratio_to_widest(
    inputs: Mapping[str, Any], num_items: torch.Tensor | None, kinds: Mapping[str, CountedTokens], name: str
) -> torch.Tensor | float:
    """What turns a sum over a term's own tokens, divided by how many the widest term has, into a mean over its own."""
    own, most = kinds[name], widest(kinds)
    if own == most:
        return 1.0
    return count_tokens(inputs, num_items, most) / count_tokens(inputs, num_items, own).clamp(min=1)


def positions_and_targets(
    inputs: Mapping[str, Any], kinds: Mapping[str, CountedTokens]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Where logits are needed [K], and the tokens that follow there by term [K], `IGNORED` where one is not its own."""
    most = widest(kinds)
    if most.kind == "answers":
        positions = inputs["answer_index"]
        found = dict.fromkeys(kinds.values(), inputs["next_tokens"])
    else:
        positions, answers, following = _following(inputs)
        found = {own: answers if own.kind == "answers" else following for own in kinds.values()}
    found = {own: _written(inputs, own, positions, targets) for own, targets in found.items()}
    if most.written:  # nobody asks for logits where the student wrote
        kept = _written(inputs, most, positions, torch.zeros_like(positions)) != IGNORED
        positions, found = positions[kept], {own: targets[kept] for own, targets in found.items()}
    by_term = {name: found[own] for name, own in kinds.items()}
    if AGREEMENT in by_term:
        by_term[AGREEMENT] = by_term[AGREEMENT].masked_fill(~is_sampled(inputs, positions), IGNORED)
    return positions, by_term


def _following(inputs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All positions that another token follows [M], and what follows there: of the answers alone, and at all."""
    positions, tokens = inputs["next_index"], inputs["input_ids"].flatten().long()
    answers = torch.full_like(tokens, IGNORED)
    answers[inputs["answer_index"]] = inputs["next_tokens"]
    answers = answers[positions]
    following = tokens[(positions + 1).clamp(max=len(tokens) - 1)]
    following = torch.where(answers != IGNORED, answers, following)  # a label may be another token than the one read
    return positions, answers, following.masked_fill(~_is_counted(inputs, positions), IGNORED)
