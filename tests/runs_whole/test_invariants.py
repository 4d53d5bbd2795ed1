"""Properties of whole runs: how a batch is split does not matter, padding does not, nor does an interruption."""

import itertools

import pytest
import torch
from helpers.caches import cached_run
from helpers.data import random_examples
from helpers.hashes import weight_hash
from helpers.matrices import matrix
from helpers.models import bfloat16_llama, tiny_qwen
from helpers.outcomes import assert_same_step, finish, one_step
from helpers.trainers import loss_lines, make_trainer
from safetensors.torch import load_file
from transformers import BloomConfig, BloomForCausalLM

from kava_trainer.distillation.projector_files import load_projectors
from kava_trainer.distillation.teacher_cache import CachedTeacher


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "ranks"),
    [
        (1, 8, 1),
        (1, 4, 2),
        *(pytest.param(*split, marks=pytest.mark.slow) for split in [(3, 3, 1), (4, 1, 2), (2, 1, 4)]),
    ],
)
def test_one_step_does_not_depend_on_how_the_batch_is_split(tmp_path, whole_batch, batch_size, accumulation, ranks):
    split = one_step(tmp_path, batch_size, accumulation, ranks)
    assert split["world_size"] == ranks
    assert split["wrapper"] == ("DistributedDataParallel" if ranks > 1 else "DistillationModel")
    assert_same_step(split, whole_batch)


def test_terms_over_different_tokens_do_not_depend_on_how_the_batch_is_split(tmp_path):
    whole, split = (one_step(tmp_path, *sizes, tokens="all") for sizes in ((8, 1, 1), (1, 4, 2)))
    assert_same_step(split, whole)
    for name in ("kd_loss", "relative_mse_loss"):
        assert split["line"][name] == pytest.approx(whole["line"][name], rel=1e-4), name


@pytest.mark.parametrize(
    ("answers", "sizes"),
    [("1.0", (2, 2, 2)), ("file", (2, 2, 2)), pytest.param("1.0", (4, 1, 2), marks=pytest.mark.slow)],
)
def test_a_step_on_the_student_s_own_answers_does_not_depend_on_how_the_batch_is_split(tmp_path, answers, sizes):
    asked = {"weights": "1.0,0.0", "tokens": "all", "on_policy": answers}
    whole, split = (one_step(tmp_path, *own, **asked) for own in ((8, 1, 1), sizes))
    assert (whole["world_size"], split["world_size"]) == (1, 2)
    for name, parameter in whole["weights"].items():
        torch.testing.assert_close(split["weights"][name], parameter, rtol=0, atol=1e-5, msg=name)
    names = {"loss", "cos_sim", "mercator_loss", "kd_loss", "relative_mse_loss", "rollout_length", "rollout_agreement"}
    names -= {"rollout_length"} if answers == "file" else set()
    line = {name: split["line"][name] for name in names}
    assert line == pytest.approx({name: whole["line"][name] for name in names}, rel=1e-4)


OWN_ANSWERS = matrix(
    list(itertools.product((0.5, 1.0), (1, 3), (40, 0))),
    lambda fraction, every, padded: padded != (fraction + every) % 2,
)
"""Settings of the student's own answers under two ranks; those of one are in test_rollouts."""


@pytest.mark.parametrize(
    ("fraction", "every", "most_tokens"),
    [
        pytest.param(*own.values, marks=[] if own.values == (0.5, 3, 40) else [pytest.mark.slow, *own.marks])
        for own in OWN_ANSWERS
    ],
)
def test_two_ranks_go_on_with_the_student_s_own_answers_bit_by_bit(tmp_path, fraction, every, most_tokens):
    settings = {
        "kd_weight": 1.0, "on_policy_fraction": fraction, "rollouts_every": every, "on_policy_max_new_tokens": 6,
        "max_steps": 3, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 1,
        "max_tokens_per_batch": most_tokens,
    }  # fmt: skip
    straight = finish(tmp_path / "straight", None, settings, 2)
    assert (straight["world_size"], straight["packs"]) == (2, most_tokens > 0)
    again = finish(tmp_path / "again", tmp_path / "straight" / "run" / "checkpoint-1", settings, 2)
    for name in ("weights", "optimizer", "losses", "lines"):
        assert again[name] == straight[name], name


