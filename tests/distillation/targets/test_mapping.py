import itertools

import pytest
import torch
from datasets import Dataset
from helpers.data import random_examples
from helpers.library import arguments, make
from helpers.models import tiny_llama

from kava_trainer.data.collators import DistillationCollator
from kava_trainer.distillation.targets.mapping import (
    LayerChoice,
    LayerChooser,
    choose_layers,
    cka_of_layers,
    kept_layers,
    monotone_path,
)
from kava_trainer.evaluation.diagnostics import linear_cka
from kava_trainer.utils.errors import BadRequest


@pytest.mark.parametrize("seed", range(5))
def test_the_path_is_the_best_of_all_that_never_go_back(seed):
    scores = torch.rand(4, 5, generator=torch.Generator().manual_seed(seed))
    every = (path for path in itertools.product(range(5), repeat=4) if list(path) == sorted(path))
    best = max(every, key=lambda path: sum(scores[row, place].item() for row, place in enumerate(path)))
    assert monotone_path(scores) == list(best)


def test_order_wins_over_the_highest_of_each_row():
    scores = torch.tensor([[0.1, 0.3, 0.9], [0.8, 0.7, 0.0]])
    assert monotone_path(scores) == [1, 1]
    assert monotone_path(scores[:1]) == [2]


def test_the_measure_is_linear_cka_of_any_widths():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        [torch.randn(30, width, generator=generator) for width in widths] for widths in ((4, 6), (8, 8, 9))
    )
    found = cka_of_layers(student, teacher)
    for row, own in enumerate(student):
        for place, other in enumerate(teacher):
            assert found[row, place].item() == pytest.approx(linear_cka(own, other), rel=1e-4)


def test_a_student_of_some_of_the_teachers_blocks_finds_them(tokenizer):
    teacher, student = tiny_llama(64, 4, seed=1), tiny_llama(64, 2, seed=2)
    for weight in teacher.parameters():  # far from the start, where all layers are alike
        torch.nn.init.normal_(weight, std=0.3) if weight.ndim > 1 else None
    state = {name: weight for name, weight in teacher.state_dict().items() if ".layers." not in name}
    for place in (0, 1):
        own = teacher.model.layers[place].state_dict()
        state |= {f"model.layers.{place}.{name}": weight for name, weight in own.items()}
    student.load_state_dict(state)
    student.train()
    found = choose_layers(student, teacher, random_examples(8), DistillationCollator(tokenizer), 3)
    assert found.layers == [1, 2]
    assert found.cka[0] == pytest.approx(1, abs=1e-4)
    assert student.training
    assert list(found.lines())[2].split() == ["1", "1", "1.0000"]


def test_a_trainer_chooses_once_and_its_checkpoints_keep_the_choice(tmp_path, tokenizer, capsys):
    settings = {"layer_mapping": "cka", "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    straight = make(tmp_path / "straight", tokenizer, **settings)
    assert "Student   Teacher      CKA" in capsys.readouterr().out
    layers = [teacher for _, teacher in straight.target.pairs]
    assert layers == sorted(layers)
    assert [own for own, _ in straight.target.pairs] == [1, 2]
    straight.train()
    file = tmp_path / "straight" / "checkpoint-1" / "projector.pth"
    assert kept_layers(file) == layers
    again = make(tmp_path / "again", tokenizer, given={"inherited_layers": kept_layers(file)}, **settings)
    assert "CKA" not in capsys.readouterr().out.split("Loss")[0].replace("alignment", "")
    again.train(str(file.parent))
    assert again.state.global_step == 2
    assert again.target.pairs == straight.target.pairs


def test_a_run_without_alignment_chooses_nothing(tmp_path, tokenizer, capsys):
    make(tmp_path, tokenizer, layer_mapping="cka", mercator_weight=0.0)
    assert "Student   Teacher" not in capsys.readouterr().out


def test_without_examples_there_is_nothing_to_choose_by(tmp_path, tokenizer):
    chooser = LayerChooser(arguments(tmp_path, layer_mapping="cka"), None, DistillationCollator(tokenizer))
    with pytest.raises(BadRequest, match="give a train_dataset"):
        chooser(tiny_llama(32, 2), tiny_llama(64, 4))


def test_the_same_examples_give_the_same_choice(tmp_path, tokenizer):
    models = tiny_llama(32, 2, seed=2), tiny_llama(64, 4, seed=1)
    data = Dataset.from_list(random_examples(12))
    chooser = LayerChooser(arguments(tmp_path, layer_mapping="cka"), data, DistillationCollator(tokenizer))
    assert chooser(*models) == chooser(*models)


def test_the_table_has_a_line_for_each_layer():
    assert len(list(LayerChoice([1, 3], [0.5, 0.25]).lines())) == 4
