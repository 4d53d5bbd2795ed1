"""With the next-token loss alone, KAVA logs, saves, resumes and ends as `transformers.Trainer` does."""

import itertools
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from helpers.matrices import matrix
from helpers.parity import HELD_OUT, TRAINED, outcome, tiny_mixture
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from kava_trainer import KavaTrainer

PAGE = Path(__file__).parents[2] / "docs" / "how-it-works.md"

EVERY = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
BY_EPOCH = {"max_steps": -1, "num_train_epochs": 2}

VALUES = {
    "per_device_train_batch_size": [1, 3, 4, 16],
    "num_train_epochs": [1, 2, 0.5, 1.5],
    "max_steps": [1, 2, 4, 5, 9],
    "learning_rate": [0.0, 1e-4, 1e-3, 0.03, 0.1],
    "warmup_steps": [1, 2, 0.5],
    "weight_decay": [0.0, 0.01, 0.1, 1.0],
    "adam_beta1": [0.0, 0.5, 0.8],
    "adam_beta2": [0.9, 0.95],
    "adam_epsilon": [1e-6, 1e-3],
    "gradient_accumulation_steps": [1, 3, 4, 8],
    "max_grad_norm": [0.0, 0.01, 0.1, 1.0, 2.0, 100.0],
    "label_smoothing_factor": [0.1, 0.5],
    "bf16_full_eval": [True],
    "gradient_checkpointing": [True],
    "activation_checkpointing": [True],
    "use_cache": [True],
    "neftune_noise_alpha": [1.0, 5.0],
    "torch_empty_cache_steps": [1],
    "average_tokens_across_devices": [False],
    "logging_steps": [2, 3, 4, 0.5, 0.3, 10],
    "logging_first_step": [True],
    "logging_strategy": ["no", "epoch", "steps"],
    "logging_nan_inf_filter": [True, False],
    "include_num_input_tokens_seen": ["all", "non_padding", True, False],
    "log_level": ["error", "info"],
    "run_name": ["mine"],
    "eval_strategy": ["steps", "epoch", "no"],
    "eval_on_start": [True],
    "eval_delay": [1, 2],
    "prediction_loss_only": [True],
    "eval_do_concat_batches": [False],
    "eval_accumulation_steps": [1],
    "eval_use_gather_object": [True],
    "include_for_metrics": [["inputs"], ["loss"]],
    "per_device_eval_batch_size": [5, 16],
    "save_strategy": ["steps", "epoch", "no"],
    "save_only_model": [True],
    "save_total_limit": [1, 2],
    "seed": [0, 1, 2, 7],
    "data_seed": [0, 1, 3],
    "full_determinism": [False],
    "accelerator_config": [
        {"use_seedable_sampler": False},
        {"use_configured_state": False},
        {"non_blocking": True},
    ],
    "dataloader_drop_last": [True],
    "dataloader_num_workers": [1],
    "dataloader_pin_memory": [False],
    "dataloader_in_order": [False],
    "remove_unused_columns": [False],
    "label_names": [["labels"]],
    "train_sampling_strategy": ["random", "sequential", "group_by_length"],
    "length_column_name": ["size"],
    "skip_memory_metrics": [False],
    "do_train": [True],
    "do_eval": [True],
    "do_predict": [True],
    "ddp_find_unused_parameters": [False],
    "ddp_bucket_cap_mb": [10],
    "ddp_timeout": [60],
    "debug": ["underflow_overflow"],
    "log_on_each_node": [False],
    "save_on_each_node": [True],
    "use_liger_kernel": [False],
    "restore_callback_states_from_checkpoint": [True],
}
"""Of fields of `TrainingArguments`, each tried alone."""

SCHEDULERS = [
    "linear", "cosine", "cosine_with_restarts", "constant", "constant_with_warmup", "inverse_sqrt", "polynomial",
]  # fmt: skip

OPTIMIZERS = [
    "adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop",
]  # fmt: skip


def alone():
    """Each value alone."""
    return [{name: value} for name, values in VALUES.items() for value in values]


def crossed(case_of, chosen, *values):
    """The cases of a matrix, each with whether every run of CI does it; `chosen` is as in `matrix`."""
    cells = matrix(list(itertools.product(*values)), chosen)
    return [(case_of(*cell.values), not cell.marks) for cell in cells]


