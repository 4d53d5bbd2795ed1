"""Whole runs in which the states themselves are compared, because student and teacher are equally wide."""

import copy

import pytest
import torch
from datasets import Dataset
from helpers.hashes import weight_hash
from helpers.library import DATA, arguments
from helpers.models import tiny_llama
from helpers.pages import check_page
from helpers.programs import QUICKSTART, SHORT, summary_of, words
from helpers.trainers import loss_lines
from transformers import AutoTokenizer

import run_kava
from kava_trainer import KavaTrainer, load_projectors
from kava_trainer.quickstart import STUDENT_FOLDER

WIDE = 64

INHERITED = {
    "projector_direction": "none", "projector_init": "least_squares", "layer_mapping": "inherited", "kd_weight": 1.0,
    "kd_tokens": "all", "lm_tokens": "all", "mercator_weight": 1.0, "relative_mse_weight": 3.0, "mse_weight": 0.1,
}  # fmt: skip


def cut(teacher, kept):
    """A student of some of the teacher's blocks."""
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers, config.layer_types = len(kept), None
    student = type(teacher)(config)
    state = {name: weight for name, weight in teacher.state_dict().items() if ".layers." not in name}
    for place, block in enumerate(kept):
        own = teacher.model.layers[block].state_dict()
        state |= {f"model.layers.{place}.{name}": weight for name, weight in own.items()}
    student.load_state_dict(state)
    return student


def make(folder, kept, **changes):
    teacher = tiny_llama(WIDE, 4, seed=1)
    return KavaTrainer(
        cut(teacher, kept),
        teacher,
        args=arguments(folder, **{**INHERITED, **changes}),
        inherited_layers=[block + 1 for block in kept],
        train_dataset=Dataset.from_list(DATA),
        eval_dataset=Dataset.from_list(DATA[:7]),
    )


def test_a_copy_of_the_teacher_agrees_with_it_in_everything(tmp_path):
    trainer = make(tmp_path, [0, 1, 2, 3])
    assert trainer.target.pairs == [(1, 1), (2, 2), (3, 3), (4, 4)]
    found = trainer.evaluate()
    assert found["eval_cos_sim"] == pytest.approx(1)
    for term in ("mercator", "relative_mse", "mse", "kd"):
        assert found[f"eval_{term}_loss"] == pytest.approx(0, abs=1e-6), term
    assert found["eval_collapsed"] == 0


def test_what_is_cut_from_the_front_agrees_up_to_the_cut(tmp_path):
    trainer = make(tmp_path, [0, 1, 3])
    assert trainer.target.pairs == [(1, 1), (2, 2), (3, 4)]
    found = trainer.evaluate()
    agreement = [found[f"eval_pair{pair}_cos_sim"] for pair in range(3)]
    assert agreement[:2] == pytest.approx([1, 1])
    assert agreement[2] < 0.999


@pytest.mark.parametrize("packed", [True, False])
def test_a_run_without_projector_resumes_bit_equal_and_leaves_no_projector(tmp_path, packed):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 1}
    settings |= {"lr_scheduler_type": "cosine", "max_tokens_per_batch": 60 if packed else 0}
    straight, resumed = (make(tmp_path / name, [0, 1, 3], **settings) for name in ("straight", "resumed"))
    straight.train()
    assert not list((tmp_path / "straight").glob("*.pth"))
    assert len(load_projectors(tmp_path / "straight" / "checkpoint-2" / "projector.pth")) == 0
    own = {id(weight) for weight in straight.student.parameters()}
    assert {id(weight) for group in straight.optimizer.param_groups for weight in group["params"]} == own
    resumed.train(str(tmp_path / "straight" / "checkpoint-2"))
    assert weight_hash(resumed.model) == weight_hash(straight.model)
    assert loss_lines(resumed) == loss_lines(straight)
    assert loss_lines(straight)[-1]["projector_learning_rate"] == 0


def test_a_checkpoint_of_other_pairs_is_refused(tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make(tmp_path, [0, 1, 3], **settings).train()
    with pytest.raises(Exception, match=r"was trained for .*, this run is for"):
        make(tmp_path / "other", [0, 2, 3], **settings).train(str(tmp_path / "checkpoint-1"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A teacher and a student of the same width, on disk."""
    folder = tmp_path_factory.mktemp("pair")
    tokenizer = AutoTokenizer.from_pretrained(STUDENT_FOLDER)
    for name, layers in (("teacher", 3), ("student", 2)):
        model = tiny_llama(WIDE, layers, seed=layers)
        model.config.max_position_embeddings = 256
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    names = {role: str(folder / role) for role in ("teacher", "student")}
    return {f"{role}_model_name_or_path": name for role, name in names.items()}


@pytest.mark.report
@pytest.mark.parametrize("cached", [True, False])
def test_the_program_runs_without_a_projector(tmp_path, pair, capsys, cached):
    out = tmp_path / "out"
    out.mkdir()
    (out / "final_projector.pth").write_bytes(b"of an earlier run")
    asked = {**QUICKSTART, **SHORT, **INHERITED, **pair, "layer_mapping": "all", "output_dir": out, "save_steps": 2}
    asked |= {"max_length": 128, "run_control": True, "save_strategy": "steps"}
    asked |= {"teacher_cache_dir": tmp_path / "cache"} if cached else {}
    assert run_kava.main(words(asked)) == 0
    shown = capsys.readouterr().out
    assert "Projector: none, both sides are 64 wide\n" in shown
    assert "Projector: there is none\n" in shown
    assert "Loss terms: mercator 1, mse 0.1, relative_mse 3, lm 1, kd 1\n" in shown
    assert not list(out.glob("*.pth"))
    summary = summary_of(out)
    assert summary["final"]["cka"] is not None
    assert set(summary["final_checksums"]) == {"final_student/model.safetensors"}
    check_page((out / "report.html").read_text(encoding="utf-8"), summary)
    card = (out / "final_student" / "README.md").read_text(encoding="utf-8")
    assert "projector: none" in card
    assert "through a projector" not in card
    assert run_kava.main(words({**asked, "resume_from_checkpoint": True})) == 0
    assert torch.load(out / "checkpoint-2" / "projector.pth", weights_only=True)["use"]["direction"] == "none"
