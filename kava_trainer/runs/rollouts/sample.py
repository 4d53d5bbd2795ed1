"""`python -m kava_trainer rollouts`: a student's answers to the prompts of the training data, written to a file."""

from collections.abc import Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ...config.arguments import KavaArguments, KavaTrainingArguments
from ...config.launcher import is_fsdp_asked, mixed_precision
from ...data.collators import DistillationCollator
from ...data.splits import load_splits
from ...distillation.rollouts.choice import derived_seed
from ...distillation.rollouts.examples import Rollout, prompt_of, rollout_of
from ...distillation.rollouts.files import write_rollouts
from ...distillation.rollouts.sampling import Answers, Sampling, sample_answers, sample_what_fits
from ...models.generation.generate import known_tokens, stop_tokens
from ...models.layers import evaluating
from ...models.loading import check_reads, on_device
from ...models.sharding.passes import passes_in_step, read_apart
from ...models.sharding.units import shard_to_read
from ...models.student import load_student, mend_generation_config
from ...utils.console import Console
from ...utils.distributed import is_sharded
from ...utils.errors import BadRequest, RunFailed, reason_of
from ...utils.files import check_new_file
from ...utils.memory import needs_memory
from ...utils.progress_bar import Progress, progress_bar, working
from ..advice import smaller_models
from ..display import tell_encoding
from ..measure import FinishedRun, put_adapter_on
from ..pair.models import load_models
from ..pair.tokenizers import load_tokenizers
from ..pipeline import attended, open_console
from ..setup import encode_rows
from .examples import has_no_prompts

_SAMPLED = ("on_policy_temperature", "on_policy_top_p", "on_policy_max_new_tokens")
"""How a run sampled answers, which are sampled so again."""


def sampling_of(finished: FinishedRun) -> dict[str, Any]:
    """The arguments of a finished run that its student answers by."""
    given = finished.summary.arguments
    return {**finished.arguments, **{name: given[name] for name in _SAMPLED if name in given}}


def sample_rollouts(arguments: KavaArguments, path: Path, finished: FinishedRun | None = None) -> None:
    """Let a student answer each prompt of the training data once, and write prompts and answers to a file.

    Several processes share the prompts out. Rows need no answers.

    Args:
        arguments: of a run; its student answers as it is before the training.
        path: of the file, which must not be there yet.
        finished: the run whose finished student answers, where the arguments are of it.

    Raises:
        BadRequest: if the file is there already or cannot be made, the rows are a stream or have no prompts, or models
            or data do not fit.
        RunFailed: if no answer says anything, memory runs out with a single prompt, or the file cannot be written.
        Interrupted: by a signal; nothing has been written then.
    """
    check_new_file(path)
    if arguments.data.streaming:
        what = "streaming is true, but all prompts are read before they are answered;"
        raise BadRequest(what, "write streaming false.", "streaming")
    arguments.data.accepts_prompts = True
    with attended():
        console = open_console(arguments.training)
        tokenizer = load_tokenizers(arguments)
        examples = _load_examples(console, arguments, tokenizer)
        console.stage("Models")
        with needs_memory("while the student was loaded", lambda: smaller_models(arguments)):
            student = _load_student(console, arguments, tokenizer, examples, finished)
        console.stage("Answers")
        prompts = [prompt_of(example) for example in examples.with_format("torch")]
        found = answer_prompts(console, arguments.training, student, tokenizer, prompts)
        _tell(console, found)
        if PartialState().is_main_process:
            _write(path, [rollout for rollout in found if not rollout.is_empty], tokenizer)
    console.print(f"Answers: {path}. A run with rollouts_from {path} learns from them.")


