"""One optimizer step for `outcomes.one_step`, in one process or one of several ranks; rank 0 writes the weights."""

import torch
from transformers import AutoTokenizer

from helpers import models
from helpers.trainers import loss_lines, make_trainer
from kava_trainer.quickstart import STUDENT_FOLDER
from kava_trainer.utils.distributed import whole


def made_up_answers(prompts, student, sampling):
    """The same answer to the same prompt, on whatever rank."""
    return [[1 + sum(prompt) * (i + 3) % 500 for i in range(1 + sum(prompt) % 5)] + [0] for prompt in prompts]


def main(
    output: str,
    batch_size: str,
    accumulation: str,
    weighting: str,
    student: str = "tiny_llama",
    tokens: str = "",
    on_policy: str = "",
) -> None:
    mercator_weight, lm_weight = map(float, weighting.split(","))
    trainer = make_trainer(
        output,
        AutoTokenizer.from_pretrained(STUDENT_FOLDER),
        count=8,
        model=getattr(models, student),
        max_steps=1,
        per_device_train_batch_size=int(batch_size),
        gradient_accumulation_steps=int(accumulation),
        projector_dropout=0.0,
        optim="sgd",
        max_grad_norm=0.0,
        learning_rate=1.0,
        projector_learning_rate=1.0,
        lr_scheduler_type="constant",
        mercator_weight=mercator_weight,
        lm_weight=lm_weight,
        **({"on_policy_fraction": float(on_policy), "rollout_fn": made_up_answers} if on_policy else {}),
        **({"kd_weight": 0.5, "kd_tokens": tokens, "relative_mse_weight": 0.5} if tokens else {}),
    )
    trainer.train()
    metrics = trainer.evaluate()
    weights = {name: whole(parameter.detach()) for name, parameter in trainer.model.named_parameters()}
    if trainer.is_world_process_zero():
        state = {
            "weights": weights,
            "line": {k: v for k, v in loss_lines(trainer)[0].items() if isinstance(v, float)},
            "evaluation": {name: metrics[f"eval_{name}"] for name in ("loss", "cos_sim", "lm_loss", "cka")},
            "throughput": trainer.throughput()["padding_fraction"],
            "world_size": trainer.args.world_size,
            "wrapper": type(trainer.model_wrapped).__name__,
        }
        torch.save(state, f"{output}.pt")
