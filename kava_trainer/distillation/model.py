"""Student and projectors in one module, and what its forward pass gives."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..models.attention.capture import Feature, FeatureCapture
from ..models.hidden_states import decoder_output, first_tensor
from ..models.layers import made_up_tokens
from ..models.lm_head import vocabulary_logits
from ..models.routers import router_losses
from ..models.sharding.passes import read_apart
from ..models.sharding.units import Sharding, settle, shard_model
from ..utils.distributed import in_step, is_sharded
from .logits_terms import LogitsTerms
from .targets import AlignedStates, AlignmentTarget

T = TypeVar("T")


@dataclass
class StudentOutput:
    """What one forward pass of the student and the projectors gives.

    It is no mapping and no tuple on purpose: accelerate would copy every tensor of those to float32. It is registered
    below as a tree, in whose leaves FSDP2 of torch 2.11 finds the tensors at which the backward pass gathers the
    weights again; a dataclass has none for it, and the pass would read weights that are freed.
    """

    last_hidden_state: torch.Tensor
    """[B, T, d_s]."""
    hidden_states: dict[Feature, torch.Tensor]
    """What was captured: a state [B, T, d_s] by its layer, a part of attention [B, T, heads, d]."""
    pairs: list[AlignedStates]
    """Both sides of each pair of layers in one space; empty without teacher states."""
    logits_total: torch.Tensor | None = None
    """Weighted sum of the terms on logits over tokens, with its gradient; None where none was asked for."""
    logits_sums: dict[str, torch.Tensor] = field(default_factory=dict)
    """Sums over tokens of the terms on logits, without weights and gradients."""
    router: tuple[torch.Tensor, torch.Tensor] | None = None
    """The auxiliary loss of a mixture's routers, see `routers.router_losses`."""


torch.export.register_dataclass(StudentOutput)


class DistillationModel(nn.Module):
    """The student and the projectors in one module, so that one wrapper serves both.

    Data parallelism, gradient clipping and gradient accumulation see one model; the student inside stays a plain
    `PreTrainedModel`. Attributes that this module lacks are the student's (`config`, `generate`, ...), and
    `save_pretrained` therefore writes the student alone.

    Args:
        student: the model to train.
        target: what is aligned, with its projectors.
    """

    accepts_loss_kwargs = True
    """Tells Trainer that the loss is already normalised over the whole optimizer step."""

    def __init__(self, student: PreTrainedModel, target: AlignmentTarget) -> None:
        super().__init__()
        self.student = student
        self.target = target
        # Trainer turns it off, and adds it to a config that has none but in its part for text.
        self.student_uses_cache: bool | None = getattr(student.config, "use_cache", None)
        self._capture = FeatureCapture(student, target.student_features)
        self._autocast: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "student":
                raise
            return getattr(self.student, name)

    def shard(self, sharding: Sharding) -> None:
        """Spread student and projectors over the ranks; the parameters are others from then on.

        The projectors are a unit of their own, which computes as it does in one process.

        Args:
            sharding: over which ranks, and how.

        Raises:
            BadRequest: as `shard_model`.
        """
        # Of the projectors' last product, a view: nobody changes the outputs of a unit in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
        shard_model(self.student, sharding)
        for module in (self.target, self):
            sharding.of_modules(module, exact=True)
        self._autocast = sharding.autocast or nullcontext
        settle(self, self.student)

    @property
    def _no_split_modules(self) -> list[str]:
        """What accelerate makes units of: nothing is left for it, see `shard`, whatever the student itself names."""
        return []

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        origins: torch.Tensor | None = None,
        packed_lengths: Sequence[int] | None = None,
        teacher_states: dict[Feature, torch.Tensor] | None = None,
        logits_terms: LogitsTerms | None = None,
        distils: bool = False,
        teacher_input_ids: Any = None,
        teacher_ranges: Any = None,
        **others: Any,
    ) -> Any:
        """Run the student, keep its mapped hidden states, and bring them and the teacher's into one space.

        Args:
            input_ids: tokens [B, T].
            attention_mask: 1 at real tokens [B, T].
            labels: of the student alone; the losses of the distillation are computed elsewhere.
            origins: whose each token is [B, T], see `data.formats`, for these losses; Trainer drops what is not named.
            packed_lengths: tokens of each example of a packed row [1, T].
            teacher_states: what was captured of the teacher; without it nothing is projected.
            logits_terms: computed here, inside the wrapper of data parallelism, because they use the head's weights.
            distils: else the student answers alone, as it does for anybody's code that calls `trainer.model(**batch)`.
            teacher_input_ids: not read: Trainer leaves the columns of a data set out that have no name here.
            teacher_ranges: likewise.
            others: for the student alone.

        Returns:
            A `StudentOutput`; of the student alone its own output, with `loss` and `logits`.
        """
        with self._autocast():  # accelerate does so too, but only around what the trainer has prepared
            if not distils:
                return self.student(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **others)
            return self._distil(input_ids, attention_mask, packed_lengths, teacher_states, logits_terms)

    def _distil(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        packed_lengths: Sequence[int] | None,
        teacher_states: dict[Feature, torch.Tensor] | None,
        logits_terms: LogitsTerms | None,
    ) -> StudentOutput:
        with self._capture as states:
            output = decoder_output(self.student, cast(torch.Tensor, input_ids), attention_mask, packed_lengths)
        last = first_tensor(output)
        router = router_losses(self.student, output, None if packed_lengths else attention_mask)
        pairs = [] if teacher_states is None else self.target(states, teacher_states)
        if logits_terms is None:
            return StudentOutput(last, states, pairs, router=router)
        own = [p for p in self.student.get_output_embeddings().parameters() if p.requires_grad]
        return StudentOutput(last, states, pairs, *logits_terms(self.head, own, last), router)

    def read(self, work: Callable[[], T]) -> T:
        """What some work makes of the student, see `read_apart`; of one that is sharded in the training's precision."""
        with self._autocast():
            return read_apart(self, work)

    def passes_in_step(self) -> AbstractContextManager[None]:
        """Within the `with` block each rank may have the student read as often as it needs, see `distributed.in_step`.

        Without gradients, and as this module does it where `distils` is true and `teacher_states` are not given.
        """
        return in_step(self, self.read_a_token) if is_sharded(self) else nullcontext()

    @torch.no_grad()
    def read_a_token(self) -> None:
        """A pass for nothing, without gradients."""
        ids = made_up_tokens(self.student, 1)
        self(ids, torch.ones_like(ids), distils=True)

    def head(self, states: torch.Tensor) -> torch.Tensor:
        """Logits [..., vocabulary] of last hidden states [..., d_s].

        Where the weights are sharded, the head's are whole from the decoder's pass on, see `shard_model`.
        """
        return vocabulary_logits(self.student, states)
