"""What several arguments say together, before anything is loaded."""

import pytest

from kava_trainer.config.checks import heaviest_alignment, usual_dropout


@pytest.mark.parametrize(
    ("weights", "name"),
    [
        ({"mercator_weight": 3.0, "mse_weight": 0.2}, "mercator_weight"),
        ({"mercator_weight": 0.0, "relative_mse_weight": 15.0}, "relative_mse_weight"),
        ({"mercator_weight": 0.0, "mse_weight": None}, "mercator_weight"),
        ({}, "mercator_weight"),
    ],
)
def test_advice_names_the_weight_that_there_is(weights, name):
    assert heaviest_alignment(weights) == name


@pytest.mark.parametrize(
    ("anchor", "init", "dropout"),
    [
        ("none", "least_squares", 0.0),
        ("pca", "random", 0.0),
        ("none", "random", 0.1),
        ("reconstruction", "random", 0.1),
    ],
)
def test_a_projector_that_starts_from_a_fit_has_no_dropout(anchor, init, dropout):
    assert usual_dropout(anchor, init) == dropout
