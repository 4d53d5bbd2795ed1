"""Make the quickstart's tokenizer and teacher from nothing but the quickstart's problems.

    python -m benchmarks.train_quickstart_teacher [--steps 6000] [--output_dir FOLDER]

The shipped files come from the default arguments (40 minutes on 2 CPU cores). The teacher reads random batches of
60,000 problems of the `train` split and is measured on the `test` split, which shares no question with it.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from kava_trainer.data.collators import DistillationCollator
from kava_trainer.data.encoding import encode_dataset
from kava_trainer.data.formats import PROMPT
from kava_trainer.evaluation.answers import evaluate_model, longest_answer
from kava_trainer.quickstart import FOLDER, STUDENT_FOLDER, TEACHER_FOLDER
from kava_trainer.quickstart.problems import generate_problems

VOCABULARY_SIZE = 512

END_OF_TEXT = "<|endoftext|>"

BATCH_SIZE = 64

TRAINING_PROBLEMS, TOKENIZER_PROBLEMS, HELD_OUT_PROBLEMS = 60_000, 20_000, 500


def build_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE that splits numbers into digits, padded with its end-of-text token as Qwen's base models are."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    problems = generate_problems(TOKENIZER_PROBLEMS)
    texts = [f"{PROMPT.format(question=problem['question'])} {problem['answer']}" for problem in problems]
    tokenizer.train_from_iterator(texts, trainer)
    bpe = json.loads(tokenizer.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(pair) for pair in bpe["merges"]],
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=None,
        model_max_length=256,
    )


def _config(hidden_size: int, layers: int, heads: int) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        architectures=["Qwen2ForCausalLM"],
        dtype="float32",
    )


def teacher_config() -> Qwen2Config:
    """0.85 M parameters; every width is a multiple of 64, so that 4-bit quantisation works on a CPU too."""
    return _config(hidden_size=128, layers=4, heads=4)


def student_config() -> Qwen2Config:
    """0.18 M parameters: about a fifth of the teacher."""
    return _config(hidden_size=64, layers=3, heads=2)


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over 200 steps, then half a cosine down to 2 % of the peak."""
    return min(step / 200, 1) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))


def train(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, steps: int) -> None:
    """Train a model on the answers of random problems; the questions carry no loss."""
    problems = Dataset.from_list(generate_problems(TRAINING_PROBLEMS))
    examples = encode_dataset(problems, tokenizer, 256, "Tokenizing").dataset.select_columns(["input_ids", "labels"])
    rows = examples.to_list()
    collator = DistillationCollator(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05, betas=(0.9, 0.98))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    generator = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        drawn = torch.randint(len(rows), (BATCH_SIZE,), generator=generator).tolist()
        batch = collator([rows[row] for row in drawn])
        loss = model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)


def evaluate(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase) -> dict[str, float | None]:
    """Perplexity and exact match on held-out problems."""
    problems = Dataset.from_list(generate_problems(HELD_OUT_PROBLEMS, "test"))
    examples = encode_dataset(problems, tokenizer, 256, "Tokenizing").dataset
    collator = DistillationCollator(tokenizer)
    return evaluate_model(model, tokenizer, examples, collator, 125, max_new_tokens=longest_answer(examples))


def main() -> None:
    """Build, train, measure and write the teacher."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6000, help="optimizer steps")
    parser.add_argument("--output_dir", type=Path, default=FOLDER, help="where the files go")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = Qwen2ForCausalLM(teacher_config())
    train(model, tokenizer, arguments.steps)
    figures = evaluate(model, tokenizer)
    print(f"perplexity {figures['perplexity']:.4f}, exact match {math.floor(1000 * figures['exact_match']) / 10} %")
    model.save_pretrained(arguments.output_dir / TEACHER_FOLDER.name)
    student_config().save_pretrained(arguments.output_dir / STUDENT_FOLDER.name)
    for folder in (TEACHER_FOLDER, STUDENT_FOLDER):
        tokenizer.save_pretrained(arguments.output_dir / folder.name)


if __name__ == "__main__":
    main()
