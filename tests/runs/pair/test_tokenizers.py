import json
from contextlib import nullcontext

import pytest
from datasets import Dataset, DatasetDict
from helpers.programs import QUICKSTART, SHORT, words
from helpers.small_tokenizers import byte_level, sentence_pieces
from transformers import LlamaConfig

from kava_trainer import encode
from kava_trainer.config.data_arguments import DataArguments
from kava_trainer.config.parser import parse_arguments
from kava_trainer.data.encoding import encode_dataset
from kava_trainer.data.retention import load_retention
from kava_trainer.data.token_alignment.pair_encoder import TeacherReading
from kava_trainer.data.token_alignment.ranges import as_the_teacher_reads, read_by_the_teacher
from kava_trainer.runs.advice import on_format
from kava_trainer.runs.identity import data_digest
from kava_trainer.runs.pair.tokenizers import (
    alignment_shares,
    check_teacher_answers,
    few_aligned,
    load_tokenizers,
    teacher_readings,
    tell_tokenizers,
)
from kava_trainer.utils.console import Console
from kava_trainer.utils.errors import BadRequest

ROWS = Dataset.from_list([{"prompt": "Tom has 12 apples.", "completion": " 7 😀"}, {"prompt": "a", "completion": "b"}])


def test_shares_are_told(capsys):
    shares = tell_tokenizers(Console(plain=True), {0: [60, 30, 10], 2: [1, 0, 3]})
    assert shares[0] == {"one_to_one": 0.6, "merged": 0.3, "left_out": 0.1, "tokens": 100}
    assert shares[2]["left_out"] == 0.75
    out = capsys.readouterr().out
    assert "of 100 tokens of the student 60.0 % are aligned one to one, 30.0 % merged, 10.0 % left out." in out
    assert "The tokenizers of teacher 3 and student differ" in out
    assert out.count("teaches little") == 1
    assert tell_tokenizers(Console(plain=True), {}) == {}
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("counts", "told"), [([49, 0, 51], True), ([0, 50, 50], False), ([1, 0, 3], True)])
def test_less_than_half_is_a_warning(counts, told):
    problem = few_aligned(alignment_shares(counts))
    assert (problem is not None) == told
    if problem is not None:
        assert str(problem).startswith(f"Only {100 * (1 - counts[2] / sum(counts)):.1f} % of the student's tokens")


def test_what_a_causal_alignment_leaves_out_is_no_fault_of_a_template():
    problem = few_aligned({"one_to_one": 0.28, "merged": 0.0, "left_out": 0.72, "tokens": 100}, causal=True)
    assert str(problem).startswith(
        "Only 28.0 % of the student's tokens are aligned; of causal ones those that end inside"
    )
    assert few_aligned({"one_to_one": 0.6, "merged": 0.0, "left_out": 0.4, "tokens": 100}, causal=True) is None


def test_data_of_another_teacher_are_others():
    digests = [
        data_digest(encode(ROWS, byte_level(), 64, teacher_tokenizer=teacher))
        for teacher in (None, sentence_pieces(), byte_level(5))
    ]
    assert len(set(digests)) == 3
    assert data_digest(encode(ROWS, byte_level(), 64, teacher_tokenizer=sentence_pieces())) == digests[1]


def test_data_aligned_by_another_rule_are_others():
    read = {"teacher_tokenizer": byte_level()}
    rules = [encode(ROWS, sentence_pieces(), 64, token_alignment=rule, **read) for rule in ("overlap", "causal")]
    assert data_digest(rules[0]) != data_digest(rules[1])
    keys = {TeacherReading(byte_level(), causal=causal).key("content") for causal in (False, True)}
    assert len(keys) == 2
    with pytest.warns(UserWarning, match="token_alignment causal has no effect"):
        encode(ROWS, byte_level(), 64, token_alignment="causal", **read)
    with pytest.raises(BadRequest, match="token_alignment is 'mean'; write overlap"):
        encode(ROWS, sentence_pieces(), 64, token_alignment="mean", **read)


def asked_of(folder, **changes):
    return parse_arguments(words(QUICKSTART | SHORT | {"output_dir": folder / "out", **changes}))


@pytest.mark.parametrize("rule", ["overlap", "causal"])
def test_the_rule_of_the_arguments_is_read(tmp_path, rule):
    folder = tmp_path / "student"
    sentence_pieces().save_pretrained(folder)
    LlamaConfig(vocab_size=400).save_pretrained(folder)
    asked = asked_of(tmp_path, student_model_name_or_path=folder, token_alignment=rule)
    readings = teacher_readings(asked, sentence_pieces())
    assert readings[0].causal == (rule == "causal")
    counts = encode_dataset(ROWS, sentence_pieces(), 64, "Tokenizing", readings=readings).token_alignment[0]
    assert (counts[2] > sum(counts) / 4) == (rule == "causal")


