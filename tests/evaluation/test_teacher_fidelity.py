"""What quantising does to a teacher: the figures, where they are measured, and whole runs that have them."""

import gc
import json
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers.data import random_examples
from helpers.models import tiny_llama
from helpers.places import ROOT
from helpers.processes import Run
from helpers.programs import SHORT, summary_of, words
from transformers import AutoTokenizer

import run_kava
from kava_trainer.config.model_arguments import ModelArguments
from kava_trainer.config.parser import parse_arguments
from kava_trainer.data.collators import DistillationCollator
from kava_trainer.evaluation import teacher_fidelity
from kava_trainer.evaluation.teacher_fidelity import (
    TeacherFidelity,
    choose_device,
    compare_readings,
    poor_fidelity,
    read_examples,
)
from kava_trainer.quickstart import TEACHER_FOLDER
from kava_trainer.runs.pair import models
from kava_trainer.utils import memory
from kava_trainer.utils.console import Console

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
RECIPE = str(ROOT / "training_args" / "quickstart.json")
FEW = {**SHORT, "max_steps": 1, "max_train_samples": 32, "run_control": "false", "evaluate_generation": "false"}


def figures_of(reference, quantised, layers, tokenizer, examples):
    collator = DistillationCollator(tokenizer)
    return compare_readings(*(read_examples(model, layers, examples, collator) for model in (reference, quantised)))


def naive(model, layer, examples):
    """States [N, d] of a layer, and the mean cross-entropy of the answers, one example after the other."""
    states, losses = [], []
    for example in examples:
        output = model(input_ids=torch.tensor([example["input_ids"]]), output_hidden_states=True)
        states.append(output.hidden_states[layer][0])
        labels = torch.tensor(example["labels"][1:])
        losses.append(F.cross_entropy(output.logits[0, :-1], labels, reduction="none")[labels != -100])
    return torch.cat(states).detach(), torch.cat(losses).mean().item()


