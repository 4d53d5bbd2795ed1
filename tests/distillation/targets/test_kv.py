import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from kava_trainer.config.arguments import KavaTrainingArguments
from kava_trainer.distillation.losses import mercator_per_token
from kava_trainer.distillation.projector import ProjectorConfig
from kava_trainer.distillation.targets import KeyValueTarget, build_target
from kava_trainer.distillation.targets.kv import heads_by_place
from kava_trainer.models.attention.capture import AttentionPart
from kava_trainer.utils.errors import BadRequest, WrongArguments

MASK = torch.tensor([[True, True, False]])


def features(heads, width, layers, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        AttentionPart(layer, part): torch.randn(1, 3, heads, width, generator=generator, requires_grad=True)
        for layer in layers
        for part in ("key", "value")
    }


def test_flat_lays_the_heads_of_all_layers_end_to_end():
    student, teacher = features(2, 3, (1, 2), 0), features(1, 8, (1, 2, 4), 1)
    config = ProjectorConfig(24, 12, dropout=0.0)
    target = KeyValueTarget([(1, 1), (2, 4)], "flat", (2, 1), config, layers=([1, 2], [1, 2, 4]))
    assert target.student_features == list(student)
    assert target.teacher_features == list(teacher)
    assert target.comparisons == [(2, 4, "all keys"), (2, 4, "all values")]
    pairs = target(student, teacher)
    for pair, projector, part in zip(pairs, target.projectors, ("key", "value"), strict=True):
        own = torch.cat([student[AttentionPart(layer, part)][0].reshape(3, 6) for layer in (1, 2)], dim=1)
        given = torch.cat([teacher[AttentionPart(layer, part)][0, :, 0] for layer in (1, 2, 4)], dim=1)
        assert torch.equal(pair.student[0], own)
        assert torch.equal(pair.target[0], projector(given))
    found = target.align(pairs, MASK, {"mercator"})[0].terms["mercator"]
    torch.testing.assert_close(found, mercator_per_token(pairs[0].student, pairs[0].target, MASK)[0])
    found.sum().backward()
    assert student[AttentionPart(1, "key")].grad[0, :2].abs().min() > 0
    assert not student[AttentionPart(1, "key")].grad[0, 2].any()
    assert student[AttentionPart(1, "value")].grad is None


@pytest.mark.parametrize("direction", ["teacher_to_student", "student_to_teacher"])
def test_headwise_compares_head_by_head_with_one_projector_for_all_heads(direction):
    student, teacher = features(4, 3, (2,), 0), features(2, 8, (5,), 1)
    config = ProjectorConfig(*((8, 3) if direction == "teacher_to_student" else (3, 8)), dropout=0.0)
    target = KeyValueTarget([(2, 5)], "headwise", (4, 2), config, direction=direction, weights=[2.0])
    assert target.comparisons == [(2, 5, "keys"), (2, 5, "values")]
    assert target.shares == [0.5, 0.5]
    found = target.align(target(student, teacher), MASK, {"mercator", "mse"})
    for index, part in enumerate(("key", "value")):
        project, expected, cosines, errors = target.projectors[index], 0.0, 0.0, 0.0
        for head, other in enumerate([0, 0, 1, 1]):
            own, due = student[AttentionPart(2, part)][:, :, head], teacher[AttentionPart(5, part)][:, :, other]
            own, due = (own, project(due)) if direction == "teacher_to_student" else (project(own), due)
            loss, cosine = mercator_per_token(own, due, MASK)
            expected, cosines, errors = (
                expected + loss / 4,
                cosines + cosine / 4,
                errors + (own - due).square().mean(-1) / 4,
            )
        torch.testing.assert_close(found[index].terms["mercator"], expected)
        torch.testing.assert_close(found[index].cosine, cosines)
        torch.testing.assert_close(found[index].terms["mse"], errors * MASK)
        own = torch.autograd.grad(
            found[index].terms["mercator"].sum(), student[AttentionPart(2, part)], retain_graph=True
        )
        naive = torch.autograd.grad(expected.sum(), student[AttentionPart(2, part)])
        torch.testing.assert_close(own, naive)


def test_each_head_of_the_student_has_one_of_the_teacher():
    assert heads_by_place(2, 2) == [0, 1]
    assert heads_by_place(2, 8) == [0, 4]
    assert heads_by_place(4, 2) == [0, 0, 1, 1]
    assert heads_by_place(3, 2) == [0, 0, 1]


