"""Matrices of slow tests, of which every run of CI does a selection."""

import itertools

import pytest


def matrix(cells, chosen):
    """The cells of a matrix of slow tests; those that are not chosen for every run of CI are marked `exhaustive`.

    Args:
        cells: tuples of values.
        chosen: takes the numbers of the values and tells whether the cell is in the selection.
    """
    values = [list(dict.fromkeys(column)) for column in zip(*cells, strict=True)]
    places = [tuple(column.index(value) for column, value in zip(values, cell, strict=True)) for cell in cells]
    selection = [place for place in places if chosen(*place)]
    for first, second in itertools.combinations(range(len(values)), 2):
        everywhere = {(place[first], place[second]) for place in places}
        assert {(place[first], place[second]) for place in selection} == everywhere, (first, second)
    marks = [() if place in selection else pytest.mark.exhaustive for place in places]
    return [pytest.param(*cell, marks=mark) for cell, mark in zip(cells, marks, strict=True)]


def a_quarter(a, b, c, d, e):
    """Of a matrix of five settings with two values each the quarter in which each pair of values occurs twice."""
    return d == a ^ b and e == a ^ c
