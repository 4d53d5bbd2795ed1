"""What a log line tells of the student's own answers, and when that is a warning."""

from collections.abc import Mapping, Sequence

import torch

from ...config.arguments import KavaTrainingArguments
from ...distillation.rollouts.examples import REPEATED_TOKENS, Rollout
from ...distillation.token_means import TokenMeans

MOST_AT_THE_LIMIT, MOST_REPEATED, LEAST_ENTROPY = 0.5, 0.5, 0.1
"""Shares of the answers, of their tokens, and of the entropy that the first answers had; beyond them is a warning."""

AGREED = 0.95
"""Share of the answers' tokens at which the teacher would write the same; from there on it is as sure."""

COLLAPSED, AT_THE_LIMIT, REPETITIVE = "rollout_entropy", "rollout_limit", "rollout_repetition"
"""Kinds of problems."""


def note_figures(
    means: TokenMeans, rollouts: Sequence[Rollout], entropies: Sequence[torch.Tensor] | None, device: torch.device
) -> None:
    """Add what some answers say of themselves to the sums of the next log line.

    These are, as means over the answers, `rollout_empty_share`, and of those that say something `rollout_length` in
    tokens, `rollout_limit_share`, of those that did not end, and `rollout_repetition`; over their tokens
    `rollout_entropy` in nats.

    Args:
        means: takes the sums; every rank must note the same names.
        rollouts: of one generation.
        entropies: at the tokens of each [T or more]; None where they are not known.
        device: of the sums.
    """

    def add(name: str, values: Sequence[float]) -> None:
        total, count = torch.tensor([float(sum(values)), float(len(values))], device=device)
        means.add(name, total, count)

    told = [rollout for rollout in rollouts if not rollout.is_empty]
    add("rollout_length", [len(rollout.answer) for rollout in told])
    add("rollout_limit_share", [not rollout.ended for rollout in told])
    add("rollout_empty_share", [rollout.is_empty for rollout in rollouts])
    add("rollout_repetition", [rollout.repetition() for rollout in told])
    if entropies is not None:
        pairs = zip(rollouts, entropies, strict=True)
        add("rollout_entropy", [x for own, nats in pairs for x in nats[: len(own.answer)].tolist()])


def warnings_of(
    figures: Mapping[str, float], first_entropy: float | None, args: KavaTrainingArguments
) -> dict[str, str]:
    """What is wrong with the answers of a log line, as a sentence with what to change, by the kind of problem.

    Args:
        figures: of the line.
        first_entropy: `rollout_entropy` of the first line that had any.
        args: of the run.
    """
    found = {}
    entropy, repeated = figures.get("rollout_entropy"), figures.get("rollout_repetition", 0.0)
    doubted = figures.get("rollout_agreement", 0.0) < AGREED
    if doubted and entropy is not None and first_entropy is not None and entropy < LEAST_ENTROPY * first_entropy:
        found[COLLAPSED] = (
            f"The student's own answers have lost their variety: {entropy:.2g} nats a token, where the first ones had "
            f"{first_entropy:.2g}. Raise on_policy_temperature (now {args.on_policy_temperature:g}), or lower kd_beta "
            f"(now {args.kd_beta:g})."
        )
    if (share := figures.get("rollout_limit_share", 0.0)) > MOST_AT_THE_LIMIT:
        found[AT_THE_LIMIT] = (
            f"{100 * share:.0f} % of the student's own answers did not end within on_policy_max_new_tokens "
            f"{args.on_policy_max_new_tokens}, so it hardly learns when to stop. Raise that, or lower "
            f"on_policy_fraction (now {args.on_policy_fraction:g})."
        )
    if repeated > MOST_REPEATED:
        found[REPETITIVE] = (
            f"The student's own answers repeat themselves: {100 * repeated:.0f} % of their runs of {REPEATED_TOKENS} "
            f"tokens stood in the same answer before. Lower on_policy_fraction (now {args.on_policy_fraction:g}), or "
            "begin with a student that was trained on answers."
        )
    return found
