import random

from kava_trainer.data.token_alignment.ranges import NONE, count_kinds, overlapping


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


def test_kinds_are_counted():
    assert count_kinds([(0, 1), (1, 3), (3, 4), (3, 4), NONE]) == [1, 3, 1]
    assert count_kinds([(0, 1), (1, 2)]) == [2, 0, 0]
    assert count_kinds([(0, 1), (0, 2)]) == [0, 2, 0]
    assert count_kinds([]) == [0, 0, 0]
