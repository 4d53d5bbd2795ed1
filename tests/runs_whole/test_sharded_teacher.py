"""A sharded teacher over a student that is sharded too, or not: what comes out is what comes out under a whole one."""

import json

import pytest
import torch
from helpers import ddp_step, fault_child, outcomes, several, sharded_run, sharded_traffic
from helpers.data import write_problems
from helpers.outcomes import assert_same_step, one_step
from helpers.processes import Run
from helpers.trainers import tiny_teacher

STEPS = {"FSDP2": sharded_run.step, "DDP": ddp_step.main}

CASES = {
    "states": ("1.0,1.0", "", {}),
    "logits": ("1.0,1.0", "all", {}),
    "logits, padded": ("0.0,1.0", "answers", {"max_tokens_per_batch": 0}),
    "inner layers": ("1.0,1.0", "", {"layer_mapping": "[[1, 2]]"}),
}

SLOW = [(engine, case, 2) for engine in STEPS for case in CASES]
SLOW = [own for own in SLOW if own not in (("FSDP2", "logits", 2), ("DDP", "states", 2))]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    tiny_teacher().save_pretrained(folder)
    return str(folder)


def step_under(folder, engine, teacher, ranks, weighting, tokens, changes):
    """What one step ends with; `teacher` is the folder of a sharded one, or empty for the whole one."""
    output = folder / f"{engine}-{ranks}-{bool(teacher)}"
    asked = (str(output), str(8 // ranks), "1", weighting, "tiny_llama", tokens, "", json.dumps(changes), teacher)
    run = Run(STEPS[engine], folder, *asked, ranks=ranks)
    assert run.wait() == [0] * ranks, run.output()
    return torch.load(f"{output}.pt", weights_only=True)


@pytest.mark.parametrize(
    ("engine", "case", "ranks"),
    [
        ("FSDP2", "logits", 2),
        ("DDP", "states", 2),
        *(pytest.param(*own, marks=pytest.mark.slow) for own in SLOW),
        pytest.param("FSDP2", "logits", 4, marks=[pytest.mark.slow, pytest.mark.exhaustive]),
        pytest.param("DDP", "logits", 4, marks=[pytest.mark.slow, pytest.mark.exhaustive]),
    ],
)
def test_a_step_under_a_sharded_teacher_is_that_of_one_process(tmp_path, teacher, engine, case, ranks):
    weighting, tokens, changes = CASES[case]
    alone = one_step(tmp_path, 8, 1, 1, weighting, tokens, **changes)
    assert_same_step(step_under(tmp_path, engine, teacher, ranks, weighting, tokens, changes), alone)


@pytest.mark.slow
def test_a_step_in_bfloat16_under_a_sharded_teacher_is_that_under_a_whole_one(tmp_path, teacher):
    sharded, whole = (step_under(tmp_path, "FSDP2", own, 2, "1.0,1.0", "all", {"bf16": True}) for own in (teacher, ""))
    assert sharded["line"] == whole["line"]
    for name, weight in whole["weights"].items():
        assert torch.equal(sharded["weights"][name], weight), name


@pytest.mark.slow
def test_several_sharded_teachers_of_which_one_reads_other_tokens_teach_as_whole_ones_do(tmp_path):
    folders = []
    for number, own in enumerate(several.new_teachers()):
        folders.append(str(tmp_path / f"teacher{number}"))
        own.save_pretrained(folders[-1])
    found = []
    cases = ((several.step, 8, (), 1), (sharded_run.step_of_several, 4, folders, 2))
    for function, size, given, ranks in cases:
        output = str(tmp_path / f"step{ranks}")
        run = Run(function, tmp_path, output, str(size), "1", *given, ranks=ranks)
        assert run.wait() == [0] * ranks, run.output()
        found.append(torch.load(f"{output}.pt", weights_only=True))
    assert_same_step(found[1], found[0])


SETTINGS = {
    "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "eval_strategy": "steps",
    "eval_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "kd_weight": 0.5,
    "layer_mapping": "uniform:2", "projector_init": "least_squares", "calibration_tokens": 300,
    "max_tokens_per_batch": 40,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_a_run_under_a_sharded_teacher_is_resumed_bit_by_bit(tmp_path, teacher, ranks):
    """Also one that began under a whole teacher, which gives the same states."""

    def finish(name, function, checkpoint=None, **more):
        settings = SETTINGS | more
        return outcomes.finish(tmp_path / name, checkpoint, settings, ranks, function)

    straight = finish("straight", sharded_run.train_under, teacher=teacher)
    whole = finish("whole", sharded_run.train)
    checkpoints = [tmp_path / name / "run" / "checkpoint-2" for name in ("straight", "whole")]
    resumed = finish("resumed", sharded_run.train_under, checkpoints[0], teacher=teacher)
    changed = finish("changed", sharded_run.train_under, checkpoints[1], teacher=teacher)
    for other in (whole, resumed, changed):
        for name in ("weights", "optimizer", "losses", "lines"):
            assert other[name] == straight[name], name
    files = [path.name for path in checkpoints[0].rglob("*")]
    assert sorted(files) == sorted(path.name for path in checkpoints[1].rglob("*"))
    assert not [name for name in files if "teacher" in name]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"teacher_cache_dir": "cache"}])
