import json
import shutil
from collections import namedtuple

import pytest
import torch
from helpers.caches import EXAMPLES, IDENTITY, LAYERS, build, build_on_all_ranks, cached_run, teacher_model
from helpers.models import TEACHER_LAYERS, TEACHER_SIZE, tiny_llama
from helpers.processes import Run
from helpers.trainers import loss_lines, make_trainer
from transformers import BloomConfig, BloomForCausalLM

from kava_trainer.config.model_arguments import ModelArguments
from kava_trainer.distillation import teacher_cache
from kava_trainer.distillation.state_shards import ShardWriter
from kava_trainer.distillation.teacher_cache import (
    MANIFEST,
    CachedTeacher,
    TeacherCache,
    is_released,
    release_weights,
    teacher_identity,
    weights_digest,
)
from kava_trainer.models.teacher import OnlineTeacher, freeze
from kava_trainer.quickstart import TEACHER_FOLDER
from kava_trainer.utils.errors import BadRequest


def bloom():
    torch.manual_seed(0)
    return freeze(BloomForCausalLM(BloomConfig(vocab_size=512, hidden_size=64, n_layer=4, n_head=2)))


@pytest.mark.parametrize("model", [teacher_model, bloom])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_the_states_are_those_of_the_example_alone(tmp_path, model, dtype):
    model = model()
    cache = build(tmp_path, model=model, dtype=dtype)
    online = OnlineTeacher(model, LAYERS)
    for ids in EXAMPLES:
        tokens = torch.tensor([ids])
        alone = online.features({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
        found = cache.read(ids)
        assert sorted(found) == LAYERS
        for layer, states in found.items():
            cosine = torch.cosine_similarity(states.float(), alone[layer][0], dim=1)
            assert cosine.min() > (0.99998 if dtype == "bfloat16" else 0.9998)


def test_only_what_is_missing_is_written_and_equal_examples_once(tmp_path):
    cache = build(tmp_path, EXAMPLES[:10])
    before = set(tmp_path.iterdir())
    again = TeacherCache(tmp_path, IDENTITY, LAYERS, "bfloat16")
    assert again.missing(EXAMPLES[:10]) == []
    assert again.missing([EXAMPLES[3], EXAMPLES[20], EXAMPLES[20], EXAMPLES[11]]) == [1, 3]
    build(tmp_path, EXAMPLES)
    assert before < set(tmp_path.iterdir())
    assert cache.missing(EXAMPLES) != []
    assert TeacherCache(tmp_path, IDENTITY, LAYERS, "bfloat16").missing(EXAMPLES) == []


def test_a_build_that_was_cut_off_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(ShardWriter.__init__, "__defaults__", (1,))
    monkeypatch.setattr(teacher_cache, "GROUP", 5)
    asked, features = [], OnlineTeacher.features

    def failing(self, inputs):
        asked.append(inputs["input_ids"].numel())
        if len(asked) == 4:
            raise KeyboardInterrupt
        return features(self, inputs)

    monkeypatch.setattr(OnlineTeacher, "features", failing)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path)
    done = sum(asked[:3])
    asked.clear()
    asked.extend([0] * 10)
    build(tmp_path)
    assert done > 0
    assert sum(asked) == sum(map(len, EXAMPLES)) - done
    assert TeacherCache(tmp_path, IDENTITY, LAYERS, "bfloat16").missing(EXAMPLES) == []


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"teacher": "other"}, "teacher is tiny there and other here"),
        ({"version": "2"}, "version is 1 there and 2 here"),
        ({"quantization": "4bit"}, "quantization is none there and 4bit here"),
        ({"mixed_precision": "bf16"}, "mixed_precision is no there and bf16 here"),
        ({"dtype": "int8"}, "states is bfloat16 there and int8 here"),
        ({"layers": [1, TEACHER_LAYERS]}, r"layers is \[2, 4\] there and \[1, 4\] here"),
    ],
)
def test_a_stale_cache_is_refused_by_name(tmp_path, changes, difference):
    build(tmp_path)
    with pytest.raises(BadRequest, match=rf"{tmp_path} holds the states of another teacher.*{difference}"):
        build(tmp_path, **changes)


def test_a_cache_with_more_layers_will_do_and_keeps_them_all(tmp_path):
    build(tmp_path, EXAMPLES[:5])
    cache = build(tmp_path, EXAMPLES, layers=[TEACHER_LAYERS])
    assert list(cache.read(EXAMPLES[0])) == [TEACHER_LAYERS]
    assert sorted(TeacherCache(tmp_path, IDENTITY, LAYERS, "bfloat16").read(EXAMPLES[29])) == LAYERS


