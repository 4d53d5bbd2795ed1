import pytest
from helpers.small_tokenizers import MADE, TEXTS, bytes_of_tokens, real
from transformers import PreTrainedTokenizer

from kava_trainer.data.token_alignment.spans import TokenSpans, exact_spans
from kava_trainer.utils.errors import BadRequest

SAME_LETTERS = [name for name in TEXTS if name not in ("marks", "mixed")]


def check(tokenizer, text):
    ids, spans = TokenSpans(tokenizer, "teacher")(text, add_special_tokens=False)
    expected = bytes_of_tokens(tokenizer, text)
    assert ids == [token for token, _ in expected]
    assert [set(range(*span)) for span in spans] == [places for _, places in expected]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", [kind for kind in MADE if kind != "pieces"])
def test_tokens_of_bytes_stand_for_their_own_bytes(kind, text):
    check(MADE[kind](), TEXTS[text])


@pytest.mark.parametrize("text", SAME_LETTERS)
def test_pieces_and_single_bytes_stand_for_their_own_bytes(text):
    check(MADE["pieces"](), TEXTS[text])


@pytest.mark.parametrize("text", SAME_LETTERS)
@pytest.mark.parametrize("name", ["qwen", "smollm2", "stories"])
def test_tokens_of_real_models_stand_for_their_own_bytes(name, text):
    check(real(name), TEXTS[text])


def test_a_mark_belongs_to_the_character_that_it_is_composed_with():
    """A normaliser makes one character of the two, and the offsets of its token end before the mark."""
    assert exact_spans("e\u0301 a", [(0, 1), (2, 4)], ["é".encode(), b" a"]) == [(0, 3), (3, 5)]
    assert exact_spans("xe\u0301", [(0, 1), (1, 2)], [b"x", "é".encode()]) == [(0, 1), (1, 4)]
    assert exact_spans("학.", [(0, 1), (2, 3)], ["학".encode(), b"."]) == [(0, 6), (6, 7)]


def test_white_space_that_offsets_leave_out_belongs_to_the_token_that_holds_it():
    assert exact_spans("a  b", [(0, 1), (2, 2), (3, 4)], [b"a", b" ", b" b"]) == [(0, 1), (1, 2), (2, 4)]
    assert exact_spans("a \nb", [(0, 1), (3, 4)], [b"a \n", b"b"]) == [(0, 3), (3, 4)]
    assert exact_spans("a  b", [(0, 1), (3, 4)], [b"a", b"b"]) == [(0, 1), (3, 4)]  # nobody holds it


def test_tokens_that_share_a_character_as_none_of_them_tells_stand_for_all_of_it():
    assert exact_spans("x½y", [(0, 1), (1, 2), (1, 2), (2, 3)], [b"x", b"12", b"34", b"y"])[1:3] == [(1, 3), (1, 3)]


def test_tokens_around_a_text_stand_for_nothing_of_it():
    ids, spans = TokenSpans(MADE["pieces"](), "student")("an apple", add_special_tokens=True)
    assert ids[0] == 1
    assert spans[0] == (0, 0)
    assert spans[-1][1] == len("an apple")


class Slow(PreTrainedTokenizer):
    """One without offsets."""

    vocab_size = 1

    def get_vocab(self):
        return {"a": 0}


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_slow_tokenizer_is_refused(role):
    with pytest.raises(BadRequest, match=rf"^The {role}'s tokenizer, a Slow, does not tell which characters"):
        TokenSpans(Slow(), role)