def test_the_step_really_moves_student_and_projector(whole_batch, tokenizer, tmp_path):
    start = dict(make_trainer(tmp_path, tokenizer).model.named_parameters())
    moved = [name for name, parameter in whole_batch["weights"].items() if (parameter - start[name]).abs().max() > 1e-4]
    assert any(name.startswith("student.") for name in moved)
    assert any(name.startswith("target.") for name in moved)


def loss_and_gradients(trainer, batch):
    trainer.model.zero_grad()
    trainer.model.train()
    torch.manual_seed(0)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("terms", [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_padding_changed_to_garbage_leaves_loss_and_gradients_exactly_unchanged(tmp_path, tokenizer, terms):
    trainer = make_trainer(tmp_path, tokenizer, mercator_weight=terms[0], lm_weight=terms[1])
    batch = trainer.data_collator(random_examples(6))
    padding = batch["attention_mask"] == 0
    assert padding.any()
    dirty = {**batch, "input_ids": batch["input_ids"].clone()}
    dirty["input_ids"][padding] = torch.randint(1, 512, (int(padding.sum()),))
    loss, gradients = loss_and_gradients(trainer, batch)
    dirty_loss, dirty_gradients = loss_and_gradients(trainer, dirty)
    assert torch.equal(loss, dirty_loss)
    assert gradients.keys() == dirty_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, dirty_gradients[name]), name


def test_a_finished_run_is_resumed_without_another_step(tmp_path, tokenizer):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    straight = make_trainer(tmp_path, tokenizer, **settings)
    straight.train()
    resumed = make_trainer(tmp_path / "again", tokenizer, **settings)
    assert resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2")).global_step == 2
    assert resumed.state.global_step == 2
    assert weight_hash(resumed.model) == weight_hash(straight.model)


def test_the_teacher_is_the_same_before_and_after_and_out_of_optimizer_and_checkpoint(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, save_strategy="steps", save_steps=1, lr_scheduler_type="constant")
    teacher = trainer.teacher.model
    before = weight_hash(teacher)
    trainer.train()
    trainer.evaluate()
    assert weight_hash(teacher) == before
    assert not teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())
    trained = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert not trained & {id(parameter) for parameter in teacher.parameters()}
    saved = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert set(saved) <= set(trainer.student.state_dict())
    assert sum(tensor.numel() for tensor in saved.values()) < teacher.num_parameters()


