"""How well student and target agree, what of it means anything, and what it is called.

CosSim alone proves nothing where the projector trains: both sides can agree by becoming a constant. The diagnostics
here are computed on a fixed probe of held-out tokens; linear CKA looks at the raw teacher, so no projector can move it.
All functions take states [N, d] of N unmasked tokens and compute in float32.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

STATUSES = ((0.95, "Excellent"), (0.90, "Great"), (0.70, "Good"), (0.50, "Learning"))
"""Lower edges of CosSim, inclusive, from the best status down; below the last one it is `Adapting`."""

COLLAPSED = "Collapsed"

MINIMUM_MARGIN = 0.05

MINIMUM_RANK_SHARE = 0.25


def alignment_status(cos_sim: float, collapsed: bool = False) -> str:
    """The status a CosSim is shown with: `Adapting` to `Excellent`, or `Collapsed` whatever CosSim is."""
    if collapsed:
        return COLLAPSED
    return next((status for edge, status in STATUSES if cos_sim >= edge), "Adapting")


def mean_cosine(student: torch.Tensor, target: torch.Tensor) -> float:
    """Mean over tokens of the cosine between a student state and its own target."""
    return F.cosine_similarity(student.float(), target.float(), dim=-1, eps=1e-6).mean().item()


def centred_cosine(student: torch.Tensor, target: torch.Tensor) -> float:
    """`mean_cosine` after subtracting each side's mean over the tokens: what is left without a common offset."""
    student, target = student.float(), target.float()
    return mean_cosine(student - student.mean(dim=0), target - target.mean(dim=0))


def shuffled_cosine(student: torch.Tensor, target: torch.Tensor) -> float:
    """Mean cosine between a student state and the target of *another* token.

    The mean over every such pair, which is what permuting the targets without fixed points gives on average; it needs
    no random numbers: (sum_i s_i . sum_j t_j - sum_i s_i . t_i) / (N (N - 1)) for unit vectors s, t.
    """
    student, target = (F.normalize(states.float(), dim=-1, eps=1e-6) for states in (student, target))
    count = len(student)
    own = (student * target).sum()
    return ((student.sum(dim=0) @ target.sum(dim=0) - own) / max(count * (count - 1), 1)).item()


def effective_rank(states: torch.Tensor) -> float:
    """exp of the entropy of the normalised singular values of the centred states.

    Roy and Vetterli 2007; RankMe, Garrido et al. 2023. Between 1 and d; 0 where all tokens have
    one state, NaN where a state is no finite number.
    """
    centred = states.float() - states.float().mean(dim=0)
    if not centred.isfinite().all():
        return float("nan")
    values = torch.linalg.svdvals(centred)
    if values.sum() <= 1e-6 * states.float().norm().clamp(min=1e-6):
        return 0.0
    shares = values / values.sum()
    return torch.special.entr(shares).sum().exp().item()


def linear_cka(left: torch.Tensor, right: torch.Tensor) -> float:
    """Linear centred kernel alignment of two sets of states of the same tokens, of any widths (Kornblith et al. 2019).

    |X'Y|^2 / (|X'X| |Y'Y|) with Frobenius norms of the centred states X and Y. Unmoved by rotations and scale.
    """
    left, right = (states.float() - states.float().mean(dim=0) for states in (left, right))
    scale = (left.T @ left).norm() * (right.T @ right).norm()
    return ((left.T @ right).square().sum() / scale.clamp(min=1e-12)).item()


@dataclass(frozen=True)
class Diagnostics:
    """What one probe of one pair of layers shows; names as in `run_summary.json`."""

    cos_sim: float
    centred_cos_sim: float
    shuffled_cos_sim: float
    margin: float
    cka: float
    student_effective_rank: float
    target_effective_rank: float
    teacher_effective_rank: float

    def to_dict(self) -> dict[str, float]:
        """The figures by name."""
        return asdict(self)


@torch.no_grad()
def diagnose(compared: torch.Tensor, target: torch.Tensor, student: torch.Tensor, teacher: torch.Tensor) -> Diagnostics:
    """All diagnostics of one pair on a probe.

    Args:
        compared: the student's side of the comparison [N, d]: its states, or what a projector makes of them.
        target: their targets [N, d]: what a projector makes of the teacher's states, or these.
        student: raw, unprojected student states [N, d_s] of the same tokens.
        teacher: raw, unprojected teacher states [N, d_t] of the same tokens.
    """
    return diagnose_groups(measure_agreement(compared, target), student, target, teacher)


class Agreement(NamedTuple):
    """How well two sides agree: token by token, without what all tokens have in common, and with another's target."""

    own: float
    centred: float
    shuffled: float