def _load_examples(console: Console, arguments: KavaArguments, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The training rows, tokenised."""
    console.stage("Data")
    asked = arguments.data
    with arguments.training.main_process_first(desc="loading the data"):
        train, _, total = load_splits(asked)
        if has_no_prompts(train):
            what = "The rows are plain text, which has no prompt that a student could answer;"
            raise BadRequest(what, "name a data set of prompts.", "dataset_name")
        console.print(f"Dataset loaded: {total} samples")
        encoded = encode_rows(asked, tokenizer, "training", train)
    tell_encoding(console, "training", encoded, len(train), asked)
    return encoded.dataset


def _load_student(
    console: Console,
    arguments: KavaArguments,
    tokenizer: PreTrainedTokenizerBase,
    examples: Dataset,
    finished: FinishedRun | None,
) -> PreTrainedModel:
    """The student, without its teacher unless it is cut out of that."""
    model, training = arguments.model, arguments.training
    if model.is_cut:
        student = load_models(console, arguments, tokenizer, examples).student
    else:
        set_seed(training.seed)
        with working("Loading the student"):
            student = load_student(model, None, training.device)
        check_reads(student, "student", tokenizer, arguments.data.max_length)
        console.print(f"Student: {model.student_name}, {student.num_parameters() / 1e6:.2f} M parameters")
    mend_generation_config(student)  # which says what ends an answer, also where a model has none
    if finished is not None and finished.adapter is not None:
        put_adapter_on(finished.adapter, student)
    if is_fsdp_asked():
        shard_to_read(student, training.device)
        return student
    return on_device(student, training.device)


def answer_prompts(
    console: Console,
    training: KavaTrainingArguments,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
) -> list[Rollout]:
    """An answer to each prompt, in their order, sampled as a training would; the ranks share them out.

    The longest prompts are answered first, so that memory runs out at once if it does; then half as many are answered
    at a time, but by a student that is sharded: the other ranks would wait for the one that begins anew.

    Args:
        console: prints.
        training: says how the answers are sampled, `per_device_eval_batch_size` at a time, and the seed.
        student: on its device, or sharded.
        tokenizer: of the prompts.
        prompts: token ids, none empty.

    Raises:
        RunFailed: if memory runs out with a single prompt.
        torch.OutOfMemoryError: if memory runs out, and the student is sharded.
    """
    state, size = PartialState(), training.per_device_eval_batch_size
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    share = order[state.process_index :: state.num_processes]
    ends, vocabulary = stop_tokens(student, tokenizer), known_tokens([student], tokenizer)
    pad_token = DistillationCollator(tokenizer).pad_token_id

    def tell(tried: int, left: int) -> None:
        nonlocal size
        size = left
        console.warn(f"Out of memory with answers to {tried} prompts; from now on {left} are answered at a time.")

    def answer(asked: list[list[int]], seed: int) -> Answers | None:
        def sample(count: int) -> Answers:
            torch.manual_seed(seed)
            return sample_answers(asked, student, Sampling.asked(training, ends, pad_token, seed, count, vocabulary))

        return sample(size) if is_sharded(student) else sample_what_fits(sample, size, len(asked), tell)

    found: list[tuple[int, Rollout]] = []

    def answer_share(bar: Progress) -> None:
        while len(found) < len(share):
            places = share[len(found) : len(found) + size]
            asked = [prompts[place] for place in places]
            answers = answer(asked, derived_seed(training.seed, len(found), state.process_index))
            if answers is None:
                raise RunFailed(
                    "Out of memory while the student answered a single prompt.",
                    f"Lower on_policy_max_new_tokens (now {training.on_policy_max_new_tokens}) or max_length.",
                )
            found.extend(zip(places, map(partial(rollout_of, end_tokens=ends), asked, answers.tokens), strict=True))
            bar.update(len(places))

    def answer_in_step() -> None:
        with progress_bar(len(share), "Sampling the answers", "prompt") as bar, passes_in_step(student):
            answer_share(bar)

    with evaluating(student), _autocast(training):
        read_apart(student, answer_in_step)
    return [rollout for _, rollout in sorted(gather_object(found), key=itemgetter(0))]


def _autocast(training: KavaTrainingArguments) -> torch.autocast:
    """What a training computes in."""
    precision = mixed_precision(training)
    kind = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(training.device.type, kind, enabled=precision in ("fp16", "bf16"))


def _tell(console: Console, rollouts: Sequence[Rollout]) -> None:
    """Say how long the answers are. Raises `RunFailed` if none says anything."""
    lengths = [len(rollout.answer) for rollout in rollouts if not rollout.is_empty]
    if not lengths:
        raise RunFailed("No answer of the student says anything, so nothing was written.", "Look at its weights.")
    cut = sum(not rollout.ended for rollout in rollouts if not rollout.is_empty)
    console.print(
        f"{len(rollouts)} prompts, {len(lengths)} answers of {sum(lengths) / len(lengths):.1f} tokens on average: "
        f"{cut} reached the limit, {len(rollouts) - len(lengths)} say nothing and are left out"
    )


def _write(path: Path, rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase) -> None:
    try:
        write_rollouts(path, rollouts, tokenizer)
    except OSError as error:
        raise RunFailed(f"The answers could not be written to {path} ({reason_of(error)}).") from error
