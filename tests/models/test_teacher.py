import pytest
import torch
import torch.nn.functional as F
from helpers.models import tiny_llama

from kava_trainer.config.model_arguments import ModelArguments
from kava_trainer.models.teacher import OnlineTeacher, load_teacher, quantization_config
from kava_trainer.utils.errors import BadRequest


def test_states_are_detached_frozen_and_those_of_transformers():
    model = tiny_llama(32, 3).train()
    teacher = OnlineTeacher(model, [1, 3])
    ids = torch.tensor([[5, 6, 7]])
    states = teacher.features({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    expected = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert sorted(states) == [1, 3]
    for layer, state in states.items():
        assert torch.equal(state, expected[layer])
        assert not state.requires_grad
        assert not state.is_inference()
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert (teacher.hidden_size, teacher.num_layers) == (32, 3)


def test_the_vocabulary_head_does_not_run():
    model = tiny_llama(32, 2, tie=False)
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head ran"))
    ids = torch.tensor([[5, 6, 7]])
    OnlineTeacher(model, [2]).features({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def test_quantisation_is_nf4_with_double_quantisation_and_bf16_compute():
    pytest.importorskip("bitsandbytes")
    config = quantization_config("4bit")
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert quantization_config("8bit").load_in_8bit
    assert quantization_config("none") is None


def test_a_teacher_is_loaded_in_the_type_asked_for_and_a_missing_one_refused():
    arguments = ModelArguments(teacher_model_name_or_path="quickstart", teacher_dtype="bfloat16")
    teacher = load_teacher(arguments, torch.device("cpu"))
    assert teacher.dtype == torch.bfloat16
    assert not teacher.training
    with pytest.raises(BadRequest, match="The teacher 'nobody/nothing' cannot be loaded"):
        load_teacher(ModelArguments(teacher_model_name_or_path="nobody/nothing"), torch.device("cpu"))


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
@pytest.mark.parametrize("width", [36, 64, 100])
def test_a_quantised_teacher_runs_on_the_cpu_whatever_its_widths_are(tmp_path, quantization, width):
    pytest.importorskip("bitsandbytes")
    tiny_llama(width, 2).save_pretrained(tmp_path)
    ids = torch.arange(1, 41).view(2, 20)
    states = []
    for kind in ("none", quantization):
        arguments = ModelArguments(teacher_model_name_or_path=str(tmp_path), teacher_quantization=kind)
        teacher = OnlineTeacher(load_teacher(arguments, torch.device("cpu")), [2])
        states.append(teacher.features({"input_ids": ids, "attention_mask": torch.ones_like(ids)})[2])
    least, most = {"4bit": (0.95, 0.9999), "8bit": (0.999, 0.999999)}[quantization]
    assert least < F.cosine_similarity(*states, dim=-1).mean() < most
