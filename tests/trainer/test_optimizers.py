"""Weights in bfloat16: which optimizers lose small updates, and how those of torchao are run."""

import pytest
import torch
from helpers.models import tiny_llama
from helpers.places import ROOT
from helpers.programs import QUICKSTART, SHORT, words
from helpers.trainers import make_trainer
from torch import nn
from transformers.training_args import OptimizerNames

import run_kava
from kava_trainer.config import optimizer_names
from kava_trainer.config.arguments import KavaTrainingArguments
from kava_trainer.config.parser import parse_arguments
from kava_trainer.runs.advice import long_warmup, planned_steps, rounding_problem
from kava_trainer.trainer.optimizers import settled
from kava_trainer.utils.errors import BadRequest

CPU = torch.device("cpu")
HALF, FULL = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("optim", "optim_args", "dtypes", "loses"),
    [
        ("adamw_torch_fused", None, [HALF], True),
        (OptimizerNames.ADAMW_TORCH_FUSED, None, [FULL, HALF], True),
        ("adamw_torch_fused", None, [FULL], False),
        ("adamw_torch_8bit", None, [HALF], True),
        ("adamw_torch_8bit", "bf16_stochastic_round=False", [HALF], True),
        ("adamw_torch_8bit", "bf16_stochastic_round=True", [HALF], False),
        (OptimizerNames.ADAMW_TORCH_4BIT, "bf16_stochastic_round = yes", [HALF], False),
        ("adamw_bnb_8bit", "bf16_stochastic_round=True", [HALF], True),
        ("adafactor", "nonsense", [HALF], True),
        ("stable_adamw", None, [HALF], False),
        ("adamw_anyprecision", "use_kahan_summation=True", [HALF], False),
        ("adamw_anyprecision", None, [HALF], True),
    ],
)
def test_it_is_said_when_bfloat16_weights_lose_their_updates(optim, optim_args, dtypes, loses):
    problem = rounding_problem(optim, optim_args, iter(dtypes))
    assert (problem is not None) == loses
    if loses:
        name = optim.value if isinstance(optim, OptimizerNames) else optim
        assert f"optim {name} rounds away" in str(problem)
        assert "optim adamw_torch_8bit with optim_args bf16_stochastic_round=True,block_size=64" in str(problem)


def test_a_run_with_bfloat16_weights_warns_once_and_trains(tmp_path, capsys):
    options = {**QUICKSTART, **SHORT, "student_dtype": "bfloat16", "max_steps": 1, "output_dir": tmp_path}
    assert run_kava.main(words(options)) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "rounds away" in line]
    assert len(said) == 1
    assert said[0].startswith("Warning: The student's weights are bfloat16, and optim adamw_torch_fused rounds away")


@pytest.mark.parametrize("recipe", ["gsm8k_qwen2.5_8gb", "seed_mercator_only", "gsm8k_qwen2.5_24gb", "quickstart"])
def test_no_recipe_loses_updates(recipe):
    pytest.importorskip("torchao")
    arguments = parse_arguments([str(ROOT / "training_args" / f"{recipe}.json"), "--use_cpu"])
    dtype = HALF if arguments.model.student_dtype == "bfloat16" else FULL
    assert rounding_problem(arguments.training.optim, arguments.training.optim_args, [dtype]) is None


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_train_epochs": 2.5},
        {"per_device_train_batch_size": 3, "num_train_epochs": 0.5},
        {"gradient_accumulation_steps": 5, "dataloader_drop_last": True, "per_device_train_batch_size": 3},
        {"gradient_accumulation_steps": 100},
        {"max_steps": 3},
    ],
)
def test_the_planned_steps_are_those_that_trainer_takes(tmp_path, tokenizer, changes):
    trainer = make_trainer(tmp_path, tokenizer, **{"max_steps": -1, "num_train_epochs": 1, **changes})
    planned = planned_steps(trainer.args, len(trainer.train_dataset), 1)
    trainer.train()
    assert trainer.state.max_steps == trainer.state.global_step == planned


