"""Where projectors start: closed-form fits on one pass over the first training examples.

Only sums of products are kept from token to token, in float64, so the pass needs the same memory however long it is,
and the sums of several ranks add up to those of one.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from torch import nn

from ..data.selection import draw_examples
from ..data.token_alignment.ranges import aligned_tokens
from ..models.teacher import TeacherSource, in_step_reading
from ..utils.distributed import give_up_whole_weights, is_sharded, put_whole, whole_weights
from ..utils.errors import BadRequest
from ..utils.progress_bar import STEPS, own_batches, told, with_progress
from .bridge.agreement import Agreement, held_back_tokens, hold_back, measure_agreement
from .bridge.fit import BridgeFit, decide_rank, tell_agreement
from .model import DistillationModel
from .projector import ElasticBottleneck, LowRankBridge, PrincipalProjection, normalise
from .targets import AlignmentTarget
from .teachers.several import online_teachers
from .token_alignment.states import compared_with_each, read_states

RIDGE = 1e-3
"""Ridge penalty as a share of the mean variance of the inputs."""

MOST_PAIRS_ON_DEVICE = 4

SMALLEST_AXIS = 1e-6
"""A principal axis with less than this share of the first one's variance is none; numbers of 16 bits round off more."""


class Moments:
    """Running count, means and second moments of pairs of vectors (x [d], y [e]) of input and output size d and e.

    The sums are kept on `device`, in float64.
    """

    def __init__(self, input_size: int, output_size: int, device: torch.device | str = "cpu") -> None:
        self.sizes = (input_size, output_size)
        self._where: Any = {"dtype": torch.float64, "device": device}
        self._inputs = torch.zeros(input_size + 1, input_size + output_size + 1, **self._where)
        self._squares = torch.zeros(output_size, **self._where)

    def add(self, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """Add tokens: x [N, d] and y [N, e]."""
        ones = torch.ones_like(inputs[:, :1])
        x, y, one = (part.to(**self._where) for part in (inputs, outputs, ones))
        self._inputs += torch.cat([x, one], dim=1).T @ torch.cat([x, y, one], dim=1)
        self._squares += y.square().sum(dim=0)

    def reduce(self, sum_over_ranks: Callable[[torch.Tensor], torch.Tensor], device: torch.device | str) -> None:
        """Put the sums over all ranks in place of this rank's; `device` is where ranks can exchange tensors."""
        self._inputs, self._squares = (
            sum_over_ranks(sums.to(device)).to(**self._where) if sums.numel() else sums
            for sums in (self._inputs, self._squares)
        )

    @property
    def count(self) -> int:
        """Tokens seen."""
        return round(self._inputs[-1, -1].item())

    def _centred(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The means of (x, y) and the covariances [d, d + e] of x with both."""
        means = self._inputs[-1, :-1] / self.count
        return means, self._inputs[:-1, :-1] / self.count - torch.outer(means[: self.sizes[0]], means)

    def output_variance(self) -> torch.Tensor:
        """Sum of the variances of y."""
        means = self._inputs[-1, self.sizes[0] : -1] / self.count
        return (self._squares / self.count - means.square()).sum()

    def ridge(self, penalty: float = RIDGE) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight [e, d] and bias [e] of the linear map from x to y with the least squared error plus penalty.

        W = C_yx (C_xx + penalty * mean variance of x * I)^-1 with covariances C; the bias is not penalised.
        """
        size = self.sizes[0]
        means, covariance = self._centred()
        weight = _ridge_weight(covariance[:, :size], covariance[:, size:], penalty)
        return weight, means[size:] - weight @ means[:size]

    def principal(self, turn: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight [e, d] and bias [e] of the projection on the first e principal axes of x, centred.

        One common factor gives the outputs the variance of y; the proportions between the axes stay. Where e exceeds
        d the outputs lie in a subspace.

        Args:
            turn: which orthonormal basis describes the subspace is free; take the one nearest to y in the least
                squares (orthogonal Procrustes, Schoenemann 1966) in place of the principal axes.
        """
        size, outputs = self.sizes
        means, covariance = self._centred()
        values, axes = torch.linalg.eigh(covariance[:, :size])
        kept = min(outputs, size)
        basis = torch.zeros(outputs, size, **self._where)
        basis[:kept] = axes[:, -kept:].flip(1).T
        if turn:
            left, _, right = torch.linalg.svd((basis @ covariance[:, size:]).T)
            basis = left @ right @ basis
        scale = self.output_variance() / values[-kept:].clamp(min=0).sum().clamp(min=1e-12)
        weight = scale.sqrt() * basis
        return weight, -weight @ means[:size]

    def bridge(self, width: int) -> BridgeFit:
        """Both maps of a `LowRankBridge` at its highest rank, where the first `width` of the inputs x are the teacher's
        state, and the others the student's.

        The teacher's map gives the coordinates on its principal axes, and the student's is the ridge fit to these.
        """
        means, covariance = self._centred()
        values, axes = torch.linalg.eigh(covariance[:width, :width])
        highest = min(width, self.sizes[0] - width)
        values, basis = values.flip(0)[:highest], axes.flip(1)[:, :highest]
        weight = _ridge_weight(covariance[width:, width:], covariance[width:, :width] @ basis, RIDGE)
        count = int((values > SMALLEST_AXIS * values[0]).sum())
        return BridgeFit((basis.T, -basis.T @ means[:width]), (weight, -weight @ means[width:]), max(count, 1))


def _ridge_weight(inputs: torch.Tensor, cross: torch.Tensor, penalty: float) -> torch.Tensor:
    """Weight [e, d] of the ridge fit, of the covariances [d, d] of the inputs and [d, e] with the outputs."""
    damping = penalty * inputs.diagonal().mean().clamp(min=1e-12)
    unit = torch.eye(len(inputs), dtype=inputs.dtype, device=inputs.device)
    return torch.linalg.solve(inputs + damping * unit, cross).T


def calibration_examples(dataset: Any, tokens: int, seed: int, target: AlignmentTarget) -> list[dict[str, Any]]:
    """The training examples that the projectors start from.

    Args:
        dataset: see `draw_examples`.
        tokens: they hold at least so many, or are all there are.
        seed: of the draw.
        target: says how many tokens its projectors need.

    Raises:
        BadRequest: as `check_enough_tokens`.
    """
    examples = draw_examples(dataset, tokens, seed)
    check_enough_tokens(target, aligned_tokens(examples))
    return examples


def inputs_of_fit(target: AlignmentTarget) -> int:
    """Inputs of the largest fit that the projectors of a target start from; 0 where it has none."""
    bridged = [max(bridge.config.input_size, bridge.config.output_size) for bridge in target.bridges]
    return max(bridged or [_fitted(projector).weight.shape[1] for projector in target.projectors], default=0)


def check_enough_tokens(target: AlignmentTarget, tokens: int) -> None:
    """Make sure that there are more tokens than inputs of any fit, if there is any. Raises `BadRequest` if not."""
    size = inputs_of_fit(target)
    tokens -= held_back_tokens(tokens) if target.bridges else 0
    if size and tokens <= size:
        raise BadRequest(
            f"The calibration pass would see {tokens} tokens, and a fit of {size} inputs needs more; raise "
            "calibration_tokens or use more training data."
        )


@torch.no_grad()
def calibrate(
    model: DistillationModel,
    teacher: TeacherSource,
    examples: list[dict[str, Any]],
    collator: Callable[[list[Any]], dict[str, Any]],
    batch_size: int,
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor],
    least_squares: bool,
    tell: Callable[[str], None],
) -> None:
    """Set the projectors of a model from what student and teacher make of the first examples.

    A `PrincipalProjection` gets the teacher's principal subspace. With `least_squares` its axes are turned towards the
    student's states, and the last layer of an `ElasticBottleneck` gets the ridge fit from its random hidden features
    to the other side, so that the pair agrees as well as it can at once. A `LowRankBridge` gets the maps of both sides
    and, where its rank is open, the highest one at which they agree on examples that are held back from the fit.

    Without projectors there is nothing to do.

    Args:
        model: student and projectors; their mode is kept.
        teacher: the teacher's states.
        examples: the same on every rank, which share them out; see `calibration_examples`.
        collator: pads them.
        batch_size: examples at a time.
        sum_over_ranks: sums a tensor over all ranks.
        least_squares: whether the projectors start near the student's states, or from a subspace alone.
        tell: prints a line: at which ranks the sides of a bridge agree.

    Raises:
        BadRequest: if there are not two examples for a bridge, or its rank is open and its sides agree at none.
    """
    if not model.target.projectors:
        return
    training = model.training
    model.eval()
    device = model.student.device
    # In float64, which a Mac's GPU lacks; and for many pairs the sums would fill a small GPU.
    where = "cpu" if device.type == "mps" or len(model.target.projectors) > MOST_PAIRS_ON_DEVICE else device

    def total(sums: torch.Tensor) -> torch.Tensor:
        return sum_over_ranks(sums.to(device)).to(where)

    in_step = partial(_in_step, model, teacher)
    fitted_to, held_back = hold_back(examples) if model.target.bridges else (examples, [])
    moments = [_moments_of(projector, where) for projector in model.target.projectors]
    tokens = aligned_tokens(examples)
    with told(f"Calibrating the projectors on {tokens} tokens"), whole_weights(model.target):
        for batch in own_batches(fitted_to, batch_size, "Calibrating the projectors", in_step):
            _add_batch(moments, model, teacher, collator(batch))
    fits = list(zip(model.target.projectors, moments, strict=True))
    bridged = []
    for projector, sums in with_progress(fits, "Fitting the projectors", "projector", STEPS):
        sums.reduce(sum_over_ranks, device)
        if isinstance(projector, LowRankBridge):
            bridged.append(sums.bridge(projector.config.input_size))
        else:
            _set(projector, sums, least_squares)
    if bridged:
        batches = map(collator, own_batches(held_back, batch_size, "Measuring the bridges", in_step))
        sides = _coordinates(model, teacher, batches, bridged)
        _set_bridges(model.target, bridged, [measure_agreement(*own, total) for own in sides], tell)
    give_up_whole_weights(model)
    model.train(training)


def _fitted(projector: nn.Module) -> PrincipalProjection | nn.Linear:
    """The linear map of a projector that is fitted, with its weight [out, in] and bias."""
    return projector if isinstance(projector, PrincipalProjection) else cast(ElasticBottleneck, projector).down


def _moments_of(projector: nn.Module, where: torch.device | str) -> Moments:
    """The sums that a projector is fitted by; those of a bridge are over both sides in one vector."""
    if isinstance(projector, LowRankBridge):
        return Moments(projector.config.input_size + projector.config.output_size, 0, where)
    outputs, inputs = _fitted(projector).weight.shape
    return Moments(inputs, outputs, where)


def _states(
    model: DistillationModel, teacher: TeacherSource, batch: dict[str, torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What student [N, d_s] and teacher [N, d_t] make of the tokens of a batch, pair by pair of layers."""
    batch = send_to_device(batch, model.student.device)
    real = batch.get("counted", batch["attention_mask"]).bool()
    mask = compared_with_each(batch, real, len(model.target.parts))
    teacher_states = read_states(teacher, batch)
    output = model(batch["input_ids"], batch["attention_mask"], distils=True)
    yield from model.target.fitted_sides(output.hidden_states, teacher_states, mask)


def _in_step(model: DistillationModel, teacher: TeacherSource) -> AbstractContextManager[None]:
    """Within the `with` block the ranks may have different numbers of batches, whichever of the models are sharded."""
    running = [own for own in online_teachers(teacher) if is_sharded(own.model)]
    if not running:
        return model.passes_in_step()
    return in_step_reading(running, model.read_a_token if is_sharded(model) else lambda: None)


def _add_batch(
    moments: list[Moments], model: DistillationModel, teacher: TeacherSource, batch: dict[str, torch.Tensor]
) -> None:
    target = model.target
    for owner, sides in zip(target.owners, _states(model, teacher, batch), strict=True):
        _add(moments[owner], target.projectors[owner], target.direction, *sides)


def _add(sums: Moments, projector: nn.Module, direction: str, student: torch.Tensor, teacher: torch.Tensor) -> None:
    """Add tokens to the sums that a projector is fitted by."""
    if isinstance(projector, LowRankBridge):
        both = torch.cat([normalise(teacher), normalise(student)], dim=1)
        sums.add(both, both[:, :0])
        return
    source, other = (student, teacher) if direction == "student_to_teacher" else (teacher, student)
    sums.add(projector.hidden(source) if isinstance(projector, ElasticBottleneck) else normalise(source), other)


def _set(projector: nn.Module, sums: Moments, least_squares: bool) -> None:
    """Give a projector of one side its map."""
    principal = isinstance(projector, PrincipalProjection)
    weight, bias = sums.principal(turn=least_squares) if principal else sums.ridge()
    put_whole(_fitted(projector).weight, weight)
    put_whole(_fitted(projector).bias, bias)


def _coordinates(
    model: DistillationModel, teacher: TeacherSource, batches: Iterable[dict[str, torch.Tensor]], fits: list[BridgeFit]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Where the bridges put the student's states [N, axes] and the teacher's [N, axes] of some batches."""
    kept = [[(fit.teacher[0].new_zeros(0, fit.axes),) * 2] for fit in fits]  # a rank may have no batch
    for batch in batches:
        for rows, fit, sides in zip(kept, fits, _states(model, teacher, batch), strict=True):
            rows.append(fit.coordinates(*sides))
    return [(torch.cat([own for own, _ in rows]), torch.cat([other for _, other in rows])) for rows in kept]


def _set_bridges(
    target: AlignmentTarget, fits: list[BridgeFit], found: list[Agreement], tell: Callable[[str], None]
) -> None:
    """Show how the sides of each bridge agree, and give it its rank and maps. Raises `BadRequest` as `decide_rank`."""
    measured = list(zip(target.bridges, target.pairs, found, strict=True))
    for bridge, layers, agreement in measured:
        tell_agreement(bridge, layers, agreement, tell)
    for fit, (bridge, layers, agreement) in zip(fits, measured, strict=True):
        decide_rank(bridge, layers, agreement)
        fit.give_to(bridge)