def test_the_figures_are_those_of_a_naive_computation(tokenizer):
    reference, quantised = tiny_llama(64, 4, seed=1), tiny_llama(64, 4, seed=1)
    with torch.no_grad():
        for parameter in quantised.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    examples = random_examples(9)
    figures = figures_of(reference, quantised, [2, 4], tokenizer, examples)
    assert list(figures["layers"]) == ["2", "4"]
    for layer, row in figures["layers"].items():
        ours, loss = naive(quantised, int(layer), examples)
        theirs, reference_loss = naive(reference, int(layer), examples)
        cosines = [(a @ b / (a.norm() * b.norm())).item() for a, b in zip(ours, theirs, strict=True)]
        centred = F.cosine_similarity(ours - ours.mean(0), theirs - theirs.mean(0), dim=-1).mean().item()
        assert row["cos_sim"] == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)
        assert row["centred_cos_sim"] == pytest.approx(centred, abs=1e-5)
        assert row["cos_sim_p01"] == pytest.approx(torch.tensor(cosines).quantile(0.01).item(), abs=1e-5)
        assert min(cosines) < row["cos_sim_p01"] < row["cos_sim"] < 0.9999
    assert figures["cross_entropy"] == pytest.approx(loss, rel=1e-5)
    assert figures["reference_cross_entropy"] == pytest.approx(reference_loss, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert figures["reference_perplexity"] == pytest.approx(math.exp(reference_loss), rel=1e-5)
    assert figures["tokens"] == sum(len(example["input_ids"]) for example in examples)
    assert figures["reference_dtype"] == "float32"


def test_a_teacher_that_quantising_leaves_as_it_was_is_perfect(tokenizer):
    figures = figures_of(tiny_llama(64, 2), tiny_llama(64, 2), [1, 2], tokenizer, random_examples(5))
    for row in figures["layers"].values():
        assert row == pytest.approx({"cos_sim": 1.0, "cos_sim_p01": 1.0, "centred_cos_sim": 1.0}, abs=1e-6)
    assert figures["perplexity"] == figures["reference_perplexity"]
    assert poor_fidelity(figures) is None


@pytest.mark.parametrize(
    ("cos_sims", "losses", "told"),
    [
        ((0.99, 0.95), (1.0, 1.09), None),
        ((0.99, 0.94), (1.0, 1.0), "its states at layer 4 have a CosSim of 0.9400, below 0.95"),
        ((math.nan, 0.9), (1.0, 1.0), "its states at layer 2 have a CosSim of nan, below 0.95"),
        ((0.99, 0.99), (1.0, 1.2), "its perplexity is 1.22 times as high, more than 1.1"),
        ((0.99, 0.99), (1.0, math.nan), "its perplexity is nan times as high, more than 1.1"),
        ((0.5, 0.99), (0.0, 0.2), "CosSim of 0.5000, below 0.95 and its perplexity is 1.22 times"),
        ((0.99, 0.99), (2.0, 1.0), None),
    ],
)
def test_what_counts_as_poor(cos_sims, losses, told):
    layers = {layer: {"cos_sim": value} for layer, value in zip(("2", "4"), cos_sims, strict=True)}
    found = poor_fidelity({"layers": layers, "reference_cross_entropy": losses[0], "cross_entropy": losses[1]})
    assert (found is None) if told is None else (told in found)


GB = 10**9


@pytest.mark.parametrize(
    ("weights", "device", "free", "place"),
    [
        (3 * GB, GPU, {GPU: 8 * GB, CPU: 16 * GB}, GPU),
        (3 * GB, GPU, {GPU: 4 * GB, CPU: 16 * GB}, CPU),
        (3 * GB, GPU, {GPU: 8 * GB, CPU: 4 * GB}, "4.30 GB for a moment, and 8.00 GB on cuda:0 and 4.00 GB on cpu are"),
        (40 * GB, GPU, {GPU: 8 * GB, CPU: 99 * GB}, "are free; it is too large to be run on the CPU."),
        (40 * GB, CPU, {CPU: 99 * GB}, CPU),
        (3 * GB, CPU, {CPU: 4 * GB}, "4.30 GB for a moment, and 4.00 GB on cpu are free."),
    ],
)
def test_an_unquantised_teacher_runs_where_it_fits(monkeypatch, weights, device, free, place):
    monkeypatch.setattr(teacher_fidelity, "free_memory_bytes", free.__getitem__)
    found = choose_device(weights, device)
    assert (place in found) if isinstance(place, str) else (found == place)


def write_group(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def test_the_limits_of_containers_and_schedulers_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "PROCESS", tmp_path / "proc")
    monkeypatch.setattr(memory, "CONTROL_GROUPS", tmp_path / "groups")
    whole = memory.free_memory_bytes(CPU)
    assert whole > 10**6
    write_group(tmp_path / "proc", {"cgroup": "4:memory:/job\n0::/slice/job\n"})
    assert memory.free_memory_bytes(CPU) > 10**6
    slice_files = {"memory.max": "900000\n", "memory.current": "400000\n", "memory.stat": "anon 1\ninactive_file 7\n"}
    write_group(tmp_path / "groups" / "slice", slice_files)
    assert memory.free_memory_bytes(CPU) == 500007
    write_group(tmp_path / "groups" / "slice" / "job", {"memory.max": "max\n", "memory.current": "400000\n"})
    assert memory.free_memory_bytes(CPU) == 500007
    old = {"memory.limit_in_bytes": "300\n", "memory.usage_in_bytes": "200\n", "memory.stat": "total_inactive_file 5\n"}
    write_group(tmp_path / "groups" / "memory" / "job", old)
    assert memory.free_memory_bytes(CPU) == 105
    write_group(tmp_path / "groups" / "memory" / "job", {"memory.usage_in_bytes": "400\n"})
    assert memory.free_memory_bytes(CPU) == 0


def run(output, **changes):
    options = {**FEW, "teacher_quantization": "4bit", "output_dir": output, **changes}
    assert run_kava.main([RECIPE, *words(options)]) == 0
    return summary_of(output)


def without_noise(arguments, device, *others):
    """A teacher that is told to be quantised and is not."""
    return load_teacher(type(arguments)(**{**vars(arguments), "teacher_quantization": "none"}), device, *others)


load_teacher = models.load_teacher


@pytest.fixture(autouse=True)
def _needs_bitsandbytes():
    pytest.importorskip("bitsandbytes")


def test_without_quantising_there_is_nothing_to_measure(monkeypatch):
    monkeypatch.setattr(teacher_fidelity, "load_teacher", lambda *_: pytest.fail("another teacher was loaded"))
    arguments = parse_arguments([RECIPE, "--use_cpu"])
    measurement = TeacherFidelity(Console(), arguments, None, [], True, None)
    measurement.read_unquantised()
    assert measurement.compare(None) is None


def test_a_run_with_a_perfectly_quantised_teacher_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "load_teacher", without_noise)
    measured = run(tmp_path, teacher_quantization="8bit")["teacher_fidelity"]
    assert [row["cos_sim"] for row in measured["layers"].values()] == pytest.approx([1, 1], abs=1e-6)
    assert measured["perplexity"] == measured["reference_perplexity"]
    shown = capsys.readouterr().out
    assert "8-bit teacher against float32 on " in shown
    assert "CosSim 1.0000 at layer 1, 1.0000 at layer 4, perplexity 1" in shown
    assert "is far from what it was" not in shown