def qwen(layers, width, heads, head_width):
    """A model without storage; vocabulary and feed-forward are small, for neither makes keys."""
    config = Qwen2Config(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, num_key_value_heads=2,
        head_dim=head_width, intermediate_size=64, vocab_size=64, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        return Qwen2ForCausalLM(config)


def arguments(tmp_path, **changes):
    return KavaTrainingArguments(str(tmp_path), use_cpu=True, alignment_target="kv", **changes)


@pytest.mark.parametrize(
    ("changes", "widths"),
    [
        ({"projector_direction": "teacher_to_student"}, "7168 -> 3072"),
        ({}, "3072 -> 7168"),
        ({"layer_mapping": "last", "projector_direction": "teacher_to_student"}, "256 -> 128"),
        ({"kv_shape": "headwise", "projector_direction": "teacher_to_student"}, "128 -> 64"),
    ],
)
def test_the_widths_are_those_of_the_real_pair(tmp_path, changes, widths):
    teacher, student = qwen(28, 1536, 12, 128), qwen(24, 896, 14, 64)
    args = arguments(tmp_path, **{"layer_mapping": "all", "projector_mlp_ratio": 0.01, **changes})
    target = build_target(args, student, teacher)
    assert target.widths == widths
    assert len(target.projectors) == (48 if "kv_shape" in changes else 2)


def test_without_a_projector_heads_of_unlike_widths_are_refused(tmp_path):
    args = arguments(tmp_path, kv_shape="headwise", projector_direction="none")
    with pytest.raises(BadRequest, match="the teacher's are 128 wide and the student's 64"):
        build_target(args, qwen(2, 896, 14, 64), qwen(4, 1536, 12, 128))
    alike = build_target(args, qwen(2, 896, 14, 64), qwen(4, 1536, 12, 64))
    assert not alike.projectors
    assert alike.widths == "64 wide"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"layer_weights": [1.0]}, "layer_weights"),
        ({"teacher_cache_dir": "cache"}, "teacher_cache_dir"),
        ({"torch_compile": True}, "torch_compile"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "gradient_checkpointing_kwargs"),
        *(
            ({"gradient_checkpointing_kwargs": given}, "gradient_checkpointing_kwargs")
            for given in (
                '{"use_reentrant": true}',
                '{"use_reentrant": "true"}',
                '{"use_reentrant":"True"}',
                '{"use_reentrant": 1}',
                '{"use_reentrant": "1"}',
                '{"preserve_rng_state": false, "use_reentrant"\n: true}',
                {"use_reentrant": 1},
                {"use_reentrant": "false"},  # as options a text that is true; torch reads no words
            )
        ),
        ({"alignment_target": "hidden", "kv_shape": "headwise"}, "kv_shape"),
        (
            {"projector_rank": 4, "projector_anchor": "pca", "projector_direction": "teacher_to_student"},
            "projector_rank",
        ),
    ],
)
def test_what_does_not_go_with_keys_and_values_is_refused(tmp_path, changes, name):
    with pytest.raises(WrongArguments) as caught:
        KavaTrainingArguments(str(tmp_path), use_cpu=True, **{"alignment_target": "kv", **changes})
    assert [problem.argument for problem in caught.value.problems] == [name]


@pytest.mark.parametrize(
    "given",
    [
        '{"use_reentrant": false}',
        '{"use_reentrant": "False"}',
        '{"use_reentrant": 0}',
        '{"use_reentrant": "0"}',
        '{"use_reentrant": null}',
        '{"preserve_rng_state": true}',
        {"use_reentrant": False},
        None,
    ],
)
def test_checkpointing_that_keeps_the_graph_goes_with_keys_and_values(tmp_path, given):
    args = arguments(tmp_path, gradient_checkpointing_kwargs=given)
    assert not (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")


def test_sharded_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(WrongArguments, match="not supported under FSDP2"):
        arguments(tmp_path)


def test_layers_that_follow_each_other_are_told_as_a_range():
    config = ProjectorConfig(4, 4)
    told = [
        KeyValueTarget([(1, 1)], "flat", (1, 1), config, layers=layers).told_layers
        for layers in (([1, 2, 3], [1, 2, 3, 4]), ([2, 4], [1]))
    ]
    assert told == ["all of 1 to 3 with all of 1 to 4", "all of 2, 4 with all of 1"]
    assert KeyValueTarget([(1, 2)], "headwise", (1, 1), config).told_layers == "(1, 2)"


def test_the_heads_of_all_pairs_share_projectors():
    student, teacher = features(2, 3, (1, 2), 0), features(2, 8, (1, 4), 1)
    config = ProjectorConfig(8, 3, dropout=0.0)
    target = KeyValueTarget([(1, 1), (2, 4)], "headwise", (2, 2), config, sharing="all")
    assert target.owners == [0, 1, 0, 1]
    assert len(target.projectors) == 2
    for pair, (layer, part), owner in zip(
        target(student, teacher), [(1, "key"), (1, "value"), (4, "key"), (4, "value")], target.owners, strict=True
    ):
        assert torch.equal(pair.target, target.projectors[owner](teacher[AttentionPart(layer, part)]))
    assert target.use["sharing"] == "all"
