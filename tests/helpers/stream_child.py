"""What the processes of `test_stream_resume.py` do: one small training from a stream."""

import os

import torch
from transformers import AutoTokenizer

from helpers.hashes import weight_hash
from helpers.trainers import loss_lines, make_trainer
from kava_trainer.config.data_arguments import DataArguments
from kava_trainer.data.stream_sources import open_rows
from kava_trainer.data.streaming import ExampleStream, open_stream
from kava_trainer.quickstart import STUDENT_FOLDER

CHAT_TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def stream_of(path, tokenizer, shuffle_buffer=8, held_out=3, seed=5, **changes) -> ExampleStream:
    """A stream over a file of small problems, without the rows held out from it."""
    asked = DataArguments(dataset_name=str(path), max_eval_samples=held_out, streaming=True, **changes)
    rows, _ = open_rows(asked)
    return open_stream(rows, tokenizer, 64, shuffle_buffer, seed)


class Noting:
    """Keeps the tokens of every micro-batch that a trainer fetches."""

    def __init__(self, trainer) -> None:
        self.seen, self._fetch = [], trainer.get_batch_samples
        trainer.get_batch_samples = self

    def __call__(self, *arguments):
        batches, counts = self._fetch(*arguments)
        self.seen += [batch["input_ids"].flatten().tolist() for batch in batches]
        return batches, counts


def train(folder, data, output, resume, settings):
    """One run; every rank writes what it has seen, rank 0 also its weights and losses."""
    tokenizer = AutoTokenizer.from_pretrained(STUDENT_FOLDER)
    shuffle_buffer, tokenizer.chat_template = settings.pop("shuffle_buffer", 8), CHAT_TEMPLATE
    trainer = make_trainer(folder, tokenizer, lr_scheduler_type="cosine", projector_dropout=0.1, **settings)
    trainer.train_dataset = stream_of(data, tokenizer, shuffle_buffer)
    noting = Noting(trainer)
    trainer.train(resume_from_checkpoint=resume)
    assert torch.distributed.is_initialized() == (int(os.environ.get("WORLD_SIZE", "1")) > 1)
    lines = [
        {name: value for name, value in line.items() if not name.endswith(("_runtime", "_per_second", "_memory_bytes"))}
        for line in trainer.state.log_history
        if "train_runtime" not in line
    ]
    result = {
        "seen": noting.seen,
        "weights": weight_hash(trainer.model),
        "losses": [line["loss"] for line in loss_lines(trainer)],
        "lines": lines,
        "packs": trainer.batches.packs,
        "world_size": trainer.args.world_size,
        "wrapper": type(trainer.model_wrapped).__name__,
        "place": trainer.train_dataset.state(),
    }
    torch.save(result, f"{output}{trainer.args.process_index}.pt")
    return 0