@torch.no_grad()
def measure_agreement(compared: torch.Tensor, target: torch.Tensor) -> Agreement:
    """The cosines of a group of tokens, any of whose targets [n, d] can stand for another's."""
    return Agreement(mean_cosine(compared, target), centred_cosine(compared, target), shuffled_cosine(compared, target))


def mean_agreement(groups: Sequence[tuple[Agreement, int]]) -> Agreement:
    """The mean over groups that have so many tokens each."""
    if len(groups) == 1:
        return groups[0][0]
    total = sum(count for _, count in groups)
    return Agreement(*(sum(own[i] * count for own, count in groups) / max(total, 1) for i in range(3)))


@torch.no_grad()
def diagnose_groups(
    agreement: Agreement, student: torch.Tensor, target: torch.Tensor, teacher: torch.Tensor
) -> Diagnostics:
    """All diagnostics of one comparison, whose agreement was measured group by group.

    Args:
        agreement: of `mean_agreement`.
        student: as for `diagnose`.
        target: as for `diagnose`.
        teacher: as for `diagnose`.
    """
    return Diagnostics(
        cos_sim=agreement.own,
        centred_cos_sim=agreement.centred,
        shuffled_cos_sim=agreement.shuffled,
        margin=agreement.own - agreement.shuffled,
        cka=linear_cka(student, teacher),
        student_effective_rank=effective_rank(student),
        target_effective_rank=effective_rank(target),
        teacher_effective_rank=effective_rank(teacher),
    )


def collapse_reason(figures: Diagnostics, most_dimensions: int) -> str | None:
    """Why an alignment counts as collapsed, in one sentence, or None.

    Collapsed is a margin under 0.05, or targets whose effective rank is under a quarter of the smaller of
    `most_dimensions` (the student's width d_s, or the rank of a bridge) and the raw teacher's effective rank.
    """
    if not all(map(math.isfinite, figures.to_dict().values())):
        return "The states on the probe are no finite numbers any more."
    if figures.margin < MINIMUM_MARGIN:
        return (
            f"A student state agrees with the target of another token ({figures.shuffled_cos_sim:.3f}) as well as with "
            f"its own ({figures.cos_sim:.3f})."
        )
    possible = min(most_dimensions, figures.teacher_effective_rank)
    if figures.target_effective_rank < MINIMUM_RANK_SHARE * possible:
        return (
            f"The targets use {figures.target_effective_rank:.1f} of {possible:.1f} possible dimensions, so the "
            "projector has thrown most of the teacher away."
        )
    return None


EARLY_STEPS = 50
"""Before so many steps an alignment that was collapsed from the start is only not there yet."""

AGREEING = 0.5
"""CosSim from which states agree, be it with any token's target; below it they have not learned to."""


@dataclass(frozen=True)
class Circumstances:
    """Of a collapse: what its remedy has to fit."""

    direction: str | None
    """`projector_direction`."""
    anchor: str | None
    """`projector_anchor`."""
    supervised: bool
    """Whether a term trained the next-token predictions."""
    step: int
    """Optimizer steps that were done."""
    whole_before: bool = False
    """Whether the alignment was no collapse before the first step."""
    cos_sim: float | None = None
    """Of the pair that collapsed the most."""
    weight: str = "mercator_weight"
    """Name of the heaviest weight of those that compare hidden states."""


def collapse_remedy(case: Circumstances) -> str:
    """What to change after a collapse, in one sentence."""
    if not case.supervised:
        return "Set lm_weight above 0, so that the student's states have to carry something."
    if case.cos_sim is not None and not math.isfinite(case.cos_sim):
        return "Lower learning_rate, and write bf16 in place of fp16, for numbers that stay finite."
    if is_early(case.step) and not case.whole_before:
        return f"{too_early(case.step)}: train longer (max_steps or num_train_epochs)."
    if case.direction == "teacher_to_student" and case.anchor == "reconstruction":
        return "Raise anchor_weight, or write projector_anchor pca, whose targets cannot move."
    if case.direction == "teacher_to_student" and case.anchor != "pca":
        return "Write projector_anchor pca or reconstruction, or projector_direction student_to_teacher."
    if case.whole_before:
        rates = "learning_rate" if case.direction == "none" else "learning_rate and projector_learning_rate"
        return f"It was whole before the first step, and the training undid it: lower {rates}, or raise warmup_steps."
    if case.cos_sim is not None and case.cos_sim < AGREEING:
        return f"The student has not learned its targets: train longer, raise {case.weight}, or align another layer."
    return f"Lower {case.weight}, or align another layer: this one has next to one direction for all tokens."


def is_early(steps: int) -> bool:
    """Whether so few steps tell little; 0 are those of a run that does not tell how many it did."""
    return 0 < steps < EARLY_STEPS


def too_early(steps: int) -> str:
    """How a sentence on so few steps begins."""
    return f"After {steps} step{'' if steps == 1 else 's'} it is too early to tell"
