"""What a model writes after some prompts: batched, padded on the left, with a key-value cache."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def continue_prompts(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], config: GenerationConfig, **options: Any
) -> torch.Tensor:
    """Let a model continue prompts, of which none may be empty.

    Where its weights are sharded, `passes_in_step` keeps the ranks together; `generate` itself could do that only for
    ranks that all have prompts.

    Args:
        model: a causal language model, in evaluation mode; of its own defaults of generation none is used.
        prompts: token ids.
        config: how to generate, with a `pad_token_id`.
        options: of `generate`, such as `stopping_criteria`.

    Returns:
        The new tokens [B, T]; padding stands behind a row's first stop token.
    """
    tokens = [torch.tensor(prompt) for prompt in prompts]
    width: Any = {"batch_first": True, "padding_side": "left"}
    input_ids = pad_sequence(tokens, padding_value=cast(float, config.pad_token_id), **width).to(model.device)
    mask = pad_sequence([torch.ones_like(own) for own in tokens], **width).to(model.device)
    with own_defaults_off(model):
        output = cast(Any, model).generate(
            input_ids=input_ids, attention_mask=mask, generation_config=config, synced_gpus=False, **options
        )
    return output[:, input_ids.shape[1] :]


@contextmanager
def own_defaults_off(model: PreTrainedModel) -> Iterator[None]:
    """Within the `with` block `generate` takes up none of a model's own defaults.

    Those are what a config of generation leaves open, such as a repetition penalty, and `output_router_logits`: a
    mixture of experts would compute the auxiliary loss of each new token with the mask of the whole text, and fail.
    """
    own, model.generation_config = model.generation_config, GenerationConfig()
    config = model.config.get_text_config(decoder=True)
    if asks := getattr(config, "output_router_logits", False):
        config.output_router_logits = False
    try:
        yield
    finally:
        model.generation_config = own
        if asks:
            config.output_router_logits = asks


def known_tokens(models: Sequence[PreTrainedModel], tokenizer: PreTrainedTokenizerBase | None) -> int:
    """How many tokens, from 0 on, all of some models and the tokenizer know; embeddings are often longer than that."""
    sizes = [cast(torch.nn.Embedding, model.get_input_embeddings()).weight.shape[0] for model in models]
    return min(sizes if tokenizer is None else [*sizes, len(tokenizer)])


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """The tokenizer's end-of-text token and whatever else the model itself stops at."""
    own = model.generation_config.eos_token_id
    known = [] if tokenizer is None or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return sorted({*known, *(own if isinstance(own, list) else [] if own is None else [own])})
