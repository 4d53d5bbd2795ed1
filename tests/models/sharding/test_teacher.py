"""A teacher that is loaded by shards: what each rank holds of it, what it gives, and which one is refused."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import sharded_teacher
from helpers.families import FAMILIES
from helpers.models import model_of, tiny_llama, tiny_lora_llama, tiny_qwen
from helpers.processes import Run
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kava_trainer.config.model_arguments import ModelArguments
from kava_trainer.models.sharding.teacher import load_sharded, own_rows, sharding_problem
from kava_trainer.utils.errors import BadRequest

DEEP = 12

ODD = {"hidden_size": 40, "intermediate_size": 65, "vocab_size": 511, "num_hidden_layers": DEEP}

TEACHERS = {
    "tied": (lambda: tiny_llama(64, DEEP, tie=True), {}, {}),
    "untied, in parts": (lambda: tiny_llama(64, DEEP, tie=False), {"max_shard_size": "100KB"}, {}),
    "bfloat16": (lambda: tiny_llama(64, DEEP, tie=False).bfloat16(), {}, {}),
    "float32 from bfloat16": (lambda: tiny_llama(64, DEEP).bfloat16(), {}, {"teacher_dtype": "float32"}),
    "bfloat16 from float32": (lambda: tiny_qwen(64, DEEP), {}, {"teacher_dtype": "bfloat16"}),
    "odd numbers of rows": (lambda: model_of("llama", **ODD), {}, {}),
}


def looked_at(folder, ranks, model, saved, options):
    """What each rank holds, held at most while it loaded, would hold of the whole, and gathers."""
    model().save_pretrained(folder / "model", **saved)
    asked = (str(folder / "model"), str(folder / "found.pt"), options)
    run = Run(sharded_teacher.look, folder, *asked, ranks=ranks)
    assert run.wait() == [0] * ranks, run.output()
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize(
    "kind", ["tied", *(pytest.param(own, marks=pytest.mark.slow) for own in TEACHERS if own != "tied")]
)
def test_a_sharded_teacher_gives_what_the_whole_one_gives(tmp_path, kind):
    for held, peak, whole, gathered in looked_at(tmp_path, 2, *TEACHERS[kind]):
        copied = 0.15 * whole  # the head that was tied
        assert 0.49 * whole <= held <= 0.51 * whole + copied
        assert held < peak < held + 2 * gathered + copied < whole + copied


@pytest.mark.slow
@pytest.mark.exhaustive
def test_each_rank_holds_the_less_of_a_teacher_the_more_ranks_there_are(tmp_path):
    found = {ranks: looked_at(tmp_path / str(ranks), ranks, *TEACHERS["untied, in parts"]) for ranks in (2, 4)}
    for ranks, sizes in found.items():
        for held, _, whole, _ in sizes:
            assert held == pytest.approx(whole / ranks, rel=0.01)
    assert max(peak for _, peak, _, _ in found[4]) < 0.7 * min(peak for _, peak, _, _ in found[2])


@pytest.mark.parametrize(("rows", "ranks"), [(10, 2), (7, 2), (9, 4), (5, 4), (2, 4), (1, 3), (0, 2)])
def test_rows_are_dealt_out_as_fsdp2_does(rows, ranks):
    parts = [part.tolist() for part in torch.arange(rows).chunk(ranks)]
    parts += [[]] * (ranks - len(parts))
    for rank, part in enumerate(parts):
        mesh = SimpleNamespace(size=lambda: ranks, get_local_rank=lambda rank=rank: rank)
        assert list(range(*own_rows(rows, mesh))) == part


CONVERTED = "because transformers renames or converts its weights as it loads them; write teacher_sharding none."

REFUSED = ("mixtral", "qwen2_moe", "qwen3_moe", "jamba", "qwen3_next", "gemma3_vision", "qwen2_vl", "llava")


@pytest.mark.slow
def test_a_family_is_sharded_as_it_is_whole_or_refused(tmp_path):
    for name, make in FAMILIES.items():
        make().save_pretrained(tmp_path / "models" / name)
    run = Run(sharded_teacher.look_at_each, tmp_path, str(tmp_path / "models"), str(tmp_path / "found.pt"), ranks=2)
    assert run.wait(300) == [0, 0], run.output()
    refused = torch.load(tmp_path / "found.pt")
    assert sorted(refused) == sorted(REFUSED)
    assert all(text.endswith(CONVERTED) for text in refused.values())


def saved(folder, **changes):
    tiny_llama(64, 2, tie=False).save_pretrained(folder, **changes)
    return folder


def change_weights(folder, change):
    """Write the weights anew as `change` leaves them."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def _as_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _without_prefix(weights):
    for name in list(weights):
        if name.startswith("model."):
            weights[name.removeprefix("model.")] = weights.pop(name)


def _as_adapter(folder):
    shutil.rmtree(folder)
    base = tiny_llama(64, 2)
    base.save_pretrained(folder.parent / "base")
    adapted = tiny_lora_llama(64, 2)
    adapted.peft_config["default"].base_model_name_or_path = str(folder.parent / "base")
    adapted.save_pretrained(folder)


QUANTISED = {"quant_method": "gptq", "bits": 4}

