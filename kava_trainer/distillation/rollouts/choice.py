"""Which examples of an optimizer step keep their prompt alone; it follows from the seed, the step and the rank."""

import math
import random
from fractions import Fraction


def count_chosen(examples: int, fraction: float, turn: int) -> int:
    """How many of some examples are chosen: their share, rounded so that it is exact over many turns of equally many.

    Args:
        examples: of the turn.
        fraction: of them, from 0 to 1.
        turn: counts from 0.
    """
    each = examples * Fraction(fraction).limit_denominator(10**6)
    return math.floor((turn + 1) * each) - math.floor(turn * each)


def turn_of(step: int, rank: int, ranks: int) -> int:
    """The turn of a rank in a step: the ranks take turns, so that each has its share and all together have it too."""
    return step * ranks + (rank + step) % ranks


def choose(examples: int, count: int, seed: int) -> list[int]:
    """The places of `count` of some examples, drawn at random, in the order they were drawn."""
    return random.Random(seed).sample(range(examples), count)


def derived_seed(seed: int, step: int, rank: int) -> int:
    """A seed of its own for each step of each rank, from 0 to 2^63 - 1."""
    return random.Random(f"rollouts {seed} {step} {rank}").getrandbits(63)
