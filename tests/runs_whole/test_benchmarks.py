"""The benchmarks measure what they say: every way of doing a step does the same work."""

import csv
import math
import sys

import pytest
import torch
from datasets import Dataset
from helpers.data import write_problems
from helpers.models import STUDENT_LAYERS, STUDENT_SIZE, tiny_llama
from helpers.places import ROOT
from transformers import AutoTokenizer

from kava_trainer.data.collators import DistillationCollator
from kava_trainer.data.encoding import encode_dataset
from kava_trainer.data.token_alignment.pair_encoder import tokenizers_agree
from kava_trainer.quickstart import STUDENT_FOLDER
from kava_trainer.runs.setup import Data

sys.path.insert(0, str(ROOT / "benchmarks"))
import bf16_updates
import gpu_check
import gpu_check_parts
import matrix
import pair_kinds
import step

from benchmarks import step_rollouts


@pytest.mark.parametrize("terms", ["hidden", "all"])
def test_every_way_of_a_step_has_the_same_gradients(terms):
    bench = step.Bench(step.SIZES["quickstart"], terms, torch.device("cpu"))
    gradients = {}
    bench.write_cache()
    for way in "abcde":
        bench.prepare()
        getattr(bench, way)()
        gradients[way] = {n: p.grad.clone() for n, p in bench.trainer.model.named_parameters() if p.grad is not None}
    reference = gradients.pop("a")
    for way, found in gradients.items():
        assert found.keys() == reference.keys()
        for name, gradient in found.items():
            difference = (gradient - reference[name]).norm()
            tolerance = 1e-2 if way == "e" else 1e-3  # the cache holds bfloat16
            assert difference <= tolerance * reference[name].norm() + 1e-6, (way, name)


@pytest.mark.slow
def test_the_step_benchmark_writes_a_row_for_each_way(tmp_path, monkeypatch):
    out = tmp_path / "folder" / "step.csv"
    command = ["step.py", "--size", "quickstart", "--ways", "a,d,e,f,g", "--repeats", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    step.main()
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["way"] for row in rows] == ["a", "d", "e", "f", "g"]
    assert tuple(rows[0]) == step.COLUMNS
    assert all(float(row["seconds"]) > 0 and int(row["peak_memory_bytes"]) > 0 for row in rows)
    assert float(rows[0]["ratio_to_usual"]) == 1


@pytest.mark.slow
def test_the_benchmark_of_the_students_own_answers_compares_like_with_like(tmp_path, monkeypatch):
    out = tmp_path / "own.csv"
    monkeypatch.setattr(sys, "argv", ["step.py", "--terms", "on_policy", "--repeats", "1", "--out", str(out)])
    monkeypatch.setattr(step_rollouts, "NEW_TOKENS", 6)
    monkeypatch.setattr(step_rollouts, "LESSONS", 2)
    step.main()
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == step_rollouts.COLUMNS
    writing = ["one at a time", "8 together", "all together", "continuous"]
    assert [row["way"] for row in rows if row["part"] == "ending"] == writing
    full = {row["way"]: row for row in rows if row["part"] == "full"}
    assert {way: int(row["tokens"]) for way, row in full.items()} == dict.fromkeys(writing, 32 * 6)
    assert float(full["all together"]["ratio"]) == pytest.approx(
        float(full["one at a time"]["seconds"]) / float(full["all together"]["seconds"]), rel=1e-3
    )
    alone, half, half_in_three, *_ = steps = [row for row in rows if row["part"] == "step"]
    assert [row["way"] for row in steps] == ["0, every 1", "0.5, every 1", "0.5, every 3", "1, every 1", "1, every 3"]
    assert (float(alone["tokens"]), float(alone["generation_share"]), float(alone["ratio"])) == (0, 0, 1)
    assert 0 < float(half_in_three["generation_share"]) < float(half["generation_share"]) < 1
    assert 0 < float(half["tokens"]) <= 16 * 6 < float(steps[3]["tokens"]) <= 32 * 6


@pytest.mark.parametrize("options", [["--size", "middle"], ["--ways", "a,d"]])
def test_the_students_own_answers_have_ways_and_a_size_of_their_own(tmp_path, monkeypatch, capsys, options):
    asked = ["step.py", "--terms", "on_policy", *options, "--out", str(tmp_path / "own.csv")]
    monkeypatch.setattr(sys, "argv", asked)
    with pytest.raises(SystemExit):
        step.main()
    assert "--terms on_policy is measured at --size quickstart, in ways of its own" in capsys.readouterr().err


@pytest.mark.slow
def test_the_benchmark_of_updates_tells_the_ways_apart(tmp_path, monkeypatch):
    pytest.importorskip("torchao")
    out = tmp_path / "updates.csv"
    ways = ["float32", "bf16", "bf16, 8-bit states, rounded at random"]
    command = ["bf16_updates.py", "--cases", "continued", "--ways", *ways, "--seeds", "0", "--steps", "4"]
    monkeypatch.setattr(sys, "argv", [*command, "--examples", "64", "--out", str(out)])
    bf16_updates.main()
    with out.open(newline="") as file:
        rows = {
            row["way"]: {k: row[k] for k in ("changed", "progress", "distance", "bytes_per_parameter")}
            for row in csv.DictReader(file)
        }
    figures = {way: {name: float(value) for name, value in row.items()} for way, row in rows.items()}
    assert list(figures) == ways
    assert figures["float32"]["changed"] > 0.9
    assert figures["float32"]["distance"] == 0
    assert figures["float32"]["progress"] == pytest.approx(1)
    assert figures["bf16"]["distance"] > 0
    assert [figures[way]["bytes_per_parameter"] for way in ways] == pytest.approx([16, 8, 6.36], abs=0.1)


