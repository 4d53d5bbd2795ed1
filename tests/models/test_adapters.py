import json

import pytest
import torch
from helpers.models import tiny_llama, tiny_model
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from kava_trainer.config.model_arguments import ModelArguments
from kava_trainer.distillation.teacher_cache import weights_digest
from kava_trainer.models.loading import load_config, load_tokenizer
from kava_trainer.models.student import load_student
from kava_trainer.models.teacher import load_teacher
from kava_trainer.quickstart import STUDENT_FOLDER
from kava_trainer.utils.errors import BadRequest

IDS = torch.arange(5, 25).unsqueeze(0)


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    tiny_model(folder)
    return folder


def adapter_of(base, folder, **changes):
    """A saved adapter that says something, and the logits with it."""
    options = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"], **changes}
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**options)).eval()
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    adapted.save_pretrained(folder)
    return adapted(IDS).logits.detach()


def change(folder, **values):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_a_teacher_that_is_an_adapter_gives_the_logits_of_the_adapted_model(base, tmp_path, changes):
    logits = adapter_of(base, tmp_path / "adapter", **changes)
    teacher = load_teacher(ModelArguments(str(tmp_path / "adapter")), torch.device("cpu"))
    torch.testing.assert_close(teacher(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(AutoModelForCausalLM.from_pretrained(base)(IDS).logits, logits, atol=0.01)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize("use_peft", [False, True])
def test_a_student_that_is_an_adapter_goes_on_from_the_adapted_model(base, tmp_path, use_peft):
    logits = adapter_of(base, tmp_path / "adapter")
    arguments = ModelArguments(
        "quickstart", student_model_name_or_path=str(tmp_path / "adapter"), use_peft=use_peft, lora_dropout=0.0
    )
    student = load_student(arguments, tiny_llama(32, 2))
    torch.testing.assert_close(student(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    trained = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name for name in trained) == use_peft


def test_a_quantised_teacher_keeps_its_adapter_beside_its_weights(base, tmp_path):
    pytest.importorskip("bitsandbytes")
    logits = adapter_of(base, tmp_path / "adapter")
    teacher = load_teacher(ModelArguments(str(tmp_path / "adapter"), teacher_quantization="8bit"), torch.device("cpu"))
    assert (teacher(IDS).logits - logits).norm() < 0.05 * logits.norm()


def test_config_and_tokenizer_are_those_beneath_an_adapter_that_has_none(base, tmp_path):
    adapter_of(base, tmp_path / "adapter")
    arguments = ModelArguments("quickstart")
    assert load_config(str(tmp_path / "adapter"), "teacher", None, arguments).hidden_size == 32
    assert load_tokenizer(str(tmp_path / "adapter"), "teacher", None, arguments).get_vocab()
    own = AutoTokenizer.from_pretrained(STUDENT_FOLDER)
    own.add_tokens(["<own>"])
    own.save_pretrained(tmp_path / "adapter")
    assert "<own>" in load_tokenizer(str(tmp_path / "adapter"), "teacher", None, arguments).get_vocab()


@pytest.mark.parametrize(
    ("mishap", "told"),
    [
        (lambda f: change(f, base_model_name_or_path=None), "does not name the model beneath it"),
        (lambda f: change(f, base_model_name_or_path="/no/where/base"), "names /no/where/base, which does not exist"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "an adapter without its adapter_model.safetensors"),
    ],
)
def test_an_adapter_that_cannot_be_loaded_is_told_in_one_sentence(base, tmp_path, mishap, told):
    adapter_of(base, tmp_path / "adapter")
    mishap(tmp_path / "adapter")
    with pytest.raises(BadRequest, match=told):
        load_teacher(ModelArguments(str(tmp_path / "adapter")), torch.device("cpu"))


def test_an_adapter_that_learns_a_prompt_is_refused(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(model, prompt).save_pretrained(tmp_path / "adapter")
    with pytest.raises(BadRequest, match="an adapter of kind PROMPT_TUNING"):
        load_teacher(ModelArguments(str(tmp_path / "adapter")), torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"merge_adapter": False}, "nobody could load what merge_adapter false exports"),
        ({"student_quantization": "8bit"}, "quantised weights take none"),
    ],
)
def test_a_student_that_could_not_be_merged_is_refused_before_it_is_loaded(base, tmp_path, changes, told):
    pytest.importorskip("bitsandbytes")
    adapter_of(base, tmp_path / "adapter")
    arguments = ModelArguments(
        "quickstart", student_model_name_or_path=str(tmp_path / "adapter"), use_peft=True, **changes
    )
    with pytest.raises(BadRequest, match=told):
        load_student(arguments, tiny_llama(32, 2))


def test_another_model_beneath_an_adapter_is_another_teacher(base, tmp_path):
    adapter_of(base, tmp_path / "adapter")
    before = weights_digest(tmp_path / "adapter")
    tiny_llama(32, 2, seed=5).save_pretrained(base)
    assert weights_digest(tmp_path / "adapter") != before


def test_a_folder_without_a_tokenizer_and_one_that_lacks_weights_are_refused(tmp_path):
    arguments, model = ModelArguments(str(tmp_path)), tiny_llama(32, 2)
    model.save_pretrained(tmp_path)
    with pytest.raises(BadRequest, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path), "teacher", None, arguments)
    weights = {name: weight for name, weight in model.state_dict().items() if "layers.1" not in name}
    model.save_pretrained(tmp_path, state_dict={n: w for n, w in weights.items() if n != "lm_head.weight"})
    with pytest.raises(BadRequest, match=r"layers.1\S* and \d+ more of its weights are missing, and would be random"):
        load_teacher(arguments, torch.device("cpu"))
