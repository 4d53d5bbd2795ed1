import pytest
import torch
from helpers.models import tiny_llama
from torch.utils._pytree import tree_leaves

from kava_trainer.config.model_arguments import ModelArguments
from kava_trainer.distillation.model import DistillationModel, StudentOutput
from kava_trainer.distillation.projector import ProjectorConfig
from kava_trainer.distillation.targets import AlignedStates, HiddenStateTarget
from kava_trainer.models.student import load_student
from kava_trainer.quickstart import STUDENT_FOLDER, TEACHER_FOLDER


def load(**changes):
    seed, teacher = changes.pop("seed", 0), tiny_llama(32, 2)
    torch.manual_seed(seed)
    return load_student(ModelArguments(teacher_model_name_or_path="quickstart", **changes), teacher)


def weights(model):
    return torch.cat([parameter.flatten() for parameter in model.parameters()])


def test_the_quickstart_student_is_random_and_small():
    student = load(student_model_name_or_path="quickstart")
    assert student.num_parameters() * 4 <= load(student_model_name_or_path=str(TEACHER_FOLDER)).num_parameters()
    assert not torch.equal(weights(student), weights(load(student_model_name_or_path="quickstart", seed=1)))
    assert torch.equal(weights(student), weights(load(student_model_name_or_path="quickstart")))


def test_a_student_keeps_its_weights_or_starts_from_random_ones():
    kept = load(student_model_name_or_path=str(TEACHER_FOLDER))
    random = load(student_model_name_or_path=str(TEACHER_FOLDER), student_init="random")
    assert torch.equal(weights(kept), weights(load(student_model_name_or_path=str(TEACHER_FOLDER), seed=5)))
    assert weights(kept).shape == weights(random).shape
    assert not torch.equal(weights(kept), weights(random))
    assert kept.training
    assert random.training


@pytest.mark.parametrize(("name", "dtype"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_data_type_is_the_one_asked_for(name, dtype):
    for source in ({"student_config_name": str(STUDENT_FOLDER)}, {"student_model_name_or_path": str(TEACHER_FOLDER)}):
        assert load(student_dtype=name, **source).dtype == dtype


def test_float16_weights_are_trained_in_float32(tmp_path):
    tiny_llama(32, 2).half().save_pretrained(tmp_path)
    assert load(student_model_name_or_path=str(tmp_path)).dtype == torch.float32


def test_the_distillation_model_behaves_as_the_student():
    student = tiny_llama(32, 2)
    model = DistillationModel(student, HiddenStateTarget([(2, 2)], ProjectorConfig(64, 32), 1.0, 0.01))
    assert model.config is student.config
    assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=2).shape == (1, 4)
    with pytest.raises(AttributeError, match="no_such_attribute"):
        _ = model.no_such_attribute
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert names == {"student", "target"}
    output = model(torch.tensor([[1, 2, 3]]), teacher_states={2: torch.randn(1, 3, 64)}, distils=True)
    assert output.pairs[0].target.shape == output.hidden_states[2].shape == (1, 3, 32)
    assert output.last_hidden_state is output.hidden_states[2]
    assert model.head(output.last_hidden_state).shape == (1, 3, 512)
    assert output.logits_sums == {}


def test_the_output_is_a_tree_to_torch_so_that_fsdp2_finds_its_tensors():
    """Torch 2.11 looks for them with this; the backward pass of sharded weights crashed where it found none."""
    tensors = [torch.zeros(1), torch.ones(1), torch.ones(2), torch.ones(3), torch.ones(4), torch.ones(5)]
    output = StudentOutput(
        tensors[0], {1: tensors[1]}, [AlignedStates(tensors[2], tensors[3])], tensors[4], {"lm": tensors[5]}
    )
    leaves = [leaf for leaf in tree_leaves(output) if leaf is not None]
    assert [id(leaf) for leaf in leaves] == [id(tensor) for tensor in tensors]
