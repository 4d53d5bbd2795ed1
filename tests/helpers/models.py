"""Models that are tiny, in memory and on disk."""

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from kava_trainer.config.model_arguments import ModelArguments
from kava_trainer.models.lora import add_adapter
from kava_trainer.quickstart import STUDENT_FOLDER

TEACHER_SIZE, STUDENT_SIZE, TEACHER_LAYERS, STUDENT_LAYERS = 64, 32, 4, 2

LORA = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


def tiny_sizes(hidden_size: int, layers: int) -> dict:
    return {
        "vocab_size": 512,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }


def tiny_llama(hidden_size: int, layers: int, seed: int = 0, tie: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**tiny_sizes(hidden_size, layers), tie_word_embeddings=tie))


def tiny_qwen(hidden_size: int, layers: int, seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(**tiny_sizes(hidden_size, layers)))


def tiny_lora_llama(hidden_size: int, layers: int, seed: int = 0, tie: bool = True, **changes) -> LlamaForCausalLM:
    student = tiny_llama(hidden_size, layers, seed, tie)
    options = {**LORA, "student_model_name_or_path": "some/student", **changes}
    add_adapter(student, ModelArguments("teacher", use_peft=True, **options))
    return student


def lora_llama_of_rank_1(*sizes, seed):
    """Half of its adapters' weights have one row, which all ranks but one have no part of."""
    return tiny_lora_llama(*sizes, seed=seed, lora_r=1)


def lora_llama_with_a_trained_head(hidden_size: int, layers: int, seed: int = 0) -> LlamaForCausalLM:
    """Adapters in float32 on weights in bfloat16, of which the head is trained."""
    student = tiny_llama(hidden_size, layers, seed, tie=False).bfloat16()
    options = {**LORA, "lora_modules_to_save": ["lm_head"], "student_model_name_or_path": "some/student"}
    add_adapter(student, ModelArguments("teacher", use_peft=True, **options))
    return student


def llama_as_wide_as_the_teacher(width, layers, seed):
    return tiny_llama(TEACHER_SIZE, layers, seed=seed)


def bfloat16_llama(*sizes, seed):
    return tiny_llama(*sizes, seed=seed).bfloat16()


def tiny_model(folder, **files):
    """A student with weights and tokenizer whose files are then replaced; None deletes one."""
    tiny_llama(STUDENT_SIZE, 2).save_pretrained(folder)
    AutoTokenizer.from_pretrained(STUDENT_FOLDER).save_pretrained(folder)
    for name, content in files.items():
        name = name.replace("_json", ".json").replace("_safetensors", ".safetensors")
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    return folder


SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def model_of(kind, attention="sdpa", **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for parameter in model.parameters():  # far from the start, where all examples look alike
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()
