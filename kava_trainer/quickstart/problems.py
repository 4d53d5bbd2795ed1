"""Arithmetic word problems in GSM8K's own form, made from a seed.

Every problem is a question and a worked answer: one calculation a line, each with its calculator note
(`<<23+14=37>>`), and the result behind `####`. The splits never share a question: which split a question belongs
to follows from its text alone, whatever the seed and the count.
"""

import random
import zlib
from collections.abc import Callable

NAMES = ("Ava", "Ben", "Cara", "Dan", "Ella", "Finn", "Gina", "Hugo", "Iris", "Jack", "Lena", "Max", "Nina", "Omar")

ITEMS = ("apples", "pears", "books", "coins", "cards", "shells", "stamps", "beads", "eggs", "pens")

SPLITS = ("train", "test")

HELD_OUT_SHARE = 8
"""One question in this many belongs to the `test` split."""

Problem = dict[str, str]


def _step(left: int, operator: str, right: int, unit: str) -> tuple[str, int]:
    result = {"+": left + right, "-": left - right, "*": left * right, "/": left // max(right, 1)}[operator]
    return f"{left}{operator}{right}=<<{left}{operator}{right}={result}>>{result} {unit}", result


def _problem(question: str, lines: list[str], result: int) -> Problem:
    return {"question": question, "answer": "\n".join([*lines, f"#### {result}"])}


def _buy_and_give(rng: random.Random, name: str, item: str) -> Problem:
    have, bought = rng.randint(10, 70), rng.randint(5, 60)
    given = rng.randint(2, min(have + bought - 1, 60))
    question = (
        f"{name} has {have} {item}. {name} buys {bought} more {item} and gives {given} to a friend. "
        f"How many {item} does {name} have left?"
    )
    first, total = _step(have, "+", bought, item)
    second, left = _step(total, "-", given, item)
    return _problem(question, [f"{name} has {first}.", f"Then {name} has {second} left."], left)


def _boxes(rng: random.Random, name: str, item: str) -> Problem:
    boxes, each, loose = rng.randint(2, 9), rng.randint(2, 12), rng.randint(3, 60)
    question = (
        f"{name} has {loose} {item} and finds {boxes} boxes with {each} {item} in each. "
        f"How many {item} does {name} have in total?"
    )
    first, inside = _step(boxes, "*", each, item)
    second, total = _step(loose, "+", inside, item)
    return _problem(question, [f"The boxes hold {first}.", f"In total {name} has {second}."], total)


def _times_as_many(rng: random.Random, name: str, item: str) -> Problem:
    times, count = rng.randint(2, 5), rng.randint(4, 30)
    other = rng.choice([candidate for candidate in NAMES if candidate != name])
    question = (
        f"{name} has {count} {item}. {other} has {times} times as many {item}. How many {item} do they have together?"
    )
    first, others = _step(times, "*", count, item)
    second, total = _step(count, "+", others, item)
    return _problem(question, [f"{other} has {first}.", f"Together they have {second}."], total)


def _change(rng: random.Random, name: str, item: str) -> Problem:
    count, price = rng.randint(2, 9), rng.randint(2, 11)
    paid = count * price + rng.randint(1, 40)
    question = (
        f"{name} buys {count} {item} for {price} dollars each and pays with {paid} dollars. "
        f"How many dollars does {name} get back?"
    )
    first, cost = _step(count, "*", price, "dollars")
    second, back = _step(paid, "-", cost, "dollars")
    return _problem(question, [f"The {item} cost {first}.", f"{name} gets back {second}."], back)


def _share(rng: random.Random, name: str, item: str) -> Problem:
    friends, each = rng.randint(2, 9), rng.randint(3, 12)
    extra = rng.randint(2, 40)
    question = (
        f"{name} shares {friends * each} {item} equally among {friends} bags and then adds {extra} {item} to one bag. "
        f"How many {item} are in that bag?"
    )
    first, per_bag = _step(friends * each, "/", friends, item)
    second, total = _step(per_bag, "+", extra, item)
    return _problem(question, [f"Each bag holds {first}.", f"That bag has {second}."], total)


def _three_days(rng: random.Random, name: str, item: str) -> Problem:
    monday, tuesday = rng.randint(5, 50), rng.randint(5, 40)
    lost = rng.randint(2, min(monday + tuesday - 1, 40))
    added = rng.randint(2, 30)
    question = (
        f"{name} collects {monday} {item} on Monday and {tuesday} on Tuesday, loses {lost} on Wednesday "
        f"and finds {added} on Thursday. How many {item} does {name} have then?"
    )
    first, total = _step(monday, "+", tuesday, item)
    second, left = _step(total, "-", lost, item)
    third, final = _step(left, "+", added, item)
    days = zip(("Tuesday", "Wednesday", "Thursday"), (first, second, third), strict=True)
    return _problem(question, [f"On {day} {name} has {step}." for day, step in days], final)


_KINDS: tuple[Callable[[random.Random, str, str], Problem], ...] = (
    _buy_and_give,
    _boxes,
    _times_as_many,
    _change,
    _share,
    _three_days,
)


def split_of(question: str) -> str:
    """The split that owns a question: `test` for one question in `HELD_OUT_SHARE`, else `train`."""
    return "test" if zlib.crc32(question.encode()) % HELD_OUT_SHARE == 0 else "train"


def generate_problems(count: int, split: str = "train", seed: int = 0) -> list[Problem]:
    """Make `count` different problems of one split.

    Args:
        count: how many problems.
        split: `train` or `test`; no question of one is ever found in the other.
        seed: the same seed gives the same problems in the same order.

    Returns:
        Dictionaries with the keys `question` and `answer`, as in GSM8K.

    Raises:
        ValueError: if `split` is neither `train` nor `test`.
    """
    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r} in the quickstart data; write one of {', '.join(SPLITS)}.")
    rng = random.Random(f"{split}-{seed}")
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = rng.choice(_KINDS)(rng, rng.choice(NAMES), rng.choice(ITEMS))
        if split_of(problem["question"]) == split:
            problems.setdefault(problem["question"], problem)
    return list(problems.values())