NOT_SHARDED = {
    "pickled": (_as_pickle, {}, "it has no safetensors files"),
    "an adapter": (_as_adapter, {}, "it is an adapter"),
    "quantised when it is loaded": (lambda folder: None, {"teacher_quantization": "4bit"}, "it is quantised"),
    "quantised in its files": (lambda folder: change_config(folder, quantization_config=QUANTISED), {}, "is quantised"),
    "code of its own": (
        lambda folder: change_config(folder, auto_map={"AutoModelForCausalLM": "own.Model"}),
        {"trust_remote_code": True},
        "it brings code of its own",
    ),
    "no data type": (lambda folder: change_config(folder, dtype=None), {}, "its config names no data type"),
    "other names": (
        lambda folder: change_weights(folder, _without_prefix),
        {},
        r"calls? its weights by other names \(model.embed_tokens.weight is not there, and embed_tokens.weight is\)",
    ),
    "whole numbers": (
        lambda folder: change_weights(
            folder, lambda weights: weights.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)})
        ),
        {},
        "its files hold model.norm.weight as I8",
    ),
}


@pytest.mark.parametrize("kind", NOT_SHARDED)
def test_a_teacher_that_cannot_be_sharded_is_told_of_in_a_sentence(tmp_path, kind):
    change, options, reason = NOT_SHARDED[kind]
    folder = saved(tmp_path / "model")
    change(folder)
    problem = sharding_problem(ModelArguments(str(folder), **options), "teacher 2")
    assert problem is not None
    with pytest.raises(BadRequest, match=f"The teacher 2 '.*' cannot be sharded, because .*{reason}"):
        raise BadRequest.of(problem)
    assert problem.remedy == "write teacher_sharding none."
    with pytest.raises(BadRequest, match=reason):
        load_sharded(ModelArguments(str(folder), **options), torch.device("cpu"))


def _shorter(weights):
    weights["model.norm.weight"] = weights["model.norm.weight"][:60].clone()


BROKEN = {
    "missing": (
        lambda folder: change_weights(folder, lambda weights: weights.pop("lm_head.weight")),
        "lm_head.weight of its weights are missing, and would be random",
    ),
    "several missing": (
        lambda folder: change_weights(
            folder, lambda weights: [weights.pop(name) for name in list(weights) if "layers.1" in name]
        ),
        "model.layers.1.input_layernorm.weight and 8 more of its weights are missing",
    ),
    "short": (
        lambda folder: change_weights(folder, _shorter),
        r"model.safetensors holds model.norm.weight as \(60,\), where its config wants \(64,\)",
    ),
    "other config": (
        lambda folder: change_config(folder, intermediate_size=96),
        r"gate_proj.weight as \(128, 64\), where its config wants \(96, 64\)",
    ),
    "cut off": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000]),
        "cannot be loaded: ",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_teacher_whose_files_are_not_whole_is_refused(tmp_path, kind):
    change, reason = BROKEN[kind]
    folder = saved(tmp_path / "model")
    change(folder)
    with pytest.raises(BadRequest, match=reason):
        sharding_problem(ModelArguments(str(folder)))


@pytest.mark.slow
def test_a_file_that_one_rank_cannot_read_ends_all_of_them(tmp_path):
    run = Run(sharded_teacher.by_shards_from_a_torn_file, tmp_path, str(saved(tmp_path / "model")), ranks=2)
    assert run.wait() == [2, 2], run.output()
    assert "cannot be loaded: [Errno 5] Input/output error." in run.output()
    assert "cannot be loaded: another process could not read its part" in run.output()


def test_a_file_that_an_index_names_and_that_is_not_there_is_told_of(tmp_path):
    folder = saved(tmp_path / "model", max_shard_size="100KB")
    assert sharding_problem(ModelArguments(str(folder))) is None
    lost = sorted(folder.glob("model-*"))[1]
    lost.unlink()
    with pytest.raises(BadRequest, match=f"files of weights {lost.name} are not there"):
        sharding_problem(ModelArguments(str(folder)))


def test_weights_that_lie_in_two_files_are_refused(tmp_path):
    folder = saved(tmp_path / "model", max_shard_size="100KB")
    first, second = sorted(folder.glob("model-*"))[:2]
    save_file(load_file(first) | load_file(second), second, metadata={"format": "pt"})
    with pytest.raises(BadRequest, match=f"{first.name} and {second.name} both hold"):
        sharding_problem(ModelArguments(str(folder)))


def test_a_teacher_of_the_hub_is_found_in_the_cache(tmp_path, hub, monkeypatch):
    from huggingface_hub import HfApi, constants

    folder = saved(tmp_path / "model")
    api = HfApi(endpoint=hub.address, token="hf_any")
    api.create_repo("me/teacher")
    api.upload_folder(repo_id="me/teacher", folder_path=folder)
    assert sharding_problem(ModelArguments("me/teacher"), fetch=False) is None
    assert not [path for _, path in hub.asked if path.endswith(".safetensors")]  # it may be large
    AutoModelForCausalLM.from_pretrained("me/teacher")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    assert sharding_problem(ModelArguments("me/teacher")) is None
    assert len(hub.asked) == asked


def test_the_embedded_teacher_can_be_sharded():
    assert sharding_problem(ModelArguments("quickstart")) is None