@pytest.mark.parametrize(("rule", "told"), [("overlap", False), ("causal", True)])
def test_a_rule_that_nothing_reads_is_told(tmp_path, rule, told):
    asked = asked_of(tmp_path, token_alignment=rule)
    rows = ({"text": "a"}, {"messages": [{"role": "user", "content": "a"}]})
    for row in rows:
        problems = on_format(asked, load_tokenizers(asked), [*row], row)[1]
        assert any("token_alignment causal has no effect" in str(problem) for problem in problems) == told


@pytest.mark.parametrize(("limit", "refused"), [(4, True), (10, True), (40, False), (None, False)])
def test_a_teacher_that_reads_no_answer_is_refused(limit, refused):
    reading = TeacherReading(sentence_pieces(), limit)
    encoded = encode_dataset(ROWS.select([0]), byte_level(), 64, "Tokenizing", readings={0: reading})
    with pytest.raises(BadRequest, match=f"reads {limit} tokens at most") if refused else nullcontext():
        check_teacher_answers(encoded.dataset, reading)
    check_teacher_answers(None, reading)
    check_teacher_answers(ROWS, None)


def test_a_teacher_that_cannot_read_one_of_the_prompts_is_refused():
    reading = TeacherReading(sentence_pieces(), 40)
    rows = Dataset.from_list(
        [{"prompt": "Tom has 12 apples. " * 8, "completion": " 7"}, {"prompt": "a", "completion": "b"}]
    )
    encoded = encode_dataset(rows, byte_level(), 400, "Tokenizing", readings={0: reading})
    with pytest.raises(BadRequest, match="a held-out prompt takes"):
        check_teacher_answers(encoded.dataset, reading)
    check_teacher_answers(encoded.dataset.select([1]), reading)


def test_a_stream_is_encoded_as_its_rows_are():
    asked = {"max_length": 64, "teacher_tokenizer": sentence_pieces()}
    streamed = list(encode(ROWS.to_iterable_dataset(), byte_level(), **asked))
    assert streamed == list(encode(ROWS, byte_level(), **asked))
    assert set(streamed[0]) == {"input_ids", "labels", "teacher_input_ids", "teacher_ranges"}
    splits = encode(DatasetDict({"train": ROWS}), byte_level(), **asked)
    assert list(splits["train"]) == streamed


def test_retained_language_is_the_same_text_for_both():
    asked = DataArguments(dataset_name="any", max_length=6)
    student, teacher = byte_level(), sentence_pieces()
    found = load_retention(asked, ROWS.select([0]), student, TeacherReading(teacher))
    theirs = as_the_teacher_reads(found)
    assert theirs.column_names == ["input_ids", "labels"]
    texts = [
        tokenizer.decode(own["input_ids"][0], skip_special_tokens=True)
        for tokenizer, own in ((student, found), (teacher, theirs))
    ]
    assert texts[0].strip() == texts[1].strip() != ""
    assert load_retention(asked, ROWS.select([0]), student).column_names == ["input_ids", "labels"]


def test_the_teacher_reads_its_own_columns():
    example = {"input_ids": [1], "labels": [1], "prompt_length": 0, "answer_text": "b", "teacher_input_ids": [2, 3]}
    example |= {"teacher_labels": [2, 3], "teacher_prompt_length": 1, "teacher_ranges": [[0, 2]]}
    expected = {"input_ids": [2, 3], "labels": [2, 3], "prompt_length": 1, "answer_text": "b"}
    assert read_by_the_teacher([example]) == [expected]
    assert as_the_teacher_reads(Dataset.from_list([example]))[0] == expected
    plain = {"input_ids": [1], "labels": [1]}
    assert read_by_the_teacher([plain]) == [plain]
    assert as_the_teacher_reads(Dataset.from_list([plain]))[0] == plain


@pytest.mark.parametrize("second", ["quickstart", "other"])
def test_a_default_divergence_stands_aside_for_any_teacher_of_other_tokens(tmp_path, second):
    tokenizer, folder = byte_level(60, template=None), tmp_path / "other"
    tokenizer.save_pretrained(folder)
    LlamaConfig(vocab_size=len(tokenizer)).save_pretrained(folder)
    named = [{"model": "quickstart"}, {"model": "quickstart" if second == "quickstart" else str(folder)}]
    asked = {"student_config_name": "quickstart", "dataset_name": "quickstart", "output_dir": tmp_path, "use_cpu": True}
    arguments = parse_arguments(words({**asked, "teachers": json.dumps(named)}))
    before = arguments.training.kd_weight
    load_tokenizers(arguments)
    assert before > 0
    assert arguments.training.kd_weight == (before if second == "quickstart" else 0.0)
