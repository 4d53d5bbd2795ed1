"""A run with a student that is cut out of its teacher: chosen once, told, and the same for control and resumed run."""

import json

import pytest
import torch
from helpers.places import ROOT
from helpers.programs import SHORT, summary_of, words
from transformers import AutoModelForCausalLM

import run_kava
from kava_trainer import cli
from kava_trainer.config.arguments import KavaArguments, KavaTrainingArguments
from kava_trainer.config.data_arguments import DataArguments
from kava_trainer.config.model_arguments import ModelArguments
from kava_trainer.data.collators import DistillationCollator
from kava_trainer.models.pruning import cut as cutting
from kava_trainer.models.pruning.skipping import skipped
from kava_trainer.quickstart import TEACHER_FOLDER
from kava_trainer.reports.page import report_page
from kava_trainer.reports.recipe import recipe_of
from kava_trainer.reports.run_reader import read_run
from kava_trainer.runs.pair import choice
from kava_trainer.runs.pair.choice import calibration_batches, earlier_cut
from kava_trainer.trainer.trainer import KavaTrainer
from kava_trainer.utils.errors import BadRequest


@pytest.fixture
def starts(monkeypatch):
    """The weights that each trainer started from, in the order in which the trainers were made."""
    seen, original = [], KavaTrainer.train

    def train(self, *args, **kwargs):
        seen.append({name: p.detach().clone() for name, p in self.student.named_parameters()})
        return original(self, *args, **kwargs)

    monkeypatch.setattr(KavaTrainer, "train", train)
    return seen


@pytest.fixture
def searches(monkeypatch):
    """How often a search was made."""
    seen, original = [], cutting.search_layers

    def search(*args, **kwargs):
        seen.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(cutting, "search_layers", search)
    return seen


def arguments_file(folder, **changes):
    recipe = json.loads((ROOT / "training_args" / "quickstart.json").read_text())
    del recipe["student_model_name_or_path"]
    path = folder / "cut.json"
    path.write_text(json.dumps(recipe | {"layer_mapping": "last"} | changes))
    return str(path)


def run(folder, *more, **changes):
    options = {**SHORT, "max_steps": 2, "save_steps": 1, "output_dir": folder / "out", "run_control": False}
    return run_kava.main([arguments_file(folder, **changes), *words(options), *more])


def test_a_cut_run_has_one_choice_for_student_control_resume_report_and_recipe(tmp_path, starts, searches, capsys):
    asked = {"student_num_layers": 2, "student_intermediate_size": 96}
    assert run(tmp_path, "--run_control", "true", **asked) == 0
    shown, summary = capsys.readouterr().out, summary_of(tmp_path / "out")
    main, control = starts
    assert all(torch.equal(main[name], control[name]) for name in main)
    assert len(searches) == 1
    cut = summary["cut"]
    assert cut["method"] == "search"
    assert len(cut["kept"]) == 2
    assert len(cut["importance"]) == cut["teacher_layers"] == 4
    assert cut["neurons_of_a_layer"] == 96
    assert "Student: 2 of the teacher's 4 layers (those were left out, one by one" in shown
    assert f"left out as number 2: loss {cut['removals'][1]['loss']:.3f}" in shown
    page = report_page(read_run(tmp_path / "out"))
    assert "What the student was made of" in page
    assert f"left out as number 1: loss {cut['removals'][0]['loss']:.3f}" in page
    assert "2 of its 4 layers" in page
    finished = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final_student")
    assert (finished.config.num_hidden_layers, finished.config.intermediate_size) == (2, 96)
    recipe = recipe_of(read_run(tmp_path / "out").summary)
    assert {name: recipe[name] for name in asked} == asked
    assert "student_init" not in recipe
    capsys.readouterr()
    assert run(tmp_path, "--max_steps", "3", "--resume_from_checkpoint", "true", **asked) == 0
    assert len(searches) == 1
    assert summary_of(tmp_path / "out")["cut"] == cut
    capsys.readouterr()
    assert run(tmp_path, "--resume_from_checkpoint", "true", **asked | {"student_num_layers": 3}) == 2
    assert "student_num_layers was 2, is 3" in capsys.readouterr().err
    assert cli.main(["evaluate", str(tmp_path / "out")]) == 0
    assert len(searches) == 1


