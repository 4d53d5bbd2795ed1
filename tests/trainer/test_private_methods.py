"""What KAVA overrides, calls or reads of Trainer's private parts is still there, with the parameters that it had."""

import inspect

import pytest
from transformers import Trainer

from kava_trainer.trainer.saving import SavingTrainer
from kava_trainer.trainer.student_trainer import StudentTrainer
from kava_trainer.trainer.trainer import KavaTrainer

OVERRIDDEN = {
    "_load_best_model": [],
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
    "_maybe_log_save_evaluate": [
        "tr_loss", "grad_norm", "model", "trial", "epoch", "ignore_keys_for_eval", "start_time", "learning_rate",
    ],
    "_save_checkpoint": ["model", "trial"],
}  # fmt: skip
CALLED = {
    "_determine_best_metric": ["metrics", "trial"],
    "_evaluate": ["trial", "ignore_keys_for_eval", "skip_scheduler"],
    "_get_output_dir": ["trial"],
    "_hp_search_setup": ["trial"],
    "_prepare_inputs": ["inputs"],
    "_save_optimizer_and_scheduler": ["output_dir"],
    "_save_rng_state": ["output_dir"],
    "_save_scaler": ["output_dir"],
}
READ = ["_globalstep_last_logged", "_total_loss_scalar", "_tr_loss", "_trial", "_train_batch_size"]


@pytest.mark.parametrize(("name", "parameters"), [*OVERRIDDEN.items(), *CALLED.items()])
def test_trainer_has_the_method_and_its_parameters(name, parameters):
    assert list(inspect.signature(getattr(Trainer, name)).parameters)[1:] == parameters


@pytest.mark.parametrize("name", READ)
def test_trainer_sets_the_attribute(name):
    assert f"self.{name} = " in inspect.getsource(Trainer)


def test_no_other_private_method_is_overridden():
    own = {name for kind in KavaTrainer.__mro__[: KavaTrainer.__mro__.index(Trainer)] for name in vars(kind)}
    shared = {name for name in own if name.startswith("_") and not name.startswith("__") and hasattr(Trainer, name)}
    assert shared == set(OVERRIDDEN)
    assert shared <= set(vars(SavingTrainer))


def test_two_classes_stand_between_trainer_and_kava_trainer():
    assert KavaTrainer.__mro__[: KavaTrainer.__mro__.index(Trainer)] == (KavaTrainer, StudentTrainer, SavingTrainer)
