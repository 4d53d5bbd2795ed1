from dataclasses import replace

import pytest
import torch
from helpers.data import random_examples
from helpers.models import model_of, tiny_lora_llama

from kava_trainer.distillation.rollouts.sampling import Sampling, sample_answers
from kava_trainer.models.layers import evaluating
from kava_trainer.models.packed_attention import enable_packing

NO_END = 511
GREEDY = Sampling(1.0, 1e-6, 6, (NO_END,), 0, seed=3, batch_size=3, vocabulary=512)
"""With hardly any probability to choose from the most probable token is all there is."""

PROMPTS = [example["input_ids"][:-1] for example in random_examples(7)]


def alone(model, prompt, count):
    """What a model writes greedily, without a cache or other prompts beside, and how uncertain it is."""
    tokens, entropies = list(prompt), []
    with torch.no_grad():
        for _ in range(count):
            distribution = model(torch.tensor([tokens])).logits[0, -1].float().softmax(-1)
            entropies.append(-(distribution * distribution.log()).sum().item())
            tokens.append(int(distribution.argmax()))
    return tokens[len(prompt) :], entropies


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("packed", [False, True])
def test_answers_of_a_batch_are_those_of_each_prompt_alone(kind, packed):
    model = model_of(kind)
    expected = [alone(model, prompt, 6) for prompt in PROMPTS]
    if packed:
        enable_packing(model)
    answers = sample_answers(PROMPTS, model, GREEDY)
    assert answers.tokens == [tokens for tokens, _ in expected]
    for own, (_, entropies) in zip(answers.entropies, expected, strict=True):
        assert own.tolist() == pytest.approx(entropies, rel=1e-3)


def test_adapters_are_on_while_a_student_answers():
    model = tiny_lora_llama(32, 2).eval()
    off = sample_answers(PROMPTS, model, GREEDY).tokens
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    on = sample_answers(PROMPTS, model, GREEDY).tokens
    assert on != off
    assert on == [alone(model, prompt, 6)[0] for prompt in PROMPTS]


def test_samples_follow_the_distribution_at_the_temperature_that_was_asked_for():
    model, count = model_of("llama"), 4000
    sampling = Sampling(2.0, 1.0, 1, (NO_END,), 0, seed=0, batch_size=count, vocabulary=512)
    torch.manual_seed(0)
    tokens = torch.tensor(sample_answers([PROMPTS[0]] * count, model, sampling).tokens)[:, 0]
    found = torch.bincount(tokens, minlength=512) / count
    with torch.no_grad():
        expected = (model(torch.tensor([PROMPTS[0]])).logits[0, -1] / 2.0).softmax(-1)
    assert 0.5 * (found - expected).abs().sum() < 0.15  # 0.12 is what chance gives with 4,000 of 512
    assert len(tokens.unique()) > 50  # of which `generate` would keep 50 by itself


def test_top_p_leaves_the_improbable_out():
    model = model_of("llama")
    sampling = Sampling(1.0, 0.5, 1, (NO_END,), 0, seed=0, batch_size=500, vocabulary=512)
    torch.manual_seed(0)
    tokens = {own for (own,) in sample_answers([PROMPTS[0]] * 500, model, sampling).tokens}
    with torch.no_grad():
        probable = model(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1).sort(descending=True)
    kept = int((probable.values.cumsum(0) < 0.5).sum()) + 1
    assert tokens == set(probable.indices[:kept].tolist())


def test_a_student_s_own_defaults_of_generation_play_no_part():
    model = model_of("llama")
    plain = sample_answers(PROMPTS, model, GREEDY).tokens
    model.generation_config.repetition_penalty, model.generation_config.top_k = 5.0, 3
    assert sample_answers(PROMPTS, model, GREEDY).tokens == plain


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_prompt_that_fills_all_positions_has_no_answer_and_one_near_that_a_short_one(batch_size):
    model = model_of("llama", max_position_embeddings=20)
    prompts = [list(range(1, length + 1)) for length in (5, 18, 20, 25)]
    answers = sample_answers(prompts, model, replace(GREEDY, batch_size=batch_size)).tokens
    assert [len(answer) for answer in answers] == [6, 2, 0, 0]


def test_tokens_that_not_all_know_are_never_written():
    model = model_of("llama")
    few = replace(GREEDY, temperature=5.0, top_p=1.0, max_new_tokens=40, vocabulary=20, end_tokens=(19,))
    torch.manual_seed(0)
    written = {token for answer in sample_answers(PROMPTS, model, few).tokens for token in answer}
    assert max(written) < 20
    assert len(written) > 10


def test_a_student_that_computes_its_activations_again_answers_as_any_other():
    model = model_of("llama")
    plain = sample_answers(PROMPTS, model, GREEDY).tokens
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    model.train()
    with evaluating(model):
        assert sample_answers(PROMPTS, model, GREEDY).tokens == plain
    assert model.training
