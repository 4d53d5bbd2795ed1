"""What needs a package of its own is told in one sentence, before anything is loaded."""

import pytest
import torch
from helpers.models import tiny_llama
from helpers.programs import QUICKSTART, SHORT, words
from transformers import Trainer
from transformers.training_args import OptimizerNames

from kava_trainer.cli import main
from kava_trainer.config import optimizer_names
from kava_trainer.config.arguments import KavaTrainingArguments
from kava_trainer.config.optimizer_names import missing_package, steps_in_backward
from kava_trainer.runs import start
from kava_trainer.utils.errors import WrongArguments

OF_TORCH = {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"}


@pytest.fixture
def nothing_installed(monkeypatch):
    monkeypatch.setattr(optimizer_names, "_is_installed", lambda module: False)
    monkeypatch.setattr(optimizer_names, "is_torchao_available", lambda: False)


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize("optim", [optim.value for optim in OptimizerNames])
def test_every_optimizer_that_is_not_torch_s_names_what_it_needs(optim):
    problem = missing_package(optim)
    assert (problem is None) is (optim in OF_TORCH)
    if problem is not None:
        assert problem.argument == "optim"
        assert str(problem).startswith(f"optim is {optim}, which needs ")
        assert "; run pip install " in str(problem)


@pytest.mark.parametrize("optim", [optim.value for optim in OptimizerNames])
def test_what_is_not_refused_can_be_made(tmp_path, optim):
    if missing_package(optim) is None and steps_in_backward(optim) is None:
        targets = {"optim_target_modules": ["mlp"]} if optim.startswith(("galore", "apollo")) else {}
        args = KavaTrainingArguments(output_dir=str(tmp_path), optim=optim, use_cpu=True, **targets)
        kind, _ = Trainer.get_optimizer_cls_and_kwargs(args, tiny_llama(32, 1))
        assert issubclass(kind, torch.optim.Optimizer)


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"use_liger_kernel": True},
            "use_liger_kernel is true, which needs liger-kernel; run pip install liger-kernel, or write false.",
        ),
        (
            {"optim": "grokadamw"},
            "optim is grokadamw, which needs grokadamw; run pip install grokadamw, or write another optim, such as "
            "adamw_torch_fused.",
        ),
        ({"torch_compile_backend": "nonsense"}, "torch_compile_backend is nonsense; write one of "),
    ],
)
def test_a_missing_package_is_one_sentence(tmp_path, changes, said):
    with pytest.raises(WrongArguments) as refused:
        KavaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **changes)
    assert str(refused.value).startswith(said)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(("there", "refused"), [((), True), (("g++",), False), (("mine",), False)])
def test_compiling_on_a_cpu_needs_a_compiler(tmp_path, monkeypatch, there, refused):
    monkeypatch.setenv("CXX", "mine")
    monkeypatch.setattr(optimizer_names.shutil, "which", lambda name: name if name in there else None)
    options = {"output_dir": str(tmp_path), "use_cpu": True, "torch_compile_mode": "default"}
    if refused:
        with pytest.raises(WrongArguments, match=r"^torch_compile needs a C\+\+ compiler on a CPU, and there is none;"):
            KavaTrainingArguments(**options)
    else:
        assert KavaTrainingArguments(**options).torch_compile
    assert KavaTrainingArguments(**options | {"torch_compile_backend": "eager"}).torch_compile  # compiles nothing


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_liger_kernel": "true"}, "use_liger_kernel is true, which needs liger-kernel"),
        ({"optim": "galore_adamw"}, "optim is galore_adamw, which needs galore-torch"),
        ({"optim": "paged_adamw_8bit"}, "optim is paged_adamw_8bit, which needs bitsandbytes"),
        ({"report_to": "mlflow"}, "report_to mlflow cannot be used"),
    ],
)
@pytest.mark.parametrize("command", ["doctor", "train"])
def test_doctor_and_run_refuse_it_before_anything_is_loaded(tmp_path, monkeypatch, capsys, command, changes, said):
    def loaded(*_):
        raise AssertionError("something was loaded")

    if command == "train":
        monkeypatch.setattr(start, "load_tokenizers", loaded)
    output = tmp_path / "out"
    assert main([command, *words({**QUICKSTART, **SHORT, "output_dir": output, **changes})]) == 2
    shown = capsys.readouterr()
    assert said in shown.out + shown.err
    assert "Traceback" not in shown.out + shown.err
    assert not output.exists()
