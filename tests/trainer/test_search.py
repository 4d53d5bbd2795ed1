"""Hyperparameter search: every trial has a new student and new projectors, and its arguments take effect."""

import pytest
import torch
from helpers.library import EVERY_STEP, changed, make, new_student, weights

from kava_trainer import build_target
from kava_trainer.distillation.projector_files import load_projectors

optuna = pytest.importorskip("optuna")
SPACE = {
    "learning_rate": [1e-3, 1e-2],
    "projector_learning_rate": [3e-3, 3e-2],
    "mercator_weight": [1.0, 2.0],
    "layer_mapping": ["last", "uniform:2"],
}


@pytest.fixture(autouse=True)
def _quiet():
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def count_hooks(trainer):
    return sum(len(module._forward_hooks) for module in trainer.teacher.model.modules())


def search(trainer, points):
    """One trial for each point of the space."""
    rows = [{name: SPACE[name][index] for name in SPACE} for index in points]
    study = {"sampler": optuna.samplers.GridSampler({"row": range(len(rows))}, seed=0)}

    def space(trial):
        return rows[trial.suggest_categorical("row", list(range(len(rows))))]

    return trainer.hyperparameter_search(
        space, lambda metrics: metrics["eval_lm_loss"], len(rows), "minimize", "optuna", **study
    )


class Watched:
    """Keeps what every trial began and ended with."""

    def __init__(self, trainer):
        self.begun, self.lines = [], []
        self._train = trainer.train
        trainer.train = self._record
        self.trainer = trainer
        ready = trainer._make_ready

        def record_ready():
            self.begun.append((trainer.args.layer_mapping, weights(trainer)))
            ready()

        trainer._make_ready = record_ready

    def _record(self, *args, **kwargs):
        output = self._train(*args, **kwargs)
        groups = [{**group, "params": None} for group in self.trainer.optimizer.param_groups if group["params"]]
        logged = [line for line in self.trainer.state.log_history if "loss" in line]
        self.lines.append({"groups": groups, "log": logged, "changed": changed(self.trainer, self.begun[-1][1])})
        return output


def test_each_trial_begins_anew_with_arguments_of_its_own(tmp_path, tokenizer):
    seen = []

    def model_init(trial):
        seen.append(trial and trial.number)
        return new_student()

    settings = {**EVERY_STEP, "lr_scheduler_type": "constant", "projector_init": "least_squares"}
    trainer = make(tmp_path, tokenizer, {"model_init": model_init}, calibration_tokens=200, **settings)
    hooks = count_hooks(trainer)
    watched = Watched(trainer)
    best = search(trainer, [0, 1, 0])
    assert seen == [None, 0, 1, 2]
    assert best.run_id in "012"
    for (mapping, begun), found in zip(watched.begun, watched.lines, strict=True):
        index = SPACE["layer_mapping"].index(mapping)
        expected = {SPACE["learning_rate"][index], SPACE["projector_learning_rate"][index]}
        assert {group["lr"] for group in found["groups"]} == expected
        assert len({name.split(".")[2] for name in begun if name.startswith("target.projectors.")}) == 1 + index
        assert found["changed"] == begun.keys()
        for line in found["log"]:
            ratio = line["mercator_weighted"] / line["mercator_loss"]
            assert ratio == pytest.approx(SPACE["mercator_weight"][index], rel=1e-4)
    by_index = {}
    for (mapping, begun), found in zip(watched.begun, watched.lines, strict=True):
        by_index.setdefault(mapping, []).append((begun, [line["loss"] for line in found["log"]]))
    (first, losses), (again, same_losses) = by_index["last"]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert losses == same_losses
    folders = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert folders == ["run-0", "run-1", "run-2"]
    for folder in folders:
        assert load_projectors(tmp_path / folder / "proj_step_2.pth") is not None
        assert (tmp_path / folder / "checkpoint-2" / "model.safetensors").exists()
    assert not list(tmp_path.glob("proj_step_*"))
    trainer.train()  # the last trial's arguments, again from a new student
    assert count_hooks(trainer) == hooks


def test_a_target_passed_in_is_the_start_of_every_training(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, {"model_init": new_student})
    target = build_target(trainer.args, new_student(), trainer.teacher.model)
    before = [parameter.clone() for parameter in target.parameters()]
    given = {"model_init": new_student, "target": target, "eval_dataset": None}
    trainer = make(tmp_path, tokenizer, given)
    losses = []
    for _ in range(2):
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
        ended = list(trainer.target.parameters())
        assert all(not torch.equal(old, new) for old, new in zip(before, ended, strict=True))
    assert losses[0] == losses[1]
    assert all(torch.equal(old, new) for old, new in zip(before, target.parameters(), strict=True))


def test_a_pruned_trial_leaves_the_search_going(tmp_path, tokenizer):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    trainer = make(tmp_path, tokenizer, {"model_init": new_student}, **settings)
    pruner = optuna.pruners.ThresholdPruner(upper=0.0)
    studies = []

    def space(trial):
        studies.append(trial.study)
        return {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2)}

    with pytest.raises(ValueError, match="No trials are completed"):
        trainer.hyperparameter_search(space, n_trials=2, backend="optuna", pruner=pruner)
    assert [trial.state.name for trial in studies[0].trials] == ["PRUNED", "PRUNED"]
    trainer.train()
    assert trainer.state.global_step == 3


def test_without_model_init_trainers_own_sentence_is_raised(tmp_path, tokenizer):
    with pytest.raises(RuntimeError, match="you need to pass your model through a model_init function"):
        make(tmp_path, tokenizer).hyperparameter_search(backend="optuna")


def test_optimizers_do_not_go_with_model_init(tmp_path, tokenizer):
    optimizer = torch.optim.SGD(new_student().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="give optimizer_cls_and_kwargs"):
        make(tmp_path, tokenizer, {"model_init": new_student, "optimizers": (optimizer, None)})