@pytest.mark.parametrize(("drop_last", "steps"), [(False, 2), (True, 1)])
def test_processes_share_the_examples(tmp_path, drop_last, steps):
    args = KavaTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, gradient_accumulation_steps=1, dataloader_drop_last=drop_last
    )
    assert planned_steps(args, 10, processes=4) == steps  # micro-batches of 2


@pytest.mark.parametrize(
    ("changes", "steps", "warns"),
    [
        ({"warmup_steps": 5}, 5, True),
        ({"warmup_steps": 5}, 6, False),
        ({"warmup_steps": 0.9}, 5, True),  # rounded up to all of them
        ({"warmup_steps": 0.1}, 5, False),
        ({"warmup_steps": 0}, 1, False),
        ({"warmup_steps": 5, "lr_scheduler_type": "cosine"}, 4, True),
        ({"warmup_steps": 5, "lr_scheduler_type": "constant_with_warmup"}, 4, True),
        ({"warmup_steps": 5, "lr_scheduler_type": "constant"}, 4, False),
        ({"warmup_steps": 5, "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}, 4, False),
    ],
)
def test_a_warm_up_that_does_not_end_is_said(tmp_path, changes, steps, warns):
    problem = long_warmup(KavaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **changes), steps)
    assert (problem is not None) == warns
    if warns:
        assert f"warmup_steps comes to 5 and the whole training to {steps} (optimizer steps)," in str(problem)


@pytest.mark.parametrize(
    ("given", "steps", "remedy"),
    [
        (5, 5, "Lower warmup_steps, or write a share of all steps, such as 0.1."),
        (1, 1, "Lower warmup_steps; 0 leaves the warm-up out."),  # a tenth of one step is one step too
        (0.9, 5, "Lower warmup_steps; 0 leaves the warm-up out."),
    ],
)
def test_what_is_advised_for_a_warm_up_helps(tmp_path, given, steps, remedy):
    args = KavaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, warmup_steps=given)
    assert str(long_warmup(args, steps)).endswith(remedy)
    args.warmup_steps = 0.1 if "0.1" in remedy else 0
    assert long_warmup(args, steps) is None


def test_a_run_warns_of_its_warm_up_once(tmp_path, capsys):
    options = {**QUICKSTART, **SHORT, "max_steps": 1, "warmup_steps": 1, "run_control": True, "output_dir": tmp_path}
    assert run_kava.main(words(options)) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "warm-up" in line]
    assert len(said) == 1
    assert said[0].startswith("Warning: warmup_steps comes to 1 and the whole training to 1 (optimizer steps), so")


@pytest.mark.parametrize(
    ("place", "command"),
    [
        (optimizer_names.__file__, 'pip install -c constraints.txt -e ".[bf16]"'),
        ("/site-packages/kava_trainer/config/optimizer_names.py", "pip install torchao"),
    ],
    ids=["checkout", "installed"],
)
def test_a_missing_torchao_is_one_sentence_before_anything_is_loaded(monkeypatch, place, command):
    monkeypatch.setattr(optimizer_names, "__file__", place)
    monkeypatch.setattr(optimizer_names, "is_torchao_available", lambda: False)
    with pytest.raises(BadRequest) as caught:
        parse_arguments([str(ROOT / "training_args" / "gsm8k_qwen2.5_8gb.json"), "--use_cpu"])
    assert str(caught.value) == (
        f"optim is adamw_torch_8bit, which needs torchao; run {command}, or write another optim, such as "
        "adamw_torch_fused."
    )
    assert parse_arguments([str(ROOT / "training_args" / "quickstart.json")])


def of_torchao(weights, seed, **options):
    """An optimizer as KAVA makes it, whose rounding is drawn from what `seed` gives at each step."""
    optim = pytest.importorskip("torchao.optim")
    kind, options = settled(optim.AdamW8bit, options, CPU)
    optimizer = kind(weights, **options)
    optimizer.seed = seed
    return optimizer


