"""A trainer of a student whose tokens are others than its teacher's, of tiny models, and one optimizer step of it."""

import torch
from datasets import Dataset

from helpers.ddp_step import write_step
from helpers.library import arguments
from helpers.models import STUDENT_LAYERS, STUDENT_SIZE, TEACHER_LAYERS, TEACHER_SIZE, tiny_llama
from helpers.small_tokenizers import byte_level, sentence_pieces
from kava_trainer import KavaTrainer, encode

ROWS = [{"question": f"What is {a} + {b}?", "answer": f"{a + b} 😀 apples"} for a in range(4) for b in range(4)]


def decided_teacher():
    """A random one that is sure of its next tokens, so that there is something to learn of them."""
    teacher = tiny_llama(TEACHER_SIZE, TEACHER_LAYERS, seed=1, tie=False)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(20)
    return teacher


def make_of_other_tokens(
    folder, teacher=None, student_tokenizer=None, student=None, token_alignment="overlap", **changes
):
    """Where the alignment is causal the student reads the smaller tokens, for which it makes a difference."""
    pieces = sentence_pieces()
    if token_alignment == "causal":
        tokenizer, other = pieces, student_tokenizer or byte_level()
    else:
        tokenizer, other = student_tokenizer or byte_level(), pieces
    read = {"teacher_tokenizer": other, "token_alignment": token_alignment}
    data = encode(Dataset.from_list(ROWS), tokenizer, 64, **read)
    return KavaTrainer(
        student or tiny_llama(STUDENT_SIZE, STUDENT_LAYERS, seed=2),
        teacher or decided_teacher(),
        args=arguments(folder, **{"lm_weight": 0.5, "kd_weight": 0.5, **changes}),
        train_dataset=data,
        eval_dataset=data.select(range(7)),
        processing_class=tokenizer,
        teacher_tokenizer=other,
    )


def step(output, batch_size, accumulation):
    """What `ddp_step` does, for this pair."""
    whole = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 1.0, "projector_learning_rate": 1.0}
    sizes = {"per_device_train_batch_size": int(batch_size), "gradient_accumulation_steps": int(accumulation)}
    trainer = make_of_other_tokens(output, max_steps=1, lr_scheduler_type="constant", **whole, **sizes)
    write_step(trainer, output)