@pytest.mark.slow
def test_a_cell_of_the_support_matrix_is_run_or_refused(tmp_path):
    data = str(write_problems(tmp_path / "data.jsonl"))
    outcomes = {}
    for engine, changes in (("one process", matrix.TEACHERS["4-bit"]), ("DeepSpeed", {}), ("DDP", {"optim": "none"})):
        folder = tmp_path / engine
        folder.mkdir()
        outcomes[engine] = matrix.cell(engine, matrix.CHANGES | changes, folder, data)
    assert outcomes["one process"] == ("run", "resumed")
    assert outcomes["DeepSpeed"][0].startswith("refused: deepspeed is not supported")
    assert outcomes["DDP"][0].startswith("refused: optim is ")


@pytest.mark.parametrize(("reader", "size"), [(pair_kinds.CHARACTERS, 67), (pair_kinds.PIECES, 320)])
def test_students_of_other_tokenizers_read_the_quickstarts_text_in_their_own_tokens(reader, size):
    tokenizer = pair_kinds.train_tokenizer(reader)
    text = "Question: Ava has 12 pears.\nAnswer: 12-5=<<12-5=7>>7 pears\n#### 7"
    ids = tokenizer(text)["input_ids"]
    assert len(tokenizer) == size
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text) if reader == pair_kinds.CHARACTERS else len(ids) < len(text)
    assert not tokenizers_agree(tokenizer, AutoTokenizer.from_pretrained(STUDENT_FOLDER))


def test_what_a_character_costs_counts_the_end_of_text_but_as_no_character():
    """A model that finds all of V tokens alike pays log V for each token of an answer, its end too."""
    tokenizer = AutoTokenizer.from_pretrained(STUDENT_FOLDER)
    rows = Dataset.from_list([{"question": "1 + 1?", "answer": "2"}, {"question": "Who?", "answer": "you and I"}])
    held_out = encode_dataset(rows, tokenizer, 64, "test").dataset
    model = tiny_llama(STUDENT_SIZE, STUDENT_LAYERS)
    torch.nn.init.zeros_(model.lm_head.weight)
    answers = [" 2", " you and I"]  # the space behind the prompt is predicted too
    tokens = sum(len(tokenizer(answer)["input_ids"]) + 1 for answer in answers)
    found = pair_kinds.nats_of_a_character(model, Data(held_out, held_out, DistillationCollator(tokenizer)), 2)
    assert found == pytest.approx(math.log(512) * tokens / len("".join(answers)), rel=1e-4)


def found_far(place):
    return gpu_check_parts.alike({"near": 0.1, "far": 0.3}, {"near": 0.2, "far": 0.2})


def found_nothing(place):
    raise FileNotFoundError("no run_summary.json")


def test_a_check_of_a_gpu_tells_what_came_of_it(tmp_path):
    place = gpu_check_parts.Place("cpu", tmp_path)
    near = gpu_check_parts.outcome(lambda place: gpu_check_parts.alike({"near": 0.1}, {"near": 0.2}), place)
    assert near == {"outcome": "held", "figures": {"near": 0.1}}
    far = gpu_check_parts.outcome(found_far, place)
    assert far == {"outcome": "missed", "figures": {"near": 0.1, "far": 0.3}, "said": "far may be 0.2 at most"}
    broken = gpu_check_parts.outcome(found_nothing, place)
    assert broken == {"outcome": "failed", "said": "FileNotFoundError: no run_summary.json"}
    not_a_number = gpu_check_parts.outcome(
        lambda place: gpu_check_parts.alike({"loss": math.nan}, {"loss": 0.2}), place
    )
    assert not_a_number["outcome"] == "missed"
    assert gpu_check.CHECKS.keys() == gpu_check_parts.PARTS.keys()
    results = [gpu_check.Result("step", "missed", 3.2, {"x_usual": 4.0}, "a | b"), gpu_check.Result("fsdp", "not run")]
    lines = gpu_check.table(results).splitlines()
    assert lines[2].endswith("| missed | 3 | x usual 4; a / b |")
    assert lines[3].endswith("| not run | 0 |  |")


def test_a_check_that_is_not_there_is_told_as_failed(tmp_path):
    own = gpu_check.run_check("no such check", "cpu", 60, tmp_path)
    assert own.outcome == "failed"
    assert "no such check" in own.said
    assert "Traceback" in (tmp_path / "gpu-check-cpu-no such check.log").read_text()


def test_a_check_that_takes_too_long_is_stopped(tmp_path):
    own = gpu_check.run_check("cache", "cpu", 0.2, tmp_path)
    assert (own.outcome, own.said) == ("failed", "stopped after 0 s")