def test_what_is_no_cache_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(BadRequest, match="holds files but no teacher cache; name an empty or new folder"):
        build(tmp_path)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / MANIFEST).write_text("{")
    with pytest.raises(BadRequest, match=f"{MANIFEST} cannot be read"):
        build(tmp_path / "cache")
    with pytest.raises(BadRequest, match="cannot be written to"):
        build(tmp_path / "thesis.txt" / "cache")


def test_a_disk_that_is_too_small_is_named_with_numbers(tmp_path, monkeypatch):
    cache = TeacherCache(tmp_path / "new", IDENTITY, LAYERS, "bfloat16")
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**10, 9 * 10**9, 10**9))
    cache.check_space(10**9)
    with pytest.raises(BadRequest, match=r"would take 2\.00 GB in .*, where 1\.00 GB are free.*int8"):
        cache.check_space(2 * 10**9)


def test_the_identity_of_a_local_teacher_follows_its_weights(tmp_path):
    folder = tmp_path / "teacher"
    shutil.copytree(TEACHER_FOLDER, folder)
    model = teacher_model()
    before = teacher_identity(ModelArguments(teacher_model_name_or_path=str(folder)), model, "no")
    assert before["version"] == weights_digest(folder)
    (weights,) = folder.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1000] ^= 1
    weights.write_bytes(content)
    after = teacher_identity(ModelArguments(teacher_model_name_or_path=str(folder)), model, "no")
    assert after["version"] != before["version"]
    model.config._commit_hash = "abc"
    hub = teacher_identity(ModelArguments(teacher_model_name_or_path="Qwen/Qwen2.5-0.5B"), model, "bf16")
    assert (hub["version"], hub["mixed_precision"], hub["dtype"]) == ("abc", "bf16", "float32")


@pytest.mark.parametrize("tie", [True, False])
def test_of_a_released_teacher_only_the_head_is_left(tie):
    model = freeze(tiny_llama(TEACHER_SIZE, TEACHER_LAYERS, seed=1, tie=tie))
    state = torch.randn(3, TEACHER_SIZE).bfloat16()
    logits = model.lm_head(state.float())
    teacher = CachedTeacher(model, lambda ids: {})
    assert not is_released(model)
    release_weights(model, keep_head=True)
    assert is_released(model)
    left = [parameter for parameter in model.parameters() if not parameter.is_meta]
    assert [parameter.shape for parameter in left] == [(512, TEACHER_SIZE)]
    assert torch.equal(teacher.head(state), logits)
    assert (teacher.hidden_size, teacher.num_layers) == (TEACHER_SIZE, TEACHER_LAYERS)
    release_weights(model, keep_head=False)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("changes", [{}, {"dataloader_num_workers": 2}, {"max_tokens_per_batch": 0}, {"bf16": True}])
def test_calibration_evaluation_and_workers_read_the_cache_too(tmp_path, tokenizer, changes):
    changes = {"projector_init": "least_squares", "calibration_tokens": 200, **changes}
    online = cached_run(tmp_path / "online", tokenizer, **changes)
    cached = cached_run(tmp_path / "cached", tokenizer, "bfloat16", **changes)
    for left, right in zip(loss_lines(online), loss_lines(cached), strict=True):
        for name in ("loss", "cos_sim", "mercator_loss", "lm_loss", "kd_loss"):
            assert right[name] == pytest.approx(left[name], rel=0.01, abs=0.002), name
    last = [trainer.state.log_history[-1] for trainer in (online, cached)]
    for name in ("eval_loss", "eval_cos_sim", "eval_kd_loss", "eval_margin", "eval_cka"):
        assert last[1][name] == pytest.approx(last[0][name], rel=0.01, abs=0.002), name


def test_a_cached_teacher_needs_the_collator_that_reads_its_states(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer)
    trainer.data_collator = lambda examples: {}
    with pytest.raises(ValueError, match="needs DistillationCollator as data_collator"):
        trainer.read_cache(CachedTeacher(trainer.teacher.model, lambda ids: {}))


@pytest.mark.slow
def test_two_ranks_build_one_cache(tmp_path):
    folder = tmp_path / "cache"
    run = Run(build_on_all_ranks, tmp_path, folder, ranks=2)
    assert run.wait() == [0, 0], run.output()
    assert len(list(folder.glob("states-*.safetensors"))) == 2
    alone = build(tmp_path / "alone")
    both = TeacherCache(folder, IDENTITY, LAYERS, "bfloat16")
    assert json.loads((folder / MANIFEST).read_text())["layers"] == LAYERS
    for ids in EXAMPLES:
        for layer, states in both.read(ids).items():
            torch.testing.assert_close(states, alone.read(ids)[layer], rtol=0.02, atol=0.02)
