"""What a sharded student is worth is what it is worth whole, and no rank ever holds it whole."""

import pytest
import torch
from helpers import sharded_reading
from helpers.processes import Run


def measured(folder, function, ranks, held_out, settings):
    run = Run(function, folder, str(folder / "run"), held_out, settings, ranks=ranks)
    assert run.wait() == [0] * ranks, run.output()
    return torch.load(folder / "run.pt", weights_only=True)


@pytest.mark.parametrize(("ranks", "held_out", "settings"), [
    (2, 7, {"projector_init": "least_squares", "kd_weight": 0.5}),
    (2, 1, {"projector_init": "least_squares", "kind": "untied"}),  # the second rank has nothing to read
    (2, 5, {"projector_anchor": "pca", "layer_mapping": "uniform:2", "kind": "untied"}),
    pytest.param(4, 6, {"projector_anchor": "pca", "projector_rank": 8}, marks=pytest.mark.slow),
])  # fmt: skip
def test_figures_of_a_sharded_student_are_those_of_the_whole_one(tmp_path, ranks, held_out, settings):
    alone = measured(tmp_path / "alone", sharded_reading.measure, 1, held_out, settings)
    sharded = measured(tmp_path / "sharded", sharded_reading.measure_sharded, ranks, held_out, settings)
    assert (sharded["sharded"], sharded["held"]) == (True, {"DTensor"})
    assert len({len(answer) for answer in alone["answers"]}) == min(held_out, 2) or held_out > 2
    assert sharded["answers"] == alone["answers"]
    for name in ("figures", "again", "metrics", "probe"):
        assert sharded[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-6), name
    for name in ("figures", "again"):
        assert sharded[name] == pytest.approx(alone[name], rel=1e-5), name
    assert sharded["projectors"].keys() == alone["projectors"].keys() != set()
    for name, tensor in alone["projectors"].items():
        torch.testing.assert_close(sharded["projectors"][name], tensor, rtol=1e-3, atol=1e-4, msg=name)
