"""A trainer of a student of several tiny teachers, one of which reads other tokens, and one optimizer step of it."""

from datasets import Dataset

from helpers.ddp_step import write_step
from helpers.library import arguments, new_student, new_teacher
from helpers.models import tiny_llama
from helpers.other_tokens import ROWS
from helpers.small_tokenizers import byte_level, sentence_pieces
from kava_trainer import KavaTrainer, encode


def new_teachers():
    return [new_teacher(), tiny_llama(48, 3, seed=7)]


def make_reading(folder, student, others, **changes):
    """A student that reads with one tokenizer, and teachers with others, of which some may be its own."""
    data = encode(Dataset.from_list(ROWS), student, 64, teacher_tokenizer=others)
    return KavaTrainer(
        new_student(),
        new_teachers(),
        args=arguments(folder, **{"kd_weight": 0.5, "lm_weight": 0.5, **changes}),
        train_dataset=data,
        eval_dataset=data.select(range(7)),
        processing_class=student,
        teacher_tokenizer=others,
    )


def step(output, batch_size, accumulation):
    """What `ddp_step` does, for these teachers."""
    whole = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 1.0, "projector_learning_rate": 1.0}
    sizes = {"per_device_train_batch_size": int(batch_size), "gradient_accumulation_steps": int(accumulation)}
    others = [byte_level(), sentence_pieces()]
    trainer = make_reading(output, byte_level(), others, max_steps=1, lr_scheduler_type="constant", **whole, **sizes)
    write_step(trainer, output)