def always(cases):
    """Cases of which none repeats another."""
    return [(case, True) for case in cases]


def schedules():
    """What sets the learning rates and takes the steps."""
    found = [{"lr_scheduler_type": kind, "warmup_steps": steps} for kind in SCHEDULERS for steps in (0, 1, 2)]
    kwargs = [("cosine_with_min_lr", {"min_lr_rate": 0.1}), ("warmup_stable_decay", {"num_decay_steps": 1}),
              ("cosine_with_restarts", {"num_cycles": 2}), ("polynomial", {"power": 2.0, "lr_end": 1e-4}),
              ("cosine_warmup_with_min_lr", {"min_lr": 1e-4})]  # fmt: skip
    found += [{"lr_scheduler_type": kind, "lr_scheduler_kwargs": more, "warmup_steps": 1} for kind, more in kwargs]
    optimizers = crossed(
        lambda name, decay, norm: {"optim": name, "weight_decay": decay, "max_grad_norm": norm},
        lambda name, decay, norm: decay == (name + norm) % 2,
        OPTIMIZERS, (0.0, 0.1), (0.0, 1.0),
    )  # fmt: skip
    return [*always(found), *optimizers, *always([{"optim": "adafactor", "optim_args": "clip_threshold=0.5"}])]


def batches():
    """How many examples make a step, and an epoch."""
    return crossed(
        lambda size, steps, drop: {
            "per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "dataloader_drop_last": drop,
            "max_steps": -1, "num_train_epochs": 1,
        },
        lambda size, steps, drop: drop == (size + steps) % 2,
        (1, 2, 3, 5), (1, 2, 3, 4), (False, True),
    )  # fmt: skip


