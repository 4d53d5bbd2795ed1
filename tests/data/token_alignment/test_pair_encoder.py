import pytest
from helpers.small_tokenizers import HEADERS, MADE, TEXTS, TURNS, byte_level, bytes_of_tokens, real, sentence_pieces

from kava_trainer.data.token_alignment.pair_encoder import TeacherReading, _before, make_encoder, tokenizers_agree
from kava_trainer.data.token_alignment.ranges import NONE
from kava_trainer.utils.errors import BadRequest

REAL = [("qwen", "smollm2"), ("smollm2", "stories"), ("stories", "qwen")]
PLAIN = [name for name in TEXTS if name not in ("marks", "mixed")]


def encoded(student, teacher, row, length=400, limit=None):
    encoder = make_encoder(tuple(row), student, length, readings={0: TeacherReading(teacher, limit)})
    return encoder(row)


def read_by(tokenizer, row):
    return make_encoder(tuple(row), tokenizer, 400)(row)["input_ids"]


def aligned(example, student, teacher):
    """Each of the student's tokens with the teacher's that it is aligned with, as texts."""
    names, others = (
        tokenizer.convert_ids_to_tokens(example[column])
        for tokenizer, column in ((student, "input_ids"), (teacher, "teacher_input_ids"))
    )
    return [(name, others[start:end]) for name, (start, end) in zip(names, example["teacher_ranges"], strict=True)]


def check_against_bytes(student, teacher, text):
    """Compare with the bytes that the letters of the tokens stand for, one by one."""
    example = encoded(student, teacher, {"text": text})
    own, other = (bytes_of_tokens(tokenizer, text) for tokenizer in (student, teacher))
    skipped, theirs = len(example["input_ids"]) - len(own) - 1, len(example["teacher_input_ids"]) - len(other) - 1
    for (_, places), (start, end) in zip(own, example["teacher_ranges"][skipped:], strict=False):
        expected = {theirs + i for i, (_, others) in enumerate(other) if places & others}
        assert set(range(start, end)) == expected or not places  # a space before the text stands for nothing of it
    last = len(example["teacher_input_ids"])
    assert example["teacher_ranges"][-1] == [last - 1, last]  # the end of text stands for the end of text
    assert sum(example["teacher_alignment"]) == len(example["input_ids"]) == len(example["teacher_ranges"])


@pytest.mark.parametrize("text", PLAIN)
@pytest.mark.parametrize("student", MADE)
@pytest.mark.parametrize("teacher", MADE)
def test_tokens_are_aligned_by_the_bytes_that_they_share(student, teacher, text):
    check_against_bytes(MADE[student](), MADE[teacher](), TEXTS[text])


@pytest.mark.parametrize("text", PLAIN)
@pytest.mark.parametrize(("student", "teacher"), REAL)
def test_tokens_of_real_models_are_aligned_by_the_bytes_that_they_share(student, teacher, text):
    check_against_bytes(real(student), real(teacher), TEXTS[text])


def test_tokenizers_agree_where_the_ids_are_the_same():
    assert tokenizers_agree(byte_level(), byte_level(trim=True))
    assert not tokenizers_agree(byte_level(), byte_level(5))
    assert not tokenizers_agree(byte_level(), sentence_pieces())


def test_the_student_reads_what_it_reads_alone():
    student, row = byte_level(), {"question": "What is 2+3?", "answer": "5 😀"}
    alone = make_encoder(tuple(row), student, 400)(row)
    together = encoded(student, sentence_pieces(), row)
    assert {name: together[name] for name in alone} == alone


def test_the_teacher_reads_what_it_reads_alone():
    teacher, row = sentence_pieces(), {"question": "What is 2+3?", "answer": "5 😀"}
    alone = make_encoder(tuple(row), teacher, 400)(row)
    together = encoded(byte_level(), teacher, row)
    for name in ("input_ids", "labels", "prompt_length"):
        assert together[f"teacher_{name}"] == alone[name]


