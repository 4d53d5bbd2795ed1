"""One tiny model of each family that is tried out as teacher and as student, with random weights."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

VOCABULARY, WIDTH, LAYERS, HEADS, WINDOW = 64, 32, 3, 4, 5
"""Of every family; `WINDOW` is that of the families with sliding attention, shorter than most examples."""

FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {}
"""The families by name; each makes a model of a width, of `WIDTH` by default."""

TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}


def family(make: Callable[..., PreTrainedModel]) -> Callable[..., PreTrainedModel]:
    FAMILIES[make.__name__] = make
    return make


def sizes(width: int, **more: Any) -> dict[str, Any]:
    return {
        **TOKENS,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        **more,
    }


def plain_sizes(width: int) -> dict[str, Any]:
    """Of families that know neither fewer heads of keys nor gated layers."""
    unknown = ("num_key_value_heads", "intermediate_size")
    return {name: value for name, value in sizes(width).items() if name not in unknown}


def build(kind: str, maker: Any = AutoModelForCausalLM, **config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = maker.from_config(AutoConfig.for_model(kind, **config))
    for parameter in model.parameters():  # far from the start, where all examples look alike
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@family
def llama(width: int = WIDTH) -> PreTrainedModel:
    return build("llama", **sizes(width))


@family
def qwen2(width: int = WIDTH) -> PreTrainedModel:
    return build("qwen2", **sizes(width))


@family
def qwen3(width: int = WIDTH) -> PreTrainedModel:
    """Norms of queries and keys, and heads of another width than the states divided by their number."""
    return build("qwen3", **sizes(width, head_dim=16))


@family
def mistral(width: int = WIDTH) -> PreTrainedModel:
    return build("mistral", **sizes(width, sliding_window=WINDOW))


@family
def gemma2(width: int = WIDTH) -> PreTrainedModel:
    """Caps low enough to be felt."""
    caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
    return build("gemma2", **sizes(width, sliding_window=WINDOW, head_dim=8, query_pre_attn_scalar=16, **caps))


@family
def gemma3(width: int = WIDTH) -> PreTrainedModel:
    return build("gemma3_text", **sizes(width, sliding_window=WINDOW, sliding_window_pattern=2, head_dim=16))


@family
def gpt2(width: int = WIDTH) -> PreTrainedModel:
    return build("gpt2", n_embd=width, n_layer=LAYERS, n_head=HEADS, n_positions=64, **TOKENS)


@family
def opt(width: int = WIDTH) -> PreTrainedModel:
    return build("opt", **plain_sizes(width), ffn_dim=2 * width, word_embed_proj_dim=width)


@family
def opt_350m(width: int = WIDTH) -> PreTrainedModel:
    """A last state of half the width, and norms behind the layers."""
    narrow = {"word_embed_proj_dim": width // 2, "do_layer_norm_before": False, "dropout": 0.0}
    return build("opt", **plain_sizes(width), ffn_dim=2 * width, **narrow)


@family
def phi(width: int = WIDTH) -> PreTrainedModel:
    return build("phi", **sizes(width, partial_rotary_factor=0.5))


@family
def phi3(width: int = WIDTH) -> PreTrainedModel:
    return build("phi3", **sizes(width, sliding_window=WINDOW))


def experts(width: int) -> dict[str, Any]:
    routers = {"num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5, "output_router_logits": True}
    return {"num_local_experts": 4, "moe_intermediate_size": width // 2, **routers}


@family
def mixtral(width: int = WIDTH) -> PreTrainedModel:
    return build("mixtral", **sizes(width, **experts(width)))


@family
def qwen2_moe(width: int = WIDTH) -> PreTrainedModel:
    return build("qwen2_moe", **sizes(width, shared_expert_intermediate_size=width, **experts(width)))


@family
def qwen3_moe(width: int = WIDTH) -> PreTrainedModel:
    return build("qwen3_moe", **sizes(width, head_dim=16, **experts(width)))


@family
def falcon_h1(width: int = WIDTH) -> PreTrainedModel:
    """State space beside attention in every layer, and a factor behind the vocabulary head."""
    mamba = {"d_ssm": 2 * width, "n_heads": 8, "d_head": width // 4, "d_state": 8, "n_groups": 1, "chunk_size": 16}
    named = {f"mamba_{name}": size for name, size in mamba.items()}
    return build("falcon_h1", **sizes(width, head_dim=8, lm_head_multiplier=0.5, **named))


@family
def bamba(width: int = WIDTH) -> PreTrainedModel:
    mamba = {"n_heads": 8, "d_head": width // 4, "d_state": 8, "n_groups": 1, "chunk_size": 16, "expand": 2}
    named = {f"mamba_{name}": size for name, size in mamba.items()}
    return build("bamba", **sizes(width, attn_layer_indices=[1], **named))


@family
def jamba(width: int = WIDTH) -> PreTrainedModel:
    mamba = {"d_state": 8, "dt_rank": 4, "d_conv": 4, "expand": 2}
    named = {f"mamba_{name}": size for name, size in mamba.items()}
    layers = {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_period": 2, "expert_layer_offset": 1}
    return build("jamba", **sizes(width, use_mamba_kernels=False, **named, **layers, **experts(width)))


@family
def zamba2(width: int = WIDTH) -> PreTrainedModel:
    """Two layers that share one block of attention."""
    mamba = {"mamba_d_state": 8, "mamba_headdim": width // 4, "n_mamba_heads": 8, "mamba_ngroups": 1, "chunk_size": 16}
    types = {"layers_block_type": ["hybrid", "mamba", "hybrid"], "num_mem_blocks": 1, "adapter_rank": 4}
    return build("zamba2", **sizes(width, **mamba, **types, use_mem_rope=True))


@family
def qwen3_next(width: int = WIDTH) -> PreTrainedModel:
    linear = {"num_key_heads": 2, "num_value_heads": 4, "key_head_dim": 8, "value_head_dim": 8, "conv_kernel_dim": 4}
    named = {f"linear_{name}": size for name, size in linear.items()}
    types = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
    more = {"shared_expert_intermediate_size": width, **experts(width)}
    return build("qwen3_next", **sizes(width, head_dim=16, **named, **types, **more))


VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}

PATCHES = {**VISION, "image_size": 28, "patch_size": 14}


@family
def gemma3_vision(width: int = WIDTH) -> PreTrainedModel:
    text = sizes(width, sliding_window=WINDOW, sliding_window_pattern=2, head_dim=16)
    return build("gemma3", AutoModelForCausalLM, text_config=text, vision_config=PATCHES)


@family
def qwen2_vl(width: int = WIDTH) -> PreTrainedModel:
    half = width // HEADS // 2
    sections = [half - 2 * (half // 3), half // 3, half // 3]
    rope = {"rope_parameters": {"rope_type": "default", "mrope_section": sections}}
    vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": width}
    return build("qwen2_vl", AutoModelForImageTextToText, text_config=sizes(width, **rope), vision_config=vision)


@family
def llava(width: int = WIDTH) -> PreTrainedModel:
    text = {"model_type": "llama", **sizes(width)}
    vision = {**PATCHES, "model_type": "clip_vision_model", "projection_dim": 16}
    return build("llava", AutoModelForImageTextToText, text_config=text, vision_config=vision)