def intervals():
    """When is logged, saved and evaluated."""
    kinds = ("no", "steps", "epoch")
    strategies = crossed(
        lambda log, save, evaluate: {
            **BY_EPOCH, "logging_strategy": log, "save_strategy": save, "eval_strategy": evaluate, "save_steps": 3,
            "eval_steps": 2, "logging_steps": 2,
        },
        lambda log, save, evaluate: evaluate == (log + save) % 3,
        kinds, kinds, kinds,
    )  # fmt: skip
    found = [
        {**EVERY, "load_best_model_at_end": True, **best}
        for best in ({}, {"greater_is_better": True}, {"metric_for_best_model": "eval_loss"}, {"save_total_limit": 1})
    ]
    found += [{**EVERY, "save_total_limit": limit, "max_steps": 4} for limit in (1, 2, 3)]
    found += [{**EVERY, "save_only_model": True}, {**EVERY, "eval_on_start": True}, {**EVERY, "eval_delay": 2}]
    found += [
        {"save_strategy": "best", "metric_for_best_model": "eval_loss", "eval_strategy": "steps", "eval_steps": 1}
    ]
    found += [{**BY_EPOCH, "eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}]
    return [*strategies, *always(found)]


def resumed():
    """Trained, and once more from a checkpoint in the middle or in another epoch; of these two CI does one a change."""
    found = [{**EVERY, "max_steps": 4, "resume": step} for step in (1, 2, 3)]
    found += [{**EVERY, **BY_EPOCH, "resume": step} for step in (1, 4, 5)]
    changes = [
        {"train_sampling_strategy": "sequential"}, {"ignore_data_skip": True}, {"data_seed": 5},
        {"dataloader_drop_last": True, "per_device_train_batch_size": 3}, {"gradient_accumulation_steps": 3},
        {"lr_scheduler_type": "cosine", "warmup_steps": 3}, {"optim": "adafactor"}, {"optim": "sgd"},
        {"max_grad_norm": 0.0}, {"load_best_model_at_end": True},
        {"include_num_input_tokens_seen": "all"}, {"restore_callback_states_from_checkpoint": True},
        {"gradient_checkpointing": True}, {"weight_decay": 0.1}, {"dataloader_num_workers": 1},
        {"label_smoothing_factor": 0.2}, {"eval_on_start": True},
    ]  # fmt: skip
    drawn = [{"train_sampling_strategy": "group_by_length"}, {"neftune_noise_alpha": 5.0},
             {"accelerator_config": {"use_seedable_sampler": False}}]  # fmt: skip
    save = {"save_strategy": "steps", "save_steps": 1}
    changed = [{**EVERY, **BY_EPOCH, **change} for change in changes]
    changed += [{**save, **BY_EPOCH, **change} for change in drawn]
    return always(found) + [
        ({**change, "resume": step}, number % 2 == place)
        for number, change in enumerate(changed)
        for place, step in enumerate((3, 5))
    ]


NOT_TRIED = {
    "set by every case": ["output_dir", "use_cpu", "disable_tqdm", "report_to"],
    "of a GPU": ["tf32", "fp16", "fp16_full_eval"],
    "of data workers": [
        "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context",
    ],
    "of several processes": [
        "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "fsdp", "fsdp_config", "deepspeed",
        "parallelism_config", "log_level_replica", "local_rank",
    ],
    "of trackers": ["project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"],
    "of the hub": [
        "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push",
        "hub_revision",
    ],
    "minutes of compilation": ["torch_compile", "torch_compile_backend", "torch_compile_mode"],
    "without effect in KAVA, see its help": ["auto_find_batch_size", "enable_jit_checkpoint"],
    "of packages that are no dependency": ["liger_kernel_config", "optim_target_modules"],
    "options of a flag that is tried": ["gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"],
    "in test_contracts": ["batch_eval_metrics", "resume_from_checkpoint"],
}  # fmt: skip
"""Fields that no case sets, and why."""


def compute_metrics(prediction):
    return {"first": float(prediction.predictions[0, 0].argmax(-1)), "size": prediction.label_ids.shape[0]}


def learned_whole():
    """Rows of which each token is learned, of which some teach nothing, and one of a single token."""
    rows = [{**row, "labels": list(row["input_ids"])} for row in TRAINED]
    rows = [{**row, "labels": [-100] * len(row["labels"])} if n % 5 == 1 else row for n, row in enumerate(rows)]
    return {"train_dataset": Dataset.from_list([*rows[:3], {"input_ids": [5], "labels": [5]}, *rows[3:]])}


def settings_of_the_trainer():
    """What is given to the trainer itself."""
    given = {
        "metrics": lambda: {"compute_metrics": compute_metrics},
        "smaller": lambda: {
            "compute_metrics": lambda p: {"mean": float(p.predictions[p.label_ids != -100].mean())},
            "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
        },
        "sets": lambda: {"eval_dataset": {"a": Dataset.from_list(HELD_OUT), "b": Dataset.from_list(HELD_OUT[:2])}},
        "stopping": lambda: {"callbacks": [EarlyStoppingCallback(1)]},
        "class": lambda: {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})},
        "list": lambda: {"train_dataset": TRAINED, "eval_dataset": HELD_OUT},
        "stream": lambda: {"train_dataset": IterableDataset.from_generator(lambda: iter(TRAINED))},
        "whole": learned_whole,
        "unread": lambda: {"train_dataset": Dataset.from_list([{**row, "unread": "text"} for row in TRAINED])},
    }
    best = {**EVERY, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    return [{**(best if name == "stopping" else EVERY), "given": one} for name, one in given.items()]


ONE_BATCH = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 4}

MIXTURES = [{**EVERY, **ONE_BATCH, "student": tiny_mixture}]
"""Mixtures of experts, with the auxiliary loss of their routers."""

MANY = [*schedules(), *batches(), *intervals(), *resumed()]
"""Cases that combine fields, each with whether every run of CI does it."""

CASES = [*alone(), *(case for case, _ in MANY), *settings_of_the_trainer(), *MIXTURES]


def marked():
    """The cases with their names; of those that combine fields and that CI does every third is tried by default."""
    slow = [case for number, case in enumerate(case for case, is_chosen in MANY if is_chosen) if number % 3]
    repeats = [case for case, is_chosen in MANY if not is_chosen]
    for case in CASES:
        name = "-".join(f"{key}={value}" for key, value in case.items())[:90]
        marks = [pytest.mark.slow] if case in slow or case in repeats else []
        yield pytest.param(case, id=name, marks=[*marks, *([pytest.mark.exhaustive] if case in repeats else [])])