def test_a_poor_quantised_teacher_is_a_warning(tmp_path, monkeypatch, capsys):
    def load_noisy(*arguments):
        model = load_teacher(*arguments)
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        return model

    monkeypatch.setattr(teacher_fidelity, "load_teacher", load_noisy)
    measured = run(tmp_path)["teacher_fidelity"]
    assert measured["layers"]["4"]["cos_sim"] < 0.95
    shown = capsys.readouterr().out
    assert "Warning: The 4-bit teacher is far from what it was unquantised: its states at layer" in shown
    assert "Write teacher_quantization 8bit or none; where memory is short, a teacher_cache_dir" in shown


def test_the_two_teachers_are_never_in_memory_together(tmp_path, monkeypatch):
    seen = []

    def load_unquantised(*arguments):
        model = load_teacher(*arguments)
        seen.append(weakref.ref(model))
        return model

    def load_quantised(*arguments):
        gc.collect()
        assert [reference() for reference in seen] == [None]
        return load_teacher(*arguments)

    monkeypatch.setattr(teacher_fidelity, "load_teacher", load_unquantised)
    monkeypatch.setattr(models, "load_teacher", load_quantised)
    measured = run(tmp_path)["teacher_fidelity"]
    assert len(seen) == 1
    assert measured["reference_device"] == "cpu"
    assert measured["reason"] is None


@pytest.mark.slow
def test_what_does_not_fit_is_left_out_with_the_reason_and_trains_the_same(tmp_path, monkeypatch, capsys):
    measured = run(tmp_path / "measured")
    monkeypatch.setattr(teacher_fidelity, "free_memory_bytes", lambda device: 5 * 10**6)
    summary = run(tmp_path / "tight")
    left_out = summary["teacher_fidelity"]
    reason = "The unquantised teacher needs 1.00 GB for a moment, and 5.0 MB on cpu are free."
    assert left_out == {**dict.fromkeys(measured["teacher_fidelity"]), "quantization": "4bit", "reason": reason}
    assert f"What quantising costs the teacher was not measured. {reason}" in capsys.readouterr().out
    assert summary["final"] == measured["final"]
    assert summary["evaluation"] == measured["evaluation"]


def test_memory_that_runs_out_on_the_way_ends_no_run(tmp_path, monkeypatch):
    def read(*_):
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr(teacher_fidelity, "read_examples", read)
    measured = run(tmp_path)["teacher_fidelity"]
    assert measured["reason"] == "Memory ran out on cpu with the unquantised teacher."
    assert measured["layers"] is None


@pytest.mark.slow
def test_a_resumed_run_and_one_with_a_cache_measure_the_same_again(tmp_path):
    cached = {"teacher_cache_dir": tmp_path / "cache", "save_steps": 1, "resume_from_checkpoint": "true"}
    first = run(tmp_path / "out", **cached)
    again = run(tmp_path / "out", **cached, max_steps=2)
    assert again["global_step"] == 2
    assert again["teacher_fidelity"] == first["teacher_fidelity"]
    assert again["teacher_fidelity"]["layers"]["4"]["cos_sim"] > 0.9


def test_without_held_out_examples_those_of_the_training_are_read(tmp_path):
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": "What is 2+3?", "completion": " 5 and no more"}) + "\n")
    measured = run(tmp_path / "out", dataset_name=tmp_path / "one.jsonl")["teacher_fidelity"]
    assert measured["examples"] == "training"
    assert 0.9 < measured["layers"]["4"]["cos_sim"] < 1


def test_a_teacher_that_is_stored_quantised_has_nothing_to_be_compared_with(tmp_path):
    stored = tmp_path / "teacher"
    arguments = ModelArguments(teacher_model_name_or_path="quickstart", teacher_quantization="4bit")
    load_teacher(arguments, CPU).save_pretrained(stored)
    AutoTokenizer.from_pretrained(TEACHER_FOLDER).save_pretrained(stored)
    measured = run(tmp_path / "out", teacher_model_name_or_path=stored)["teacher_fidelity"]
    assert measured["reason"] == "The teacher's weights are stored quantised, so there is nothing to compare with."


@pytest.mark.slow
def test_only_the_main_process_measures_and_no_other_waits_for_ever(tmp_path):
    options = {**FEW, "teacher_quantization": "4bit", "output_dir": tmp_path / "out"}
    options |= {"per_device_train_batch_size": 4}
    two = Run(run_kava.main, tmp_path, [RECIPE, *words(options)], ranks=2)
    assert two.wait() == [0, 0], two.output()
    assert two.output().count("4-bit teacher against float32") == 1
    assert "processes: 2" in two.output()
    assert summary_of(tmp_path / "out")["teacher_fidelity"]["layers"]["4"]["cos_sim"] > 0.9
