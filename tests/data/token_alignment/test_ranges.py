import random

from kava_trainer.data.token_alignment.ranges import NONE, aligned_tokens, compared_from_to, count_kinds, overlapping


def slow_overlaps(student, teacher):
    return [{i for i, other in enumerate(teacher) if set(range(*own)) & set(range(*other))} for own in student]


def cut(random_numbers, length):
    """Spans that cover a text, some of which are empty."""
    places = sorted(random_numbers.choices(range(length + 1), k=random_numbers.randint(1, 12)))
    return list(zip([0, *places], [*places, length], strict=True))


def test_ranges_are_the_tokens_that_share_a_byte():
    random_numbers = random.Random(0)
    for _ in range(300):
        length = random_numbers.randint(1, 20)
        student, teacher = cut(random_numbers, length), cut(random_numbers, length)
        ranges = overlapping(student, teacher)
        for (start, end), expected in zip(ranges, slow_overlaps(student, teacher), strict=True):
            filled = {i for i in range(start, end) if teacher[i][0] < teacher[i][1]}
            assert filled == expected
            assert (start in expected and end - 1 in expected) or ((start, end) == NONE and not expected)


def test_what_no_token_of_the_teacher_stands_for_has_no_range():
    assert overlapping([(0, 2), (2, 5), (5, 6)], [(0, 2), (5, 6)]) == [(0, 1), NONE, (1, 2)]
    assert overlapping([(3, 3), (0, 0)], [(0, 6)]) == [NONE, NONE]
    assert overlapping([(0, 4)], []) == [NONE]


def test_causal_ranges_know_which_tokens_have_read_no_further():
    random_numbers = random.Random(1)
    left_out = 0
    for _ in range(300):
        length = random_numbers.randint(1, 20)
        student, teacher = cut(random_numbers, length), cut(random_numbers, length)
        plain, causal = overlapping(student, teacher), overlapping(student, teacher, causal=True)
        assert [own[:2] for own in causal] == plain
        for (_, stop), own, expected in zip(student, causal, slow_overlaps(student, teacher), strict=True):
            first, last = compared_from_to(own)
            filled = {i for i in range(first, last) if teacher[i][0] < teacher[i][1]}
            assert filled == {i for i in expected if teacher[i][1] <= stop}
            left_out += bool(expected) and first == last
    assert left_out > 100


def test_a_character_inside_a_word_has_nothing_that_has_read_no_further():
    word, characters = [(0, 4), (4, 5)], [(place, place + 1) for place in range(5)]
    assert overlapping(characters, word, causal=True) == [(0, 1, 0), (0, 1, 0), (0, 1, 0), (0, 1, 1), (1, 2, 2)]
    assert overlapping([(0, 5)], word, causal=True) == [(0, 2, 2)]
    assert overlapping([(0, 2), (2, 5)], [(0, 1), (1, 3), (3, 5)], causal=True) == [(0, 2, 1), (1, 3, 3)]
    assert overlapping([(3, 3)], word, causal=True) == [(0, 0, 0)]


def test_kinds_are_counted():
    assert count_kinds([(0, 1, 0), (0, 1, 1), (1, 3, 3), (3, 5, 4)]) == [2, 1, 1]
    assert aligned_tokens([{"input_ids": [5, 6, 7], "teacher_ranges": [[0, 1, 0], [0, 1, 1], [0, 0, 0]]}]) == 1
    assert count_kinds([(0, 1), (1, 3), (3, 4), (3, 4), NONE]) == [1, 3, 1]
    assert count_kinds([(0, 1), (1, 2)]) == [2, 0, 0]
    assert count_kinds([(0, 1), (0, 2)]) == [0, 2, 0]
    assert count_kinds([]) == [0, 0, 0]