def test_an_earlier_checkpoint_without_a_choice_is_of_evenly_spaced_layers(tmp_path, monkeypatch):
    asked = arguments(tmp_path, student_num_layers=2)
    monkeypatch.setattr(choice, "read_manifest", lambda folder: {"run": {"seed": 1}})
    found = earlier_cut(tmp_path, asked)
    assert (found.method, found.kept) == ("uniform", [0, 3])
    monkeypatch.setattr(choice, "read_manifest", lambda folder: {"run": {"cut": found.to_dict()}})
    assert earlier_cut(tmp_path, asked) == found
    assert earlier_cut(None, asked) is None


def arguments(folder, **model):
    training = KavaTrainingArguments(output_dir=str(folder), use_cpu=True)
    data = DataArguments(dataset_name="quickstart", max_length=128)
    return KavaArguments(ModelArguments("quickstart", **model), data, training)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"student_num_layers": 9}, "student_num_layers asks for 9 layers, but the teacher"),
        ({"student_layers": [0, 7]}, "student_layers names block 7, but the teacher has the blocks 0 to 3"),
        ({"student_num_attention_heads": 3, "student_num_layers": 2}, "student_num_attention_heads is 3"),
        ({"student_intermediate_size": 9999}, "student_intermediate_size is 9999"),
    ],
)  # fmt: skip
def test_what_the_teacher_does_not_have_is_refused_by_the_run_and_by_doctor(tmp_path, capsys, changes, told):
    assert run(tmp_path, **changes) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli.main(["doctor", arguments_file(tmp_path, **changes), "--output_dir", str(tmp_path / "out")]) != 0
    assert told in capsys.readouterr().out


def test_a_student_as_large_as_its_teacher_is_told_so(tmp_path, searches, capsys):
    assert run(tmp_path, student_num_layers=4) == 0
    shown = capsys.readouterr().out
    assert "Nothing of the teacher is left out: the student is as large as it is (4 layers)." in shown
    assert not searches
    assert summary_of(tmp_path / "out")["cut"]["method"] == "all"


def test_a_list_of_layers_needs_no_text_and_starts_as_the_teacher_without_the_others(tmp_path, starts, searches):
    assert run(tmp_path, student_layers=[0, 3]) == 0
    assert not searches
    teacher = AutoModelForCausalLM.from_pretrained(TEACHER_FOLDER)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final_student")
    student.load_state_dict(starts[0], strict=False)
    ids = torch.arange(1, 20).unsqueeze(0)
    with torch.no_grad(), skipped(teacher, [1, 2]):
        torch.testing.assert_close(student.eval()(ids).logits, teacher.eval()(ids).logits)


def test_the_text_is_drawn_with_the_seed_and_comes_in_small_batches():
    examples = [{"input_ids": [1] * length, "labels": [1] * length} for length in range(2, 40)]

    class Rows(list):
        def shuffle(self, seed):
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
            return [self[place] for place in order]

    def lengths(seed):
        batches = calibration_batches(Rows(examples), DistillationCollator(), 200, seed, 4)
        return [batch["attention_mask"].sum(1).tolist() for batch in batches]

    assert lengths(1) == lengths(1) != lengths(2)
    flat = [length for batch in lengths(1) for length in batch]
    assert flat == sorted(flat)
    assert 200 <= sum(flat) < 240
    assert max(len(batch) for batch in lengths(1)) <= 4


def test_cut_student_in_a_script():
    from helpers.models import tiny_llama

    from kava_trainer import cut_student

    teacher = tiny_llama(32, 5)
    rows = [{"input_ids": list(range(1, 30 + n)), "labels": list(range(1, 30 + n))} for n in range(6)]
    student, cut = cut_student(teacher, 3, rows)
    assert (student.config.num_hidden_layers, cut.method, len(cut.kept)) == (3, "search", 3)
    assert cut_student(teacher, 3, rows)[1] == cut
    assert cut_student(teacher, layers=[1, 2], dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    narrow, cut = cut_student(teacher, 2, rows, layers="uniform", intermediate_size=20, importance="block_influence")
    assert (cut.kept, narrow.config.intermediate_size) == ([0, 4], 20)
    with pytest.raises(BadRequest, match="give cut_student examples"):
        cut_student(teacher, 3)
    with pytest.raises(BadRequest, match="student_num_layers asks for 6 layers"):
        cut_student(teacher, 6, rows)
    with pytest.raises(BadRequest, match="write each block once"):
        cut_student(teacher, layers=[2, 1])
