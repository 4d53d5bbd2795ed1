"""Caches of a tiny teacher's states."""

from accelerate import PartialState

from helpers.data import random_examples
from helpers.models import TEACHER_LAYERS, TEACHER_SIZE, tiny_llama
from helpers.trainers import make_trainer
from kava_trainer.distillation.teacher_cache import (
    CachedTeacher,
    TeacherCache,
    release_weights,
)
from kava_trainer.models.teacher import freeze
from kava_trainer.utils.distributed import disconnect

LAYERS = [2, TEACHER_LAYERS]

IDENTITY = {"teacher": "tiny", "version": "1", "quantization": "none", "dtype": "float32", "mixed_precision": "no"}

EXAMPLES = [example["input_ids"] for example in random_examples(30)]


def teacher_model():
    return freeze(tiny_llama(TEACHER_SIZE, TEACHER_LAYERS, seed=1))


def build(folder, examples=EXAMPLES, model=None, layers=LAYERS, dtype="bfloat16", budget=64, **identity):
    cache = TeacherCache(folder, IDENTITY | identity, layers, dtype)
    cache.build(model or teacher_model(), examples, cache.missing(examples), budget)
    return cache


def cached_run(folder, tokenizer, dtype=None, **changes):
    """Losses of a run with the teacher beside the student, or from a cache whose model is gone."""
    settings = {"layer_mapping": "uniform:2", "projector_dropout": 0.0, "kd_weight": 0.5, "max_steps": 3, **changes}
    trainer = make_trainer(folder, tokenizer, **settings)
    if dtype is not None:
        model, examples = trainer.teacher.model, trainer.train_dataset["input_ids"]
        cache = build(folder / "cache", examples, model, trainer.teacher.layers, dtype)
        trainer.read_cache(CachedTeacher(model, cache.read))
        release_weights(model, keep_head=True)
    trainer.train()
    trainer.evaluate()
    return trainer


def build_on_all_ranks(folder):
    """In a process of its own, one of several."""
    state = PartialState(cpu=True)
    assert state.num_processes == 2, state
    cache = build(folder)
    cache.verify()
    assert cache.missing(EXAMPLES) == []
    state.wait_for_everyone()
    disconnect()
    return 0