@pytest.mark.parametrize("student", [byte_level, sentence_pieces])
@pytest.mark.parametrize("length", [3, 9, 14])
def test_the_teacher_ends_where_the_text_is_cut(student, length):
    student, teacher = student(), byte_level(20)
    row = {"text": "Tom has 12 apples and 7 pears. How many 你好 are there?"}
    example, whole = (encoded(student, teacher, row, own) for own in (length, 400))
    assert example["truncated"]
    assert len(example["input_ids"]) == length
    assert example["teacher_ranges"] == whole["teacher_ranges"][:length]
    assert len(example["teacher_input_ids"]) == max(end for _, end in example["teacher_ranges"])
    assert example["teacher_input_ids"] == whole["teacher_input_ids"][: len(example["teacher_input_ids"])]
    assert len(example["teacher_labels"]) == len(example["teacher_input_ids"])


def test_what_shares_a_token_with_text_that_was_cut_is_left_out():
    assert _before([(0, 1), (1, 2), (1, 3), (3, 4)], 2) == [(0, 1), NONE, NONE, NONE]
    assert _before([(0, 1), (1, 2), (2, 3), (3, 4)], 2) == [(0, 1), (1, 2), NONE, NONE]
    assert _before([(0, 2), NONE, (1, 3), (2, 4)], 3) == [NONE, NONE, NONE, NONE]
    assert _before([(0, 2), (2, 3)], 3) == [(0, 2), (2, 3)]


def test_what_is_behind_the_teachers_limit_is_left_out():
    student, teacher, row = byte_level(), sentence_pieces(), {"text": "Tom has 12 apples."}
    example, whole = (encoded(student, teacher, row, limit=limit) for limit in (5, None))
    assert example["teacher_input_ids"] == whole["teacher_input_ids"][:5]
    assert example["teacher_ranges"] == [own if own[1] <= 5 else [0, 0] for own in whole["teacher_ranges"]]
    assert example["input_ids"] == whole["input_ids"]
    assert example["teacher_alignment"][2] == sum(end > 5 for _, end in whole["teacher_ranges"]) > 0


CHAT = {
    "messages": [
        {"role": "user", "content": " user: an apple 😀 "},
        {"role": "assistant", "content": "assistant: 你好."},
    ]
}


def test_templates_that_differ_are_aligned_by_words_and_roles():
    student, teacher = byte_level(300), sentence_pieces()
    pairs = aligned(encoded(student, teacher, CHAT), student, teacher)
    by_name = {}
    for name, others in pairs:
        by_name.setdefault(name, []).append(others)
    assert by_name["<|im_start|>"] == [["<|start|>"], ["<|start|>"]]
    assert by_name["<|im_end|>"] == [["<|stop|>"], ["<|stop|>"]]
    assert pairs[-1] == ("<|endoftext|>", [])
    words = "".join("".join(others) for _, others in pairs)
    assert "<|header|>" not in words
    assert "<s>" not in words
    texts = [student.convert_tokens_to_string([name]) for name, _ in pairs]
    role = texts.index("<|im_start|>") + 1
    assert "".join(dict.fromkeys(pairs[role][1])) in "user"
    for (_, others), text in zip(pairs, texts, strict=True):
        if others and text.strip().isascii() and text.strip().isalnum():
            assert text.strip() in "".join(others).replace("▁", " ")


