"""What a model is worth on held-out problems: perplexity on the answers, and exact match of the final answer."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
import torch
from accelerate.utils import gather_object, send_to_device
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ..distillation.chunked_loss import sum_in_chunks
from ..distillation.losses import next_token_sum
from ..models.generation.generate import continue_prompts, stop_tokens
from ..models.hidden_states import run_decoder
from ..models.lm_head import vocabulary_logits, vocabulary_size, whole_head
from ..models.sharding.passes import passes_in_step
from ..utils.progress_bar import SharedBatches, own_batches
from .final_answer_match.final_answer_match import FinalAnswerMatch


@torch.no_grad()
def answer_loss_sum(model: PreTrainedModel, states: torch.Tensor, batch: dict[str, torch.Tensor]) -> float:
    """Cross-entropy in nats, summed over the answer tokens of one batch.

    The batch is a `DistillationCollator`'s, on the device of the model's last hidden states [B, T, d]. Of a model that
    is sharded the head is whole meanwhile, however many chunks it reads.
    """

    def chunk(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return next_token_sum(vocabulary_logits(model, states), targets).unsqueeze(0)

    answers = (states.flatten(0, 1)[batch["answer_index"]], batch["next_tokens"])
    one = torch.ones(1, device=states.device)
    with whole_head(model):
        return sum_in_chunks(chunk, answers, one, [], vocabulary_size(model))[0].item()


@torch.no_grad()
def answer_cross_entropy(
    model: PreTrainedModel,
    dataset: datasets.Dataset,
    collator: Callable[[list[Any]], dict[str, Any]],
    batch_size: int,
    description: str = "Perplexity",
) -> float:
    """Mean cross-entropy in nats over the tokens of a data set that have labels, shared out over the ranks.

    Args:
        model: a causal language model; it is left in the mode it came in.
        dataset: examples of `encode_dataset`.
        collator: a `DistillationCollator`.
        batch_size: examples at a time.
        description: of the progress bar.
    """
    training = model.training
    model.eval()
    order = sorted(range(len(dataset)), key=lambda row: len(dataset[row]["input_ids"]))
    total, count = 0.0, 0
    for rows in own_batches(order, batch_size, description, partial(passes_in_step, model)):
        batch = send_to_device(collator([dataset[row] for row in rows]), model.device)
        states = run_decoder(model, batch["input_ids"], batch["attention_mask"])
        total += answer_loss_sum(model, states, batch)
        count += len(batch["next_tokens"])
    model.train(training)
    shares = gather_object([(total, count)])
    return sum(part for part, _ in shares) / max(sum(tokens for _, tokens in shares), 1)


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: datasets.Dataset,
    batch_size: int,
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers to the prompts of a data set, batched and padded on the left, shared out over the ranks.

    Returns:
        One text for each example, in the data set's order, without the prompt.
    """
    training = model.training
    model.eval()
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_tokens(model, tokenizer),
        pad_token_id=pad,
        use_cache=True,
    )
    order = sorted(range(len(dataset)), key=lambda row: dataset[row]["prompt_length"])
    answers: list[tuple[int, str]] = []
    batches = own_batches(order, batch_size, "Generating answers", partial(passes_in_step, model))
    for rows in batches:
        prompts = [_prompt(dataset[row], tokenizer) for row in rows]
        watched = StoppingCriteriaList([_Watched(batches, max(map(len, prompts)), max_new_tokens)])
        written = continue_prompts(model, prompts, greedy, stopping_criteria=watched)
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        answers += zip(rows, texts, strict=True)
    model.train(training)
    return [text for _, text in sorted(gather_object(answers))]


class _Watched(StoppingCriteria):
    """Stops nothing, but shows how far the answers of a batch are."""

    def __init__(self, batches: SharedBatches, prompt: int, most: int) -> None:
        self._batches, self._prompt, self._most = batches, prompt, most

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self._batches.note(f"token {input_ids.shape[1] - self._prompt} of {self._most}")
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _prompt(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens before the answer; plain text has none and is continued from the beginning-of-text token."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return example["input_ids"][: example["prompt_length"]] or [start]


@dataclass(frozen=True)
class Evaluation:
    """What a model is worth on held-out problems."""

    figures: dict[str, float | None]
    """`cross_entropy` in nats, `perplexity`, `exact_match`, a share, None where nothing was generated, and
    `retention_cross_entropy` in nats, None where there is no text for it."""
    answers: list[str]
    """Its greedy answers in the data set's order; empty where nothing was generated."""


def evaluate_with_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: datasets.Dataset,
    collator: Callable[[list[Any]], dict[str, Any]],
    batch_size: int,
    max_new_tokens: int | None = None,
    retention: datasets.Dataset | None = None,
) -> Evaluation:
    """Cross-entropy and perplexity of the answers, and with `max_new_tokens` also greedy answers and their exact match.

    With `retention` also the cross-entropy over all next tokens of a text that is no answer.

    Args:
        model: a causal language model.
        tokenizer: of the data set.
        dataset: examples of `encode_dataset`.
        collator: a `DistillationCollator`.
        batch_size: examples at a time.
        max_new_tokens: of an answer; None for no answers.
        retention: examples of `load_retention`.
    """
    loss = answer_cross_entropy(model, dataset, collator, batch_size)
    figures: dict[str, float | None] = {"cross_entropy": loss, "perplexity": perplexity(loss), "exact_match": None}
    kept = None if retention is None else answer_cross_entropy(model, retention, collator, batch_size, "Retention")
    figures["retention_cross_entropy"] = kept
    answers: list[str] = []
    if max_new_tokens is not None:
        answers = generate_answers(model, tokenizer, dataset, batch_size, max_new_tokens)
        metric = FinalAnswerMatch(keep_in_memory=True)
        figures |= metric.compute(predictions=answers, references=list(dataset["answer_text"]))
    return Evaluation(figures, answers)


def evaluate_model(*args: Any, **kwargs: Any) -> dict[str, float | None]:
    """The `figures` of `evaluate_with_answers`, with its arguments."""
    return evaluate_with_answers(*args, **kwargs).figures


def first_problems(tokenizer: PreTrainedTokenizerBase, dataset: datasets.Dataset, count: int) -> list[dict[str, str]]:
    """`prompt` and `reference` of the first examples of a data set, as text."""
    return [
        {
            "prompt": str(tokenizer.decode(row["input_ids"][: row["prompt_length"]], skip_special_tokens=True)),
            "reference": row["answer_text"],
        }
        for row in dataset.select(range(min(count, len(dataset))))
    ]


def have_prompts(tokenizer: PreTrainedTokenizerBase, dataset: datasets.Dataset) -> bool:
    """Whether there is anything to answer; plain text has no prompts, or the beginning-of-text token alone."""
    prompts = (row["input_ids"][: row["prompt_length"]] for row in dataset)
    return any(str(tokenizer.decode(prompt, skip_special_tokens=True)).strip() for prompt in prompts)


def longest_answer(dataset: datasets.Dataset) -> int:
    """Tokens of the longest reference answer."""
    return max(len(row["input_ids"]) - row["prompt_length"] for row in dataset)


def perplexity(cross_entropy: float) -> float:
    """e to the power of a cross-entropy in nats, at most about 1e304: beyond that floats end."""
    return math.exp(min(cross_entropy, 700))
