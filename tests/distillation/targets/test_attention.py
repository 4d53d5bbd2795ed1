import math

import pytest
import torch
from helpers.models import model_of, tiny_llama

from kava_trainer.config.arguments import KavaTrainingArguments
from kava_trainer.distillation.targets import AttentionTarget, build_target
from kava_trainer.distillation.targets.attention import Heads, attention_divergence
from kava_trainer.evaluation.diagnostics import collapse_reason
from kava_trainer.evaluation.sample import Sample
from kava_trainer.models.attention.capture import AttentionPart, FeatureCapture
from kava_trainer.models.hidden_states import run_decoder
from kava_trainer.models.teacher import OnlineTeacher
from kava_trainer.utils.errors import BadRequest, WrongArguments

LENGTHS = (6, 4, 1)


def parts(heads, width, count=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(1, count, heads.queries + heads.keys, width, generator=generator) / width**0.25
    return own.requires_grad_()


def naive_distribution(states, heads, token):
    """How one token attends, head by head [queries, token + 1], with a loop, in float64."""
    rows = []
    for head in range(heads.queries):
        key = heads.queries + head // (heads.queries // heads.keys)
        query = states[token, head].double()
        scores = torch.stack([
            query @ states[j, key].double()
            if heads.window is None or token - j < heads.window
            else query.new_tensor(-1e9)
            for j in range(token + 1)
        ])  # fmt: skip
        rows.append(scores.softmax(dim=0))
    return torch.stack(rows)


def naive(student, teacher, heads, lengths):
    divergence, agreement, start = [], [], 0
    for length in lengths:
        for token in range(length):
            own, due = (
                naive_distribution(side[start : start + length], of, token)
                for side, of in zip((student, teacher), heads, strict=True)
            )
            if heads[0].queries != heads[1].queries:
                own, due = own.mean(dim=0, keepdim=True), due.mean(dim=0, keepdim=True)
            safe = due > 0
            logs = torch.where(safe, due, 1.0).log() - torch.where(safe, own, 1.0).log()
            divergence.append((due * logs).sum(dim=-1).mean())
            rows = [
                torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(own[:, 1:].detach(), due[:, 1:], strict=True)
            ]
            agreement.append(torch.stack(rows).mean().nan_to_num(0.0) if token > 1 else torch.tensor(0.0).double())
        start += length
    return torch.stack(divergence), torch.stack(agreement).float()


@pytest.mark.parametrize(
    "heads",
    [(Heads(4, 2), Heads(4, 4)), (Heads(2, 1), Heads(6, 3)), (Heads(4, 2, 3), Heads(4, 1, 3))],
    ids=["matched", "merged", "window"],
)
def test_value_and_gradient_are_those_of_plain_loops(heads):
    student, teacher = parts(heads[0], 8), parts(heads[1], 16, seed=1).detach()
    target = AttentionTarget([(1, 2)], [heads])
    split = [side.split([of.queries, of.keys], dim=2) for side, of in zip((student, teacher), heads, strict=True)]
    own, due = (
        {AttentionPart(layer, "query"): query, AttentionPart(layer, "key"): key}
        for layer, (query, key) in zip((1, 2), split, strict=True)
    )
    assert target.student_features == list(own)
    (pair,) = target(own, due)
    mask = torch.ones(1, 11, dtype=torch.bool)
    (found,) = target.align([pair], mask, {"attention"}, LENGTHS)
    divergence, agreement = naive(student[0], teacher[0], heads, LENGTHS)
    torch.testing.assert_close(found.terms["attention"][0].double(), divergence, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.cosine[0], agreement, rtol=1e-3, atol=1e-4)
    (gradient,) = torch.autograd.grad(found.terms["attention"].sum(), student)
    (expected,) = torch.autograd.grad(divergence.sum(), student)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("heads", [(Heads(4, 2), Heads(4, 4)), (Heads(2, 1), Heads(6, 3))])
def test_chunks_change_nothing(heads):
    student, teacher = parts(heads[0], 8)[0], parts(heads[1], 16, seed=1)[0].detach()
    whole, small = (attention_divergence(student, teacher, heads, size) for size in (2**20, 4 * 11 * 6 * 3))
    torch.testing.assert_close(small, whole)
    gradients = [torch.autograd.grad(own.sum(), student, retain_graph=True)[0] for own, _ in (whole, small)]
    torch.testing.assert_close(*gradients)


def test_what_lies_beyond_a_narrower_window_of_the_student_is_left_out():
    """The last token attends to all four alike in the teacher, of which the student sees two."""
    teacher, student = torch.zeros(4, 2, 8), torch.zeros(4, 2, 8)
    divergence, _ = attention_divergence(student, teacher, (Heads(1, 1, 2), Heads(1, 1)))
    sums = [0.0, 0.0, 2 / 3 * math.log(2 / 3), 2 / 4 * math.log(2 / 4)]
    torch.testing.assert_close(divergence, torch.tensor(sums))
    assert divergence[3] < -0.3
    other, _ = attention_divergence(student, teacher, (Heads(1, 1), Heads(1, 1, 2)))  # a whole KL
    torch.testing.assert_close(other, torch.tensor([0.0, 0.0, math.log(3 / 2), math.log(4 / 2)]))
    alike, _ = attention_divergence(student, teacher, (Heads(1, 1, 2), Heads(1, 1, 2)))
    torch.testing.assert_close(alike, torch.zeros(4))


def test_the_prompt_is_attended_to_where_the_answer_alone_counts():
    heads = (Heads(2, 1), Heads(2, 1))
    student, teacher = parts(heads[0], 8), parts(heads[1], 8, seed=1)
    target, answer = AttentionTarget([(1, 1)], [heads]), torch.arange(11).unsqueeze(0) > 6
    pair = target(
        *({AttentionPart(1, "query"): s[:, :, :2], AttentionPart(1, "key"): s[:, :, 2:]} for s in (student, teacher))
    )
    whole, part = (target.align(pair, mask, {"attention"})[0] for mask in (torch.ones_like(answer), answer))
    assert torch.equal(part.terms["attention"][answer], whole.terms["attention"][answer])
    assert not part.terms["attention"][~answer].any()


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_what_is_computed_again_is_the_attention_of_the_model(kind):
    """A student that attends to all tokens alike has the divergence that the eager model's own attention gives."""
    window = {"sliding_window": 4} if kind == "mistral" else {}
    model, eager = (model_of(kind, attention=way, **window) for way in ("sdpa", "eager"))
    ids = torch.arange(3, 14).unsqueeze(0)
    with torch.no_grad():
        own = eager(ids, output_attentions=True).attentions[1][0]
    with FeatureCapture(model, [AttentionPart(2, "query"), AttentionPart(2, "key")]) as found, torch.no_grad():
        run_decoder(model, ids)
    given = torch.cat([found[AttentionPart(2, part)] for part in ("query", "key")], dim=2)[0]
    heads = Heads(4, 2, window.get("sliding_window"))
    divergence, _ = attention_divergence(torch.zeros_like(given), given, (heads, heads))
    seen = (own > 0).sum(dim=-1)
    expected = (own * torch.where(own > 0, own, 1.0).log()).sum(dim=-1) + seen.log()
    torch.testing.assert_close(divergence, expected.mean(dim=0), rtol=1e-4, atol=1e-5)


def diagnose(student, teacher, heads):
    target, sample = AttentionTarget([(1, 1)], [(heads, heads)]), Sample(within_examples=True)
    states = [
        {AttentionPart(1, "query"): side[:, :, : heads.queries], AttentionPart(1, "key"): side[:, :, heads.queries :]}
        for side in (student, teacher)
    ]
    (pair,) = target(*states)
    mask = torch.arange(40).unsqueeze(0) < torch.tensor([[40], [25]])
    sample.add(target.sides(0, pair, *states, mask))
    return sample.diagnose()


def test_a_collapse_is_called_and_agreement_is_not():
    heads, generator = Heads(2, 1), torch.Generator().manual_seed(0)
    teacher = 2 * torch.randn(2, 40, 3, 8, generator=generator)
    healthy = diagnose(teacher + 0.05 * torch.randn(2, 40, 3, 8, generator=generator), teacher, heads)
    assert healthy.margin > 0.5
    assert collapse_reason(healthy, 1) is None
    uniform, first = torch.zeros_like(teacher), torch.zeros_like(teacher)
    first[:, :, :2, 0], first[:, 0, 2, 0] = 5.0, 5.0  # all attend to the first token alone
    for collapsed in (uniform, first, uniform + 1e-7 * teacher):
        figures = diagnose(collapsed, teacher, heads)
        assert abs(figures.cos_sim) < 0.02
        assert "another token" in collapse_reason(figures, 1)


def arguments(tmp_path, **changes):
    return KavaTrainingArguments(str(tmp_path), use_cpu=True, alignment_target="attention", **changes)


def test_heads_and_windows_are_those_of_the_models(tmp_path):
    args = arguments(tmp_path, layer_mapping="uniform:2")
    target = build_target(args, tiny_llama(32, 2), model_of("mistral", sliding_window=4))
    assert target.heads == [(Heads(2, 1), Heads(4, 2, 4))] * 2
    assert target.widths == "attention as the mean of all heads"
    assert not list(target.parameters())
    assert args.aligns
    assert not args.calibrates


def test_attention_by_more_than_queries_and_keys_is_refused():
    from kava_trainer.models.attention.capture import check_features

    model = model_of("mistral", sliding_window=4)
    parts = [AttentionPart(2, "query")]
    check_features(model, parts, "teacher")
    model.config.layer_types = ["full_attention"] * 4
    with pytest.raises(BadRequest, match="has a window of 4 where its config tells None"):
        check_features(model, parts, "teacher")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"mse_weight": 0.2}, "mse_weight"),
        ({"teacher_cache_dir": "cache"}, "teacher_cache_dir"),
        ({"projector_anchor": "pca", "projector_direction": "teacher_to_student"}, "projector_anchor"),
        ({"kv_shape": "headwise"}, "kv_shape"),
    ],
)
def test_what_attention_does_not_have_is_refused(tmp_path, changes, name):
    with pytest.raises(WrongArguments) as caught:
        arguments(tmp_path, **changes)
    assert [problem.argument for problem in caught.value.problems] == [name]


def test_the_teacher_stops_at_the_block_whose_attention_is_read():
    model, seen = tiny_llama(32, 4), []
    model.model.layers[2].register_forward_hook(lambda *given: seen.append(given))
    teacher = OnlineTeacher(model, [AttentionPart(2, "query")])
    ids = torch.arange(1, 6).unsqueeze(0)
    assert list(teacher.features({"input_ids": ids, "attention_mask": torch.ones_like(ids)})) == teacher.layers
    assert not seen
