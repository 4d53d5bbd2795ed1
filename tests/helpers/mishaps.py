"""What goes wrong within a step: memory that runs out, and losses and gradients that are no numbers."""

import os
from functools import partial

import torch
from transformers import TrainerCallback

from helpers import fault_child
from helpers.models import tiny_llama


def out_of_memory_above(limit, where):
    """A step whose forward or backward pass runs out of memory where it reads more than `limit` tokens."""

    def change(trainer):
        loss, backward = trainer.compute_loss, trainer.accelerator.backward
        size = 0

        def compute_loss(model, inputs, *args, **kwargs):
            nonlocal size
            if torch.is_grad_enabled():
                size = inputs["input_ids"].numel()
                if where == "forward" and size > limit:
                    raise torch.OutOfMemoryError("tried to allocate 2 GiB")
            return loss(model, inputs, *args, **kwargs)

        def run_backward(total, **kwargs):
            backward(total, **kwargs)
            if where == "backward" and size > limit:  # when the gradients have been added already
                raise torch.OutOfMemoryError("tried to allocate 2 GiB")

        trainer.compute_loss, trainer.accelerator.backward = compute_loss, run_backward
        return trainer

    return change


STEADY = {"max_steps": 4, "projector_dropout": 0.0, "lr_scheduler_type": "constant", "gradient_accumulation_steps": 2}


def short_of_memory(folder, output, rank, where, limit):
    """In a process of its own: one rank of several has too little memory."""
    lack = out_of_memory_above(limit, where) if int(os.environ["RANK"]) == rank else lambda trainer: None
    settings = {**STEADY, "model": tiny_llama, "max_tokens_per_batch": 60, "count": 32}
    return fault_child.train(folder, output, None, settings, lack)


class Poison(TrainerCallback):
    """Makes the gradient or the loss of some steps no finite number."""

    def __init__(self, trainer, steps, what):
        self.trainer, self.steps = trainer, steps
        original = trainer.compute_loss

        def compute_loss(model, inputs, *args, **kwargs):
            loss = original(model, inputs, *args, **kwargs)
            if torch.is_grad_enabled() and trainer.state.global_step + 1 in steps:
                return loss * float("nan") if what == "loss" else _NanGradient.apply(loss)
            return loss

        trainer.compute_loss = compute_loss


class _NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


def poisoned_rank(folder, output):
    """In a process of its own: only rank 1 sees a loss that is no number."""
    poison = partial(Poison, steps={2}, what="loss") if os.environ["RANK"] == "1" else lambda trainer: None
    return fault_child.train(folder, output, None, {"max_steps": 3, "logging_steps": 3, "count": 64}, poison)