PACKED = [
    {**EVERY}, {**EVERY, **BY_EPOCH}, {**EVERY, **BY_EPOCH, "resume": 5}, {**EVERY, "given": learned_whole},
    {**EVERY, **ONE_BATCH}, {**EVERY, **ONE_BATCH, "student": tiny_mixture}, {**BY_EPOCH, "dataloader_drop_last": True},
    {**BY_EPOCH, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}, {"label_smoothing_factor": 0.2},
    {**EVERY, "gradient_checkpointing": True}, {"include_num_input_tokens_seen": "non_padding"},
    {**BY_EPOCH, "train_sampling_strategy": "group_by_length"},
]  # fmt: skip
"""With rows packed as they are by default."""

BFLOAT16 = (
    "In bf16 the gradient of the logits is rounded before it is divided by the number of tokens, not after: figures "
    "differ from the third digit on."
)
MEANS = "`eval_loss` is a mean over all answer tokens; Trainer's is a mean over examples of the means of their batches."
FINISHED = "A checkpoint that is at the last step is loaded; no training begins, so none of its events and lines come."
RESUMED = "A log line after a resume covers the steps since the line before, as if nothing had been interrupted."
ROUTERS = (
    "The auxiliary loss of a mixture's routers is a mean over the tokens of a step. Trainer adds up those of the "
    "micro-batches, so it has `gradient_accumulation_steps` times the config's weight there."
)
RELOADED = (
    "A checkpoint of a mixture of experts, or of a model that reads images too, is loaded whole. Trainer leaves "
    "weights as they are before the training where `save_pretrained` names them otherwise than the model does "
    "(transformers 5.23)."
)
FLOPS = (
    "Packed rows, the default, have no padding: losses, gradients and weights are those of padded ones, where the "
    "model has no dropout, but `total_flos` counts real tokens alone."
)
RANDOM = "An evaluation draws no random numbers, so a run that is evaluated ends as one that is not."

BY_DESIGN = [
    ({"bf16": True}, BFLOAT16, {"log", "weights"}),
    ({**EVERY, "per_device_eval_batch_size": 2}, MEANS, {"log", "evaluation"}),
    ({**EVERY, "max_steps": 4, "resume": 4}, FINISHED, {"log", "events"}),
    ({**EVERY, **BY_EPOCH, "resume": 3, "logging_strategy": "epoch"}, RESUMED, {"log"}),
    ({**EVERY, **BY_EPOCH, "resume": 5, "logging_steps": 4}, RESUMED, {"log"}),
    (
        {**EVERY, **BY_EPOCH, "train_sampling_strategy": "group_by_length"},
        RANDOM,
        {"log", "weights", "metrics", "evaluation"},
    ),
    ({**EVERY, "neftune_noise_alpha": 5.0}, RANDOM, {"log", "weights", "metrics", "evaluation"}),
    ({**EVERY, "student": tiny_mixture}, ROUTERS, {"log", "weights", "metrics", "evaluation"}),
    (
        {**EVERY, **ONE_BATCH, "student": tiny_mixture, "resume": 2},
        RELOADED,
        {"log", "weights", "metrics", "evaluation"},
    ),
    ({**EVERY, "ours": {"max_tokens_per_batch": None}}, FLOPS, {"log"}),
]
"""Cases that differ, why, and in what."""

FILES = (
    "A checkpoint has no `training_args.bin`, a pickle that may hold a token; it has `projector.pth`, "
    "`progress_<rank>.pth` and `manifest.json` beside Trainer's files."
)


def is_measured(name):
    return any(part in name for part in ("runtime", "per_second", "mem_"))


def close(theirs, ours, rel=1e-4):
    if isinstance(theirs, float) and isinstance(ours, float | int):
        return ours == pytest.approx(theirs, rel=rel, abs=1e-6, nan_ok=True)
    return ours == theirs


def same_figures(theirs, ours):
    """KAVA may tell more, but nothing else."""
    return all(is_measured(name) or (name in ours and close(value, ours[name])) for name, value in theirs.items())


