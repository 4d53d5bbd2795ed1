"""A model without some of its blocks, and blocks that begin from a state that is known already."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...utils.errors import BadRequest, reason_of
from ..hidden_states import first_tensor, run_decoder
from ..layers import evaluating, find_blocks, made_up_tokens

_AXES = 3
"""Of hidden states [B, T, d]; a family with several streams of them has more."""

Replacement = Callable[[torch.Tensor], torch.Tensor]
"""Takes the hidden states [B, T, d] that a block would read and gives those that stand for its output."""


def block_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The hidden states that a block is called with."""
    return args[0] if args else kwargs["hidden_states"]


@contextmanager
def _replaced(block: nn.Module, stand_in: Replacement, width: int | None) -> Iterator[None]:
    """Within the `with` block a block gives what `stand_in` makes of its input, in a tuple of `width` where it does."""
    had_own, own = "forward" in vars(block), vars(block).get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        state = stand_in(block_input(args, kwargs))
        return state if width is None else (state, *[None] * (width - 1))

    block.forward = forward  # the block itself stays where it is: decoders read its attributes
    try:
        yield
    finally:
        if had_own:
            vars(block)["forward"] = own
        else:
            del block.forward


class Blocks:
    """The blocks of a model, any of which can be left out for a while.

    Args:
        model: it is run once, on a few made-up tokens, to see what its blocks give.

    Raises:
        BadRequest: if the blocks cannot be left out, because they are not called with hidden states and give such.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.blocks = list(find_blocks(model))
        self._widths = self._outputs()

    def __len__(self) -> int:
        return len(self.blocks)

    @torch.no_grad()
    def _outputs(self) -> list[int | None]:
        """Of each block the size of the tuple that it gives; None where that is a tensor."""
        found: dict[int, Any] = {}

        def recorder(number: int) -> Callable[..., None]:
            def record(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                state, given = first_tensor(output), block_input(args, kwargs)
                if state.shape == given.shape and state.ndim == _AXES:
                    found[number] = None if isinstance(output, torch.Tensor) else len(output)

            return record

        reason = ""
        try:
            with ExitStack() as stack:
                for number, block in enumerate(self.blocks):
                    stack.enter_context(block.register_forward_hook(recorder(number), with_kwargs=True))
                stack.enter_context(evaluating(self.model))
                run_decoder(self.model, made_up_tokens(self.model))
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            reason = f" ({reason_of(error)})"
        if len(found) < len(self.blocks):
            raise BadRequest(
                f"The blocks of the teacher, a {type(self.model).__name__}, do not turn hidden states [B, T, d] into "
                f"hidden states, so none of them can be left out{reason};",
                "name a student that is there already.",
            )
        return [found[number] for number in range(len(self.blocks))]

    @contextmanager
    def standing_in(self, stand_ins: Mapping[int, Replacement]) -> Iterator[None]:
        """Within the `with` block some blocks, counted from 0, give what their replacements make of their input."""
        with ExitStack() as stack:
            for number, stand_in in stand_ins.items():
                stack.enter_context(_replaced(self.blocks[number], stand_in, self._widths[number]))
            yield

    @contextmanager
    def skipped(self, numbers: Iterable[int]) -> Iterator[None]:
        """Within the `with` block some blocks, counted from 0, give back what they are given."""
        with self.standing_in(dict.fromkeys(numbers, _same)):
            yield


def _same(state: torch.Tensor) -> torch.Tensor:
    return state


@contextmanager
def skipped(model: PreTrainedModel, blocks: Iterable[int]) -> Iterator[None]:
    """Within the `with` block a model runs without some of its blocks.

    Args:
        model: a causal language model. Its list of blocks, and their attributes, stay as they are.
        blocks: counted from 0.

    Raises:
        BadRequest: as `Blocks`.
    """
    with Blocks(model).skipped(blocks):
        yield