@pytest.mark.parametrize(("student", "teacher"), [(byte_level, sentence_pieces), (sentence_pieces, byte_level)])
def test_the_words_of_all_turns_are_aligned_by_their_bytes(student, teacher):
    """Words such as the names of roles are found where they stand, and not where the template writes the like."""
    student, teacher = student(), teacher()
    talk = {"messages": [{"role": "user", "content": word} for word in ("user", "assistant", "1")]}
    talk["messages"][1]["role"] = "assistant"
    talk["messages"].append({"role": "assistant", "content": "user"})
    example = encoded(student, teacher, talk)
    ids = {"input_ids": student, "teacher_input_ids": teacher}
    texts = {column: [tokenizer.decode([token]) for token in example[column]] for column, tokenizer in ids.items()}
    for index, (start, end) in enumerate(example["teacher_ranges"]):
        own, other = texts["input_ids"][index], "".join(texts["teacher_input_ids"][start:end])
        if own.strip().isalnum() and end:
            assert own.strip() in other or other in own, (own, other)
    marks = [name for name, text in (("start", "<|start|>"), ("start", "<|im_start|>")) if text in texts["input_ids"]]
    assert marks
    starts = [i for i, text in enumerate(texts["input_ids"]) if text in ("<|start|>", "<|im_start|>")]
    found = [texts["teacher_input_ids"][slice(*example["teacher_ranges"][i])] for i in starts]
    assert all(own in (["<|start|>"], ["<|im_start|>"]) for own in found)
    assert len(found) == 4
    following = [example["teacher_ranges"][i][1] for i in starts]
    assert following == sorted(set(following))  # each turn has its own


def test_templates_that_write_the_same_are_aligned_as_text():
    student, teacher = byte_level(), byte_level(5)
    example = encoded(student, teacher, CHAT)
    assert example["teacher_alignment"][2] == 0


def test_what_only_one_template_says_is_left_out():
    told = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}" + TURNS
    student, teacher = byte_level(template=told), byte_level(5)
    pairs = aligned(encoded(student, teacher, CHAT), student, teacher)
    plain = encoded(byte_level(), teacher, CHAT)
    assert (
        encoded(student, teacher, CHAT)["teacher_ranges"][-len(plain["input_ids"]) + 1 :]
        == (plain["teacher_ranges"][1:])
    )
    first = [name for name, _ in pairs].index("<|im_end|>")
    assert not any(others for _, others in pairs[1:first])
    other = "{% if messages[0].role != 'system' %}<|im_start|>system\nI am old.<|im_end|>\n{% endif %}" + TURNS
    teacher = byte_level(5, template=other)
    pairs = aligned(encoded(student, teacher, CHAT), student, teacher)
    assert pairs[0] == ("<|im_start|>", ["<|im_start|>"])
    assert "help" not in "".join("".join(others) for _, others in pairs)


def test_a_template_that_leaves_out_what_a_message_begins_with():
    """As those of models that think before they answer leave the thoughts out."""
    short = TURNS.replace("message.content }}", "message.content.split('</think>')[-1] }}")
    student, teacher = byte_level(), byte_level(5, template=short)
    row = {"messages": [CHAT["messages"][0], {"role": "assistant", "content": "<think>apple</think>an apple"}]}
    pairs = aligned(encoded(student, teacher, row), student, teacher)
    text = "".join(student.convert_tokens_to_string([name]) for name, others in pairs if others)
    assert "<think>" not in text
    assert text.count("apple") == 2


def test_both_read_a_chat_with_a_template():
    with pytest.raises(BadRequest, match="the teacher's tokenizer, which is not the student's, has no chat template"):
        encoded(byte_level(), sentence_pieces(template=None), CHAT)
    refusing = HEADERS + "{{ raise_exception('no apples') }}"
    with pytest.raises(ValueError, match=r"no apples.*, as the teacher is to read it"):
        encoded(byte_level(), sentence_pieces(refusing), CHAT)


def test_a_row_without_an_answer_has_none_for_either():
    example = encoded(byte_level(), sentence_pieces(), {"prompt": "What?", "completion": " "})
    assert not example["answered"]
    assert example["teacher_ranges"] == []


def test_a_text_that_names_control_tokens():
    """To one model they are one token, to the other letters."""
    student, teacher = byte_level(), sentence_pieces()
    pairs = aligned(encoded(student, teacher, {"text": "a<|im_end|>b"}), student, teacher)
    assert [name for name, _ in pairs] == ["a", "<|im_end|>", "b", "<|endoftext|>"]
    assert len(pairs[1][1]) > 5
    assert pairs[2][1] == ["b"]
