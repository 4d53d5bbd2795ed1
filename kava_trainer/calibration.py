"""Where projectors start: closed-form fits on one pass over the first training examples.

Only sums of products are kept from token to token, in float64, so the pass needs the same memory however long it is,
and the sums of several ranks add up to those of one.
"""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from torch import nn
from tqdm.auto import tqdm

from .errors import BadRequest
from .projector import ElasticBottleneck, PrincipalProjection, normalise
from .student import DistillationModel
from .teacher import TeacherSource

RIDGE = 1e-3
"""Ridge penalty as a share of the mean variance of the inputs."""


class Moments:
    """Running count, means and second moments of pairs of vectors (x [d], y [e]).

    Args:
        input_size: d.
        output_size: e; 0 where only x matters.
        device: where the sums are kept.
    """

    def __init__(self, input_size: int, output_size: int, device: torch.device | str = "cpu") -> None:
        # Two float64 matrices at most; mps has no float64 and keeps them on the CPU.
        self._where = {"dtype": torch.float64, "device": "cpu" if torch.device(device).type == "mps" else device}
        self.sizes = (input_size, output_size)
        width = input_size + output_size + 1
        self._products = torch.zeros(width, width, **self._where)

    def add(self, inputs: torch.Tensor, outputs: torch.Tensor | None = None) -> None:
        """Add tokens: x [N, d] and, where there are outputs, y [N, e]."""
        columns = [inputs, *([] if outputs is None else [outputs]), torch.ones_like(inputs[:, :1])]
        rows = torch.cat([column.to(**self._where) for column in columns], dim=1)
        self._products += rows.T @ rows

    def reduce(self, sum_over_ranks: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Put the sums over all ranks in place of this rank's."""
        self._products = sum_over_ranks(self._products)

    @property
    def count(self) -> int:
        """Tokens seen."""
        return round(self._products[-1, -1].item())

    def _centred(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The means of (x, y) and their covariance matrix."""
        means = self._products[-1, :-1] / self.count
        return means, self._products[:-1, :-1] / self.count - torch.outer(means, means)

    def ridge(self, penalty: float = RIDGE) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight [e, d] and bias [e] of the linear map from x to y with the least squared error plus penalty.

        W = C_yx (C_xx + penalty * mean variance of x * I)^-1 with covariances C; the bias is not penalised.
        """
        size = self.sizes[0]
        means, covariance = self._centred()
        inputs = covariance[:size, :size]
        damping = penalty * inputs.diagonal().mean().clamp(min=1e-12)
        weight = torch.linalg.solve(inputs + damping * torch.eye(size, **self._where), covariance[:size, size:]).T
        return weight, means[size:] - weight @ means[:size]

    def principal(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight [size, d] and bias [size] of the projection on the first principal axes of x, centred.

        One common factor gives the outputs mean square 1, as a normalised hidden state has; the proportions between
        the axes stay. Where `size` exceeds d the rest is zero.
        """
        means, covariance = self._centred()
        values, axes = torch.linalg.eigh(covariance[: self.sizes[0], : self.sizes[0]])
        kept = min(size, self.sizes[0])
        scale = (size / values[-kept:].clamp(min=0).sum().clamp(min=1e-12)).sqrt()
        weight = torch.zeros(size, self.sizes[0], **self._where)
        weight[:kept] = scale * axes[:, -kept:].flip(1).T
        return weight, -weight @ means[: self.sizes[0]]


@torch.no_grad()
def calibrate(
    model: DistillationModel,
    teacher: TeacherSource,
    examples: list[dict[str, Any]],
    collator: Callable[[list], dict],
    batch_size: int,
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Set the projectors of a model from what student and teacher make of the first examples.

    A `PrincipalProjection` gets the teacher's principal subspace. The last layer of an `ElasticBottleneck` gets the
    ridge fit from its random hidden features to the other side, so that the pair agrees as well as it can at once.

    Args:
        model: student and projectors; their mode is kept.
        teacher: the teacher's states.
        examples: the same on every rank; the ranks share them out.
        collator: pads them.
        batch_size: examples at a time.
        sum_over_ranks: sums a tensor over all ranks.

    Raises:
        BadRequest: if the examples hold fewer tokens than a fit needs.
    """
    training = model.training
    model.eval()
    moments = [_moments_of(projector, model.student.device) for projector in model.target.projectors]
    with PartialState().split_between_processes(examples) as share:
        starts = range(0, len(share), batch_size)
        shown = None if PartialState().is_main_process else True
        for start in tqdm(starts, desc="Calibrating the projectors", leave=False, disable=shown):
            _add_batch(moments, model, teacher, collator(share[start : start + batch_size]))
    model.train(training)
    for projector, sums in zip(model.target.projectors, moments, strict=True):
        sums.reduce(sum_over_ranks)
        _set(projector, sums)


def _moments_of(projector: nn.Module, device: torch.device) -> Moments:
    if isinstance(projector, PrincipalProjection):
        return Moments(projector.config.input_size, 0, device)
    return Moments(projector.down.in_features, projector.down.out_features, device)


def _add_batch(
    moments: list[Moments], model: DistillationModel, teacher: TeacherSource, batch: dict[str, torch.Tensor]
) -> None:
    batch = send_to_device(batch, model.student.device)
    mask = batch["attention_mask"].bool()
    teacher_states = teacher.features(batch["input_ids"], batch["attention_mask"])
    nowhere = batch["input_ids"].new_empty(0)
    output = model(batch["input_ids"], batch["attention_mask"], logits_columns=nowhere)
    for sums, projector, (student, layer) in zip(moments, model.target.projectors, model.target.pairs, strict=True):
        source, other = teacher_states[layer][mask], output.hidden_states[student][mask]
        if model.target.direction == "student_to_teacher":
            source, other = other, source
        if isinstance(projector, ElasticBottleneck):
            sums.add(projector.hidden(source), other)
        else:
            sums.add(normalise(source))


def _set(projector: nn.Module, moments: Moments) -> None:
    size = moments.sizes[0]
    if moments.count <= size:
        raise BadRequest(
            f"The calibration pass saw {moments.count} tokens, and a fit of {size} inputs needs more; raise "
            "calibration_tokens or use more training data."
        )
    if isinstance(projector, PrincipalProjection):
        weight, bias = moments.principal(projector.config.output_size)
        projector.weight.copy_(weight)
        projector.bias.copy_(bias)
    else:
        weight, bias = moments.ridge()
        projector.down.weight.copy_(weight)
        projector.down.bias.copy_(bias)
