"""The benchmarks measure what they say: every way of doing a step does the same work."""

import csv
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import step


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