def rounded(own, seed, generator):
    """A large and a small weight after three steps, drawn from a generator in a given state."""
    optim = pytest.importorskip("torchao.optim")
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape).to(HALF)) for shape in ((64, 64), (50,))]
    options = {"lr": 1e-4, "bf16_stochastic_round": True}
    optimizer = of_torchao(weights, lambda: seed, **options) if own else optim.AdamW8bit(weights, **options)
    torch.manual_seed(generator)
    with torch.compiler.set_stance("force_eager"):
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.ones_like(weight)
            optimizer.step()
    return torch.cat([weight.detach().flatten() for weight in weights])


def test_all_ranks_round_alike_whatever_else_they_draw():
    assert not torch.equal(rounded(False, 7, 1), rounded(False, 7, 2))
    assert torch.equal(rounded(True, 7, 1), rounded(True, 7, 2))
    assert not torch.equal(rounded(True, 7, 1), rounded(True, 8, 1))


def test_rounding_leaves_the_generator_of_the_run_alone():
    rounded(True, 7, 5)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), after)


def test_rounding_at_random_moves_bfloat16_weights_by_the_whole_update_in_the_mean():
    moved = {}
    for stochastic in (False, True):
        weight = nn.Parameter(torch.ones(256, 256, dtype=HALF))
        steps = iter(range(20))
        options = {"lr": 1e-4, "weight_decay": 0.0, "bf16_stochastic_round": stochastic}
        optimizer = of_torchao([weight], lambda steps=steps: next(steps, 0), **options)
        for _ in range(10):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        moved[stochastic] = 1 - weight.detach().double().mean().item()
    assert moved[False] == 0
    assert moved[True] == pytest.approx(10 * 1e-4, rel=0.05)


def test_the_size_of_blocks_may_be_given(tmp_path, tokenizer):
    pytest.importorskip("torchao")
    trainer = make_trainer(tmp_path, tokenizer, optim="adamw_torch_8bit", optim_args="block_size=64", max_steps=1)
    trainer.train()
    states = [state["exp_avg"] for state in trainer.optimizer.state.values()]
    assert {state.block_size for state in states if type(state) is not torch.Tensor} == {64}


def test_what_cannot_be_compiled_is_one_sentence_before_training(tmp_path, tokenizer, monkeypatch):
    pytest.importorskip("torchao")
    trainer = make_trainer(tmp_path, tokenizer, optim="adamw_torch_8bit")

    def no_compiler(*args, **kwargs):
        raise RuntimeError("No working C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(BadRequest, match=r"cannot take a step on this machine \(No working C\+\+ compiler found\)"):
        trainer.create_optimizer()


def test_torchao_trains_student_and_projectors_at_their_own_rates_and_is_saved_without_pickles(tmp_path, tokenizer):
    pytest.importorskip("torchao")
    changes = {"optim": "adamw_torch_8bit", "optim_args": "bf16_stochastic_round=True", "learning_rate": 2e-3}
    schedule = {"lr_scheduler_type": "linear", "warmup_steps": 1, "save_strategy": "steps", "save_steps": 2}

    def half(*sizes, seed):
        return tiny_llama(*sizes, seed=seed).bfloat16()

    trainer = make_trainer(tmp_path, tokenizer, model=half, max_steps=3, **changes, **schedule)
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    trainer.train()
    assert all(not torch.equal(old, new) for old, new in zip(before, trainer.model.parameters(), strict=True))
    assert all(parameter.dtype == HALF for parameter in trainer.student.parameters())
    lines = [line for line in trainer.state.log_history if "learning_rate" in line]
    assert [line["learning_rate"] for line in lines] == pytest.approx([0, 2e-3, 1e-3])
    assert [line["projector_learning_rate"] for line in lines] == pytest.approx([0, 1e-3, 5e-4])
    saved = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert {type(state["exp_avg"]).__name__ for state in saved["state"].values()} == {"OptimState8bit", "Tensor"}
