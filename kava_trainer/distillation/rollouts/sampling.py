"""Answers sampled from a student as it is now, which leaves it and the random numbers of its training as they were."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from accelerate.utils import release_memory
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from ...config.arguments import KavaTrainingArguments
from ...models.generation.generate import continue_prompts
from ...models.layers import context_length
from ...models.lm_head import vocabulary_size


@dataclass(frozen=True)
class Sampling:
    """How the answers of one optimizer step are sampled."""

    temperature: float
    top_p: float
    max_new_tokens: int
    end_tokens: tuple[int, ...]
    """With any of these an answer ends, and it is part of the answer."""
    pad_token: int
    seed: int
    """Of this step and this process."""
    batch_size: int
    """Prompts at a time."""
    vocabulary: int
    """Tokens from 0 that both models and the tokenizer know; no other is an answer."""

    @classmethod
    def asked(
        cls,
        args: KavaTrainingArguments,
        end_tokens: Sequence[int],
        pad_token: int,
        seed: int,
        batch_size: int,
        vocabulary: int,
    ) -> "Sampling":
        """As the arguments of a run ask."""
        return cls(
            args.on_policy_temperature,
            args.on_policy_top_p,
            args.on_policy_max_new_tokens,
            tuple(end_tokens),
            pad_token,
            seed,
            batch_size,
            vocabulary,
        )


class RolloutFn(Protocol):
    """What writes answers in the student's place, or with its help."""

    def __call__(self, prompts: list[list[int]], student: PreTrainedModel, sampling: Sampling) -> Sequence[list[int]]:
        """Token ids of one answer for each prompt, with the end-of-text token where it ended; [] leaves one out.

        Args:
            prompts: token ids, none empty.
            student: as it is now, in evaluation mode.
            sampling: what was asked for.
        """


class Entropies(LogitsProcessor):
    """Changes nothing, and keeps the entropy of the student's distribution at each token that it writes."""

    def __init__(self) -> None:
        self._steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Take down the entropies [B] of the logits [B, V] at temperature 1."""
        self._steps.append(torch.special.entr(scores.float().softmax(dim=-1)).sum(dim=-1))
        return scores

    def of_each_token(self) -> torch.Tensor:
        """In nats [B, T], on the host, where they are counted."""
        return torch.stack(self._steps, dim=1).cpu()


@dataclass(frozen=True)
class Answers:
    """What was sampled."""

    tokens: list[list[int]]
    """Of each prompt's answer; behind the end-of-text token there may be anything."""
    entropies: list[torch.Tensor] | None = None
    """In nats at each of these tokens [T]; None where they are not known."""


def sample_answers(prompts: Sequence[Sequence[int]], student: PreTrainedModel, sampling: Sampling) -> Answers:
    """Sample an answer to each prompt, those of like lengths together.

    A prompt as long as the student can read has an answer of no tokens; one that leaves less room than an answer may
    take is answered by itself, so that it shortens no other's.

    Args:
        prompts: token ids, none empty.
        student: in evaluation mode; adapters that are on stay on.
        sampling: how.

    Raises:
        torch.OutOfMemoryError: if so many prompts do not fit.
    """
    tokens: list[list[int]] = [[] for _ in prompts]
    entropies = [torch.zeros(0) for _ in prompts]
    context = context_length(student) or sys.maxsize
    for places in _batches([context - len(prompt) for prompt in prompts], sampling):
        room = context - len(prompts[places[-1]])
        watch = Entropies()
        written = continue_prompts(
            student,
            [prompts[place] for place in places],
            _config(sampling, min(room, sampling.max_new_tokens), vocabulary_size(student)),
            logits_processor=LogitsProcessorList([watch]),
        )
        for place, own, uncertainty in zip(places, written.tolist(), watch.of_each_token(), strict=True):
            tokens[place], entropies[place] = own, uncertainty
    return Answers(tokens, entropies)


def sample_what_fits(
    sample: Callable[[int], Answers], batch_size: int, prompts: int, tell: Callable[[int, int], None]
) -> Answers | None:
    """Sample with half as many prompts at a time as before until they fit into the memory; None if not even one does.

    Args:
        sample: does it with so many at a time.
        batch_size: that it begins with.
        prompts: how many there are in all.
        tell: takes how many were tried and how many are tried next.
    """
    while True:
        try:
            return sample(batch_size)
        except torch.OutOfMemoryError:
            tried = min(batch_size, prompts)
        release_memory()
        if tried == 1:
            return None
        batch_size = tried // 2
        tell(tried, batch_size)


def _batches(rooms: Sequence[int], sampling: Sampling) -> list[list[int]]:
    """The places of the prompts that are answered together, by the tokens that each leaves for its answer."""
    order = sorted((place for place, room in enumerate(rooms) if room > 0), key=lambda place: -rooms[place])
    roomy = [place for place in order if rooms[place] >= sampling.max_new_tokens]
    together = [roomy[start : start + sampling.batch_size] for start in range(0, len(roomy), sampling.batch_size)]
    return together + [[place] for place in order[len(roomy) :]]


def _config(sampling: Sampling, max_new_tokens: int, outputs: int) -> GenerationConfig:
    return GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=0,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(sampling.end_tokens),
        pad_token_id=sampling.pad_token,
        use_cache=True,
        suppress_tokens=list(range(sampling.vocabulary, outputs)) or None,
    )
