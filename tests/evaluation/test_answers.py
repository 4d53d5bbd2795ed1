import math

import pytest
import torch
from datasets import Dataset
from helpers.data import random_examples
from helpers.models import tiny_llama

from kava_trainer.config.data_arguments import DataArguments
from kava_trainer.data.collators import DistillationCollator
from kava_trainer.data.retention import load_retention
from kava_trainer.evaluation.answers import (
    answer_cross_entropy,
    evaluate_model,
    evaluate_with_answers,
    generate_answers,
    have_prompts,
)
from kava_trainer.evaluation.final_answer_match.final_answer_match import FinalAnswerMatch, is_exact_match
from kava_trainer.utils.progress_bar import SharedBatches


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("so 5+13=18\n#### 18", "... #### 18", True),
        ("#### 18.", "#### 18", True),
        ("#### 1,800", "#### 1800", True),
        ("#### 1800", "#### 1,800", True),
        ("It costs $18", "#### 18", True),
        ("#### $18", "#### 18", True),
        ("#### 18.0", "#### 18", True),
        ("#### 18.5", "#### 18", False),
        ("#### -3", "#### 3", False),
        ("#### -$3", "#### -3", True),
        ("#### 1/2", "#### 0.5", True),
        ("#### 18 dollars", "#### 18", True),
        ("#### 18", "#### 18 dollars", True),
        ("#### \N{MINUS SIGN}3", "#### -3", True),
        ("1" * 5000, "#### 18", False),
        ("#### 18\n#### 20", "#### 18", True),
        ("8 - 5 = 3, so 8-3", "#### 3", True),
        ("the answer", "#### 18", False),
        ("", "#### 18", False),
        ("#### ", "#### 18", False),
        ("18 and then 20", "#### 18", False),
        ("Paris.", "paris", True),
        ("London", "Paris", False),
        ("in the year 1900 it was Paris", "Paris 1900", False),
    ],
)
def test_answers_are_read_as_people_mean_them(prediction, reference, expected):
    assert is_exact_match(prediction, reference) is expected


def test_no_answers_have_no_exact_match():
    with pytest.raises(ValueError, match="There are no predictions"):
        FinalAnswerMatch(keep_in_memory=True).compute(predictions=[], references=[])


def test_plain_text_has_no_prompt_to_answer(tokenizer):
    ids = tokenizer("Ann has 3 pens.")["input_ids"]
    plain = [{"input_ids": [tokenizer.eos_token_id, *ids], "prompt_length": length} for length in (0, 1)]
    assert not have_prompts(tokenizer, Dataset.from_list(plain))
    assert have_prompts(tokenizer, Dataset.from_list([*plain, {"input_ids": ids, "prompt_length": 2}]))


def test_the_metric_is_an_evaluate_metric():
    metric = FinalAnswerMatch(keep_in_memory=True)
    assert metric.compute(predictions=["#### 1", "2"], references=["#### 1", "#### 3"]) == {"exact_match": 0.5}


def test_answer_cross_entropy_is_the_mean_over_all_answer_tokens(tokenizer):
    model, rows = tiny_llama(32, 2), random_examples(7)
    ours = answer_cross_entropy(model, Dataset.from_list(rows), DistillationCollator(tokenizer), batch_size=3)
    total, count = 0.0, 0
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for t, label in enumerate(row["labels"][1:]):
            if label != -100:
                total, count = total - logits[t, label].item(), count + 1
    assert ours == pytest.approx(total / count, rel=1e-5)
    assert model.training


def test_batched_generation_equals_generation_one_by_one(tokenizer):
    model, data = tiny_llama(32, 2), Dataset.from_list(random_examples(5))
    together, alone = (generate_answers(model, tokenizer, data, size, max_new_tokens=6) for size in (5, 1))
    assert together == alone
    ids = torch.tensor([data[3]["input_ids"][: data[3]["prompt_length"]]])
    greedy = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert together[3] == tokenizer.decode(greedy, skip_special_tokens=True)


def test_generation_shows_how_far_each_batch_is(tokenizer, monkeypatch):
    notes = []
    monkeypatch.setattr(SharedBatches, "note", lambda batches, text: notes.append(text))
    assert len(generate_answers(tiny_llama(32, 2), tokenizer, Dataset.from_list(random_examples(5)), 3, 4)) == 5
    second = notes.index("token 1 of 4", 1)
    for batch in (notes[:second], notes[second:]):
        assert batch == [f"token {number} of 4" for number in range(1, len(batch) + 1)]
        assert len(batch) > 1


def test_generation_is_greedy_whatever_the_model_s_own_defaults_are(tokenizer):
    model, data = tiny_llama(32, 2), Dataset.from_list(random_examples(4))
    plain = generate_answers(model, tokenizer, data, 4, max_new_tokens=12)
    own = model.generation_config
    own.repetition_penalty, own.num_beams, own.min_new_tokens = 5.0, 3, 12
    assert generate_answers(model, tokenizer, data, 4, max_new_tokens=12) == plain
    assert model.generation_config is own


def test_a_model_is_evaluated_with_and_without_generation(tokenizer):
    data = Dataset.from_list([{**row, "answer_text": "#### 1"} for row in random_examples(3)])
    model, collator = tiny_llama(32, 2), DistillationCollator(tokenizer)
    figures = evaluate_model(model, tokenizer, data, collator, 2)
    assert figures["exact_match"] is None
    assert math.log(figures["perplexity"]) == pytest.approx(answer_cross_entropy(model, data, collator, 2))
    assert evaluate_model(model, tokenizer, data, collator, 2, max_new_tokens=3)["exact_match"] in (0, 1 / 3, 2 / 3, 1)


def test_retained_language_is_the_mean_over_all_next_tokens_of_the_text(tokenizer):
    model, collator = tiny_llama(32, 2), DistillationCollator(tokenizer)
    texts = ["Ann has 3 pens.", "Bob has cups.", "Two"]
    retention = load_retention(
        DataArguments(dataset_name="data"),
        Dataset.from_list([{"question": t, "answer": "7"} for t in texts]),
        tokenizer,
    )
    losses = []
    for tokens in (torch.tensor([tokenizer(text)["input_ids"]]) for text in texts):
        predicted = model(tokens).logits[0, :-1].log_softmax(-1)
        losses += [-row[token].item() for row, token in zip(predicted, tokens[0, 1:], strict=True)]
    data = Dataset.from_list(random_examples(3))
    state = torch.get_rng_state()
    found = evaluate_with_answers(model, tokenizer, data, collator, 2, retention=retention).figures
    assert found["retention_cross_entropy"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert torch.equal(torch.get_rng_state(), state)
    alone = evaluate_model(model, tokenizer, data, collator, 2)
    assert alone == {**found, "retention_cross_entropy": None}