@pytest.mark.parametrize("run", [sharded_run.run, sharded_run.run_replicated])
def test_a_whole_run_under_a_sharded_teacher_measures_what_one_under_a_whole_one_does(tmp_path, run, changes):
    """The ranks have different numbers of examples to measure, to answer, to calibrate on and to cache."""
    data = str(write_problems(tmp_path / "data.jsonl", 60))
    given = {
        "evaluate_generation": "true", "generation_max_new_tokens": "6", "kd_weight": 0.5, "max_steps": 4,
        "projector_direction": "teacher_to_student", "per_device_eval_batch_size": 1,
    }  # fmt: skip
    found = {}
    for name, function, sharding in (("whole", fault_child.run, "none"), ("sharded", run, "fsdp")):
        folder = tmp_path / name
        folder.mkdir()
        own = {key: str(folder / value) for key, value in changes.items()}
        asked = given | own | {"teacher_sharding": sharding}
        process = Run(function, folder, folder, data, asked, ranks=2)
        assert process.wait(300) == [0, 0], process.output()
        found[name] = json.loads((folder / "out" / "run_summary.json").read_text())
        assert ("Teacher is spread over 2 processes" in process.output()) == (sharding == "fsdp")
    for name in ("teacher", "student_before", "student_after"):
        own, other = (found[kind]["evaluation"][name] for kind in ("sharded", "whole"))
        assert own == pytest.approx(other, rel=1e-3), name
    assert found["sharded"]["final"]["cos_sim"] == pytest.approx(found["whole"]["final"]["cos_sim"], rel=1e-3)
    assert found["sharded"]["evaluation"]["teacher"] == found["whole"]["evaluation"]["teacher"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_sends_what_the_arithmetic_of_docs_says(tmp_path, teacher, precision):
    """The student's blocks twice, its ends once, their gradients in float32, and the teacher once."""
    sent = {}
    for name, folder in (("whole", ""), ("sharded", teacher)):
        output = tmp_path / name
        asked = ("4", "1", "1.0,1.0", "tiny_llama", "all", "", json.dumps({"bf16": precision == "bfloat16"}), folder)
        run = Run(sharded_traffic.step, tmp_path, str(output), *asked, ranks=2)
        assert run.wait() == [0, 0], run.output()
        sent[name] = torch.load(f"{output}-traffic.pt", weights_only=True)
    weights = torch.load(tmp_path / "whole.pt", weights_only=True)["weights"]
    counts = {own: sum(w.numel() for name, w in weights.items() if own in name) for own in (".layers.", "target.")}
    total = sum(own.numel() for own in weights.values())
    blocks, size = counts[".layers."], 4 if precision == "float32" else 2
    assert sent["whole"]["scattered"] == pytest.approx(4 * total, rel=0.02)
    gathered = 2 * size * blocks + 4 * (total - blocks - counts["target."])
    assert gathered <= 1.02 * sent["whole"]["gathered"]
    assert sent["whole"]["gathered"] <= 1.02 * (gathered + 2 * 4 * counts["target."])
    assert sent["sharded"]["scattered"] == sent["whole"]["scattered"]
    read = sum(own.nbytes for own in tiny_teacher().state_dict().values())
    assert sent["sharded"]["gathered"] - sent["whole"]["gathered"] == pytest.approx(read, rel=0.02)