def differences(theirs, ours):
    """In what two outcomes are not the same."""
    lines = list(zip(theirs.log, ours.log, strict=False))
    own = ({"training_args.bin"}, {"projector.pth", "progress_0.pth", "manifest.json"})
    files = {name: found - own[0] | own[1] for name, found in theirs.files.items()}
    if any("optimizer.pt" not in found for found in files.values()):  # the weights alone
        files = {name: found - {"progress_0.pth"} for name, found in files.items()}
    same = {
        "log": len(theirs.log) == len(ours.log) and all(same_figures(*pair) for pair in lines),
        "state": all(close(value, ours.state[name]) for name, value in theirs.state.items()),
        "files": files == ours.files,
        "weights": theirs.weights.keys() == ours.weights.keys()
        and all(torch.allclose(value, ours.weights[name], atol=1e-4) for name, value in theirs.weights.items()),
        "metrics": same_figures(theirs.metrics, ours.metrics),
        "events": theirs.events == ours.events,
        "evaluation": same_figures(theirs.evaluation, ours.evaluation),
    }
    return {name for name, equal in same.items() if not equal}


def both(tmp_path, tokenizer, case):
    return [outcome(kind, tmp_path / kind.__name__, tokenizer, case) for kind in (Trainer, KavaTrainer)]


@pytest.mark.parametrize("case", list(marked()))
def test_training_is_that_of_trainer(tmp_path, tokenizer, case):
    theirs, ours = both(tmp_path, tokenizer, case)
    assert theirs.weights
    assert differences(theirs, ours) == set()


@pytest.mark.parametrize("case", PACKED, ids=lambda case: "-".join(f"{k}={v}" for k, v in case.items())[:90])
def test_packed_rows_are_learned_from_as_trainers_padded_ones(tmp_path, tokenizer, case):
    theirs, ours = both(tmp_path, tokenizer, {**case, "ours": {"max_tokens_per_batch": None}})
    counted = [line.pop("total_flos") for line in theirs.log if "total_flos" in line]
    assert counted
    assert differences(theirs, ours) == set()


def answers_alone(rows):
    """Rows whose labels name the last tokens, where those of `whole` name all."""
    return [
        {**row, "labels": [-100] * (len(row["labels"]) // 2) + row["labels"][len(row["labels"]) // 2 :]} for row in rows
    ]


@pytest.mark.parametrize(
    "case",
    [{**EVERY}, {**EVERY, **BY_EPOCH, "resume": 3}, {**EVERY, "label_smoothing_factor": 0.2}, {**EVERY, **ONE_BATCH}],
    ids=lambda case: "-".join(f"{key}={value}" for key, value in case.items())[:90],
)
@pytest.mark.parametrize("budget", [0, 24])
def test_all_tokens_are_learned_as_trainer_learns_a_text(tmp_path, tokenizer, case, budget):
    rows = [[{**row, "labels": list(row["input_ids"])} for row in part] for part in (TRAINED, HELD_OUT)]
    rows[0][2] = {"input_ids": [5], "labels": [5]}

    def given(parts):
        return lambda: dict(zip(("train_dataset", "eval_dataset"), map(Dataset.from_list, parts), strict=True))

    asked = {"lm_tokens": "all", "max_tokens_per_batch": budget}
    theirs = outcome(Trainer, tmp_path / "theirs", tokenizer, {**case, "given": given(rows)})
    own = {**case, "given": given([answers_alone(part) for part in rows]), "ours": asked}
    ours = outcome(KavaTrainer, tmp_path / "ours", tokenizer, own)
    for line in [*theirs.log, *ours.log]:
        line.pop("total_flos", None)
    assert differences(theirs, ours) == set()


@pytest.mark.parametrize(("case", "reason", "expected"), BY_DESIGN, ids=range(len(BY_DESIGN)))
def test_what_differs_by_design_is_told_in_the_docs(tmp_path, tokenizer, case, reason, expected):
    assert differences(*both(tmp_path, tokenizer, case)) == expected
    assert f"| {reason} |" in PAGE.read_text()


def test_every_field_of_training_arguments_is_tried_or_has_a_reason():
    tried = {name for case in [*CASES, *(case for case, *_ in BY_DESIGN)] for name in case}
    names = {field.name for field in fields(TrainingArguments)}
    left = {name for known in NOT_TRIED.values() for name in known}
    assert names - tried == left & names
    assert len(CASES) >= 300
    assert f"| {FILES} |" in PAGE.read_text()