RESUMED = [
    {},
    {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
    {"dataloader_num_workers": 2},
    {"bf16": True},
    {"model": tiny_qwen, "optim": "adamw_torch"},
    {
        "model": bfloat16_llama,
        "optim": "adamw_torch_8bit",
        "optim_args": "bf16_stochastic_round=True,block_size=64",
        "gradient_accumulation_steps": 2,
    },
]


def named(changes):
    """A name that is the same in every process, as one with the address of a function is not."""
    return str({name: getattr(value, "__name__", value) for name, value in changes.items()})


@pytest.mark.parametrize("changes", RESUMED, ids=named)
@pytest.mark.parametrize("stop", [2, pytest.param(4, marks=[pytest.mark.slow, pytest.mark.exhaustive])])
def test_a_resumed_run_ends_bit_equal_to_one_never_stopped(tmp_path, tokenizer, changes, stop):
    if changes.get("optim") == "adamw_torch_8bit":
        pytest.importorskip("torchao")
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": stop, "save_total_limit": 5, **changes}
    settings.setdefault("gradient_accumulation_steps", 1)
    straight = make_trainer(tmp_path, tokenizer, count=12, **settings)
    straight.train()
    resumed = make_trainer(tmp_path / "again", tokenizer, count=12, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert weight_hash(resumed.model) == weight_hash(straight.model)
    lines = [[line["loss"] for line in loss_lines(trainer)] for trainer in (straight, resumed)]
    assert lines[0] == lines[1]
    saved = load_projectors(tmp_path / f"proj_step_{stop}.pth")
    assert weight_hash(saved) != weight_hash(resumed.target.projectors)


LEVERS = {
    "packing": {"max_tokens_per_batch": 40},
    "packing and checkpointing": {"max_tokens_per_batch": 40, "gradient_checkpointing": True},
    "cache": {"cache": "bfloat16"},
    "all": {"max_tokens_per_batch": 40, "cache": "int8", "dataloader_num_workers": 1, "gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory, tokenizer):
    """Losses of 50 steps with every optimisation off."""
    return levered_run(tmp_path_factory.mktemp("plain"), tokenizer)


def levered_run(folder, tokenizer, cache=None, **levers):
    settings = {
        "max_steps": 50,
        "projector_dropout": 0.0,
        "max_tokens_per_batch": 0,
        "mse_weight": 0.2,
        "kd_weight": 0.5,
        "layer_mapping": "uniform:2",
        **levers,
    }
    trainer = cached_run(folder, tokenizer, cache, **settings)
    assert trainer.batches.packs == (settings["max_tokens_per_batch"] > 0)
    assert isinstance(trainer.teacher, CachedTeacher) == (cache is not None)
    return loss_lines(trainer)


@pytest.mark.parametrize(
    "levers",
    [pytest.param(name, marks=[] if name == "all" else [pytest.mark.slow, pytest.mark.exhaustive]) for name in LEVERS],
)
def test_no_optimisation_changes_the_losses_of_50_steps(tmp_path, tokenizer, plain_run, levers):
    changes = LEVERS[levers]
    lines = levered_run(tmp_path, tokenizer, **changes)
    tolerance = {"rel": 0.01, "abs": 3e-3} if "cache" in changes else {"rel": 2e-3, "abs": 1e-4}
    assert len(lines) == len(plain_run) == 50
    for fast, plain in zip(lines, plain_run, strict=True):
        for name in ("loss", "grad_norm", "cos_sim", "mercator_loss", "mse_loss", "lm_loss", "kd_loss"):
            assert fast[name] == pytest.approx(plain[name], **tolerance), (plain["step"], name)


def test_a_model_that_cannot_be_packed_is_padded_and_said_so(tmp_path, tokenizer, capsys):
    def bloom(width, layers, seed):
        torch.manual_seed(seed)
        config = BloomConfig(vocab_size=512, hidden_size=width, n_layer=layers, n_head=2, pad_token_id=0)
        return BloomForCausalLM(config)

    trainer = make_trainer(tmp_path, tokenizer, model=bloom)
    assert not trainer.batches.packs
    assert trainer.teacher.model.config._attn_implementation == "sdpa"
    trainer.train()
    assert trainer.throughput()["padding_fraction"] > 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("No packing")]
    assert said == [
        "No packing, because the student, a BloomForCausalLM, cannot read packed examples (packed examples would see "
        "each other); micro-batches are padded to their longest example."
    ]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"max_tokens_per_batch": 0}, None),
        ({"torch_compile": True}, "torch_compile would compile anew for the lengths of every row"),
    ],
)
def test_there_is_no_packing_where_it_is_not_wanted_or_does_not_pay(tmp_path, tokenizer, capsys, changes, reason):
    assert not make_trainer(tmp_path, tokenizer, **changes).batches.packs
    assert (f"No packing, because {reason};" in capsys.readouterr().out) == (reason is not None)


def test_every_example_of_an_epoch_is_trained_once_however_the_rows_fall(tmp_path, tokenizer):
    for budget in (30, 1000):
        changes = {"max_steps": -1, "num_train_epochs": 1, "max_tokens_per_batch": budget, "count": 13}
        trainer = make_trainer(tmp_path, tokenizer, gradient_accumulation_steps=3, **changes)
        seen, step = [], trainer.compute_loss

        def note(model, inputs, *args, seen=seen, step=step, **kwargs):
            if torch.is_grad_enabled() and "packed_lengths" in inputs:
                seen.extend(
                    map(tuple, (ids.tolist() for ids in inputs["input_ids"][0].split(inputs["packed_lengths"])))
                )
            return step(model, inputs, *args, **kwargs)

        trainer.compute_loss = note
        trainer.train()
        assert sorted(seen) == sorted(tuple(ids) for ids in trainer.train_dataset["input_ids"])
        assert trainer.state.global_step == 2
