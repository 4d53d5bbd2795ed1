from kava_trainer.models.pruning.cut import Cut
from kava_trainer.models.pruning.search import Removal
from kava_trainer.reports.cut.table import blocks_text, cut_lines, cut_rows, cut_sentence, described


def test_the_table_tells_the_fate_of_every_layer():
    cut = described(Cut("search", 4, [0, 3], [0.5, 0.1, 0.2, 0.4], [Removal(2, 1.5), Removal(1, 2.25)]))
    assert [(row.layer, row.importance, row.fate, row.is_kept) for row in cut_rows(cut)] == [
        ("0", "0.5000", "layer 0", True),
        ("1", "0.1000", "left out as number 2: loss 2.250", False),
        ("2", "0.2000", "left out as number 1: loss 1.500", False),
        ("3", "0.4000", "layer 1", True),
    ]
    assert len(cut_lines(cut)) == 6
    assert "neurons" not in cut
    assert cut_sentence(cut).startswith("2 of the teacher's 4 layers (those were left out, one by one")


def test_what_was_not_measured_has_no_table():
    cut = described(Cut("uniform", 4, [0, 1, 3], None, [], [[0, 1]] * 3, [[0]] * 3))
    assert cut_rows(cut) == []
    (line,) = cut_lines(cut)
    assert line == (
        "Student: 3 of the teacher's 4 layers (evenly spaced); of each layer the most active 2 neurons and 1 groups of "
        "attention heads: 0-1, 3"
    )


def test_blocks_are_written_as_ranges():
    assert blocks_text([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert blocks_text([4]) == "4"
