"""What the rows of a file are, on which line each begins, and what is said of a file that is broken."""

import io
import json

import pytest

from kava_trainer.data.readers import READERS, BrokenFile, restore, store


def rows(ending, content):
    """Lines and cells, restored."""
    file = io.BytesIO(content if isinstance(content, bytes) else content.encode())
    return [
        (line, {name: cell if cell is None else restore(cell) for name, cell in cells.items()})
        for line, cells in READERS[ending](file)
    ]


def cells(ending, content):
    return [row for _, row in rows(ending, content)]


def problem(ending, content):
    with pytest.raises(BrokenFile) as caught:
        rows(ending, content)
    return caught.value.problem


@pytest.mark.parametrize(
    ("literal", "text"),
    [
        ("0.10", "0.10"),
        ("1E3", "1E3"),
        ("-0", "-0"),
        ("1.0", "1.0"),
        ("123456789012345678901234567890", "123456789012345678901234567890"),
        ("0.1234567890123456789", "0.1234567890123456789"),
        ("1e400", "1e400"),
        ("true", "true"),
        ("false", "false"),
        ("null", None),
        ('""', ""),
        ('"null"', "null"),
        ('"2021-01-05"', "2021-01-05"),
        ('"007"', "007"),
        ('"[1]"', "[1]"),
        (r'"\u0000[1]"', "\0[1]"),
        ("NaN", "NaN"),
    ],
)
@pytest.mark.parametrize("ending", [".jsonl", ".ndjson", ".json"])
def test_a_json_cell_is_the_text_that_stands_there(ending, literal, text):
    line = f'{{"question": {literal}, "answer": "x"}}\n'
    expected = {"question": text, "answer": "x"}
    assert cells(ending, line) == [expected]
    assert cells(ending, line * 3) == [expected] * 3
    assert cells(ending, f"[{line},{line}]") == [expected] * 2


@pytest.mark.parametrize(
    "word", ["007", "1.0", "1e3", "2021-01-05", "NA", "N/A", "nan", "None", "null", "true", "TRUE", "-0", " x ", "0x1F"]
)
@pytest.mark.parametrize(("ending", "sign"), [(".csv", ","), (".tsv", "\t"), (".csv", ";"), (".csv", "|")])
def test_a_cell_of_delimited_text_is_the_text_that_stands_there(ending, sign, word):
    assert cells(ending, f"question{sign}answer\n{word}{sign}{word}\n") == [{"question": word, "answer": word}]
    assert cells(ending, f'question{sign}answer\n"{word}"{sign}"{word}"') == [{"question": word, "answer": word}]


def test_an_empty_and_a_missing_cell_are_empty():
    expected = [{"question": None, "answer": "a"}, {"question": "q", "answer": None}, {"question": "q"}]
    assert cells(".csv", "question,answer\n,a\nq,\nq\n") == expected
    assert cells(".jsonl", '{"question": null, "answer": "a"}\n{"question": "q", "answer": null}\n') == expected[:2]


def test_each_row_keeps_exactly_its_own_json():
    messages = [
        [{"role": "user", "content": "2021-01-05", "n": 1.5}, {"role": "assistant", "content": "5"}],
        [{"role": "assistant", "content": None, "tool_calls": [{"arguments": {"big": 12345678901234567890123}}]}],
        [{"content": "é\n\u2028", "role": "user", "empty": {}, "list": []}],
        "plain text",
        None,
    ]
    for content in (
        "".join(json.dumps({"messages": found}) + "\n" for found in messages),
        json.dumps([{"messages": found} for found in messages], ensure_ascii=False),
    ):
        found = [row["messages"] for row in cells(".json", content)]
        assert json.dumps(found) == json.dumps(messages)


@pytest.mark.parametrize(
    "value", ["a", "", "\0", "\0[]", "[1]", [], {}, [{"a": [1, 2.5, None, True]}], {"x": 10**40}, "é\r\n"]
)
def test_what_is_stored_comes_out_again(value):
    assert restore(store(value)) == value
    assert type(restore(store(value))) is type(value)


USER, SYSTEM = {"role": "user", "content": "7"}, {"role": "system", "content": "2021-01-05"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([{"text": "a"}, {"text": 0.5}], [{"text": "a"}, {"text": "0.5"}]),
        (["a", "b"], [{"text": "a"}, {"text": "b"}]),
        ({"version": "1", "data": [{"text": "a"}, {"text": 7}]}, [{"text": "a"}, {"text": "7"}]),
        ({"text": ["a", 1, None, 2.5]}, [{"text": "a"}, {"text": "1"}, {"text": None}, {"text": "2.5"}]),
        ({"prompt": ["a", 1], "n": [7, 2.5]}, [{"prompt": "a", "n": "7"}, {"prompt": "1", "n": "2.5"}]),
        ({"messages": [[USER], [SYSTEM]]}, [{"messages": [USER]}, {"messages": [SYSTEM]}]),
        ({"messages": [USER]}, [{"messages": [USER]}]),
        ({"prompt": [USER], "completion": [SYSTEM]}, [{"prompt": [USER], "completion": [SYSTEM]}]),
        ({"question": "a", "answer": 1}, [{"question": "a", "answer": "1"}]),
        ([], []),
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_the_shapes_of_a_json_file(value, expected, indent):
    assert cells(".json", json.dumps(value, indent=indent)) == expected


def test_objects_over_several_lines_are_rows_of_a_file_of_lines_too():
    text = '{\n"text": "a"\n}\n\n{"text": 0.10}\n'
    assert rows(".jsonl", text) == rows(".json", text) == [(None, {"text": "a"}), (None, {"text": "0.10"})]
    assert cells(".jsonl", '{"text": ["a"]}') == [{"text": ["a"]}]


@pytest.mark.parametrize(
    ("ending", "content", "lines"),
    [
        (".jsonl", '\n{"a": 1}\n\n \n{"a": 2}\r\n{"a": 3}', [2, 5, 6]),
        (".jsonl", b'\xef\xbb\xbf{"a": 1}\n{"a": 2}\n', [1, 2]),
        (".csv", 'a,b\n1,2\n\n"x\ny\n",3\n4,5\n', [2, 4, 7]),
        (".csv", '\n\na,b\r\n1,"\r\n"\r\n\r\n2,3\r\n', [4, 7]),
        (".tsv", '"a\nb"\tc\n1\t2\n', [3]),
    ],
)
def test_rows_know_the_line_on_which_they_begin(ending, content, lines):
    assert [line for line, _ in rows(ending, content)] == lines


def test_line_breaks_quotes_and_marks_within_a_cell_stay():
    content = b'\xef\xbb\xbfquestion,answer\r\n"a\r\nb\nc","say ""yes"", no"\r\nit\'s 5" long,\xe4\xb8\xad\r\n'
    assert cells(".csv", content) == [
        {"question": "a\r\nb\nc", "answer": 'say "yes", no'},
        {"question": "it's 5\" long", "answer": "中"},
    ]
    assert len(cells(".csv", "text\n" + "x" * 300_000 + "\n")[0]["text"]) == 300_000


def test_lines_longer_than_what_is_read_at_once_are_whole():
    long = [{"text": "é" * 2**20 + str(n)} for n in range(3)]
    assert cells(".jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in long)) == long


def test_a_file_of_one_line_is_joined_once():
    """Joined anew with every part that is read, the copies would grow with the square of its length."""

    class Part(bytes):
        copied = 0

        def __radd__(self, other):
            Part.copied += len(other)
            return bytes(other) + bytes(self)

    class File(io.BytesIO):
        def read(self, size=-1):
            return Part(super().read(size))

    text = "x" * (8 * 2**20)
    (row,) = READERS[".json"](File(f'[{{"text": "{text}"}}]'.encode()))
    assert row == (None, {"text": text})
    assert Part.copied == 0


@pytest.mark.parametrize(
    ("ending", "content", "expected"),
    [
        (".jsonl", '{"a": 1}\n\n{"a"\n', "line 3 is not valid JSON (Expecting ':' delimiter, column 5)."),
        (".jsonl", '{"a": 1\n{"a": 2}\n', "line 1 is not valid JSON (Expecting ',' delimiter, column 8)."),
        (".jsonl", '{"a": 1}\n7\n', "line 2 holds a number where an object in braces is needed."),
        (".jsonl", "true\n", "line 1 holds true or false where an object in braces is needed."),
        (".jsonl", '{"a": 0}\n{"a": 1}{"a": 2}\n', "line 2 is not valid JSON (Extra data, column 9)."),
        (".jsonl", '{"a": "\\ud83d\\ude00"}\n{"a": ["\\ud83d"]}\n', "line 2 holds half of a surrogate pair,"),
        (".jsonl", f'{{"a": 1}}\n{{"a": {"1" * 5000}}}\n', "line 2 holds a number of more digits than can be read."),
        (".jsonl", f'{{"a": 1}}\n{{"a": {"[" * 10**5}{"]" * 10**5}}}\n', "line 2 is nested too deeply."),
        (".jsonl", '{"a": 1}\n{"a": 1, "b": 2, "a": 3}\n', "line 2 has the key 'a' twice in one object."),
        (".jsonl", '{"a": [{"role": "x", "role": "x"}]}\n', "line 1 has the key 'role' twice in one object."),
        (".json", '[{"a": {"b": 1, "b": 2}}]', "it has the key 'b' twice in one object."),
        (".json", '{"text": ["a"],\n"text": ["b"]}', "it has the key 'text' twice in one object."),
        (".csv", "a,b\r1,2\r", "line 1 has a carriage return within a cell that is not in quotes."),
        (".csv", "a,b\n1,2\n3,4\r5\n", "line 3 has a carriage return within a cell that is not in quotes."),
        (".json", '[{"a": 1},\n{"a": ]', "line 2 is not valid JSON (Expecting value, column 7)"),
        (".json", '[{"a": 1}, 7]', "its row 2 holds a number where an object in braces is needed."),
        (".json", '{"train": [{"a": 1}], "test": [{"a": 1}]}', "it holds several lists of rows: train, test."),
        (".json", '{"a": ["a"], "b": ["b", "c"]}', "its columns are not equally long: a 1, b 2."),
        (".json", '["\\ud83d"]', "its row 1 holds half of a surrogate pair"),
        (".csv", "a,b\n1,2\n\n1,2,3\n", "Expected 2 fields in line 4, saw 3."),
        (".csv", 'a,b\n1,2\n3,"4\n5,6\n', "the quote that opens in line 3 is never closed: EOF inside string"),
        (".csv", 'a,b\n"1" x,2\n', "line 2 has a quote that closes before its cell ends."),
        (".csv", "a,a\n1,2\n", "two of its columns are named 'a'."),
        (".csv", b"a,b\n1,\xe9\n", "line 2 is not UTF-8 text."),
        (".jsonl", '{"a": 1}\n'.encode("utf-16"), "it is UTF-16 text where UTF-8 is needed."),
        (".json", "[]".encode("utf-32"), "it is UTF-32 text where UTF-8 is needed."),
        (".csv", "a,b\n".encode("utf-16-be"), "it is UTF-16 text where UTF-8 is needed."),
        (".tsv", "a\tb\n".encode("utf-16-le"), "it is UTF-16 text where UTF-8 is needed."),
    ],
)
def test_what_is_broken_is_named_with_its_line(ending, content, expected):
    assert problem(ending, content).startswith(expected)


def test_a_delimiter_within_quotes_does_not_divide_the_header():
    assert cells(".csv", '"a, b";c\n1,5;2\n') == [{"a, b": "1,5", "c": "2"}]
    assert cells(".csv", "text\na;b\tc\n") == [{"text": "a;b\tc"}]


def test_a_trailing_delimiter_is_no_cell():
    assert cells(".csv", "a,b\n1,2,\n3,4,,\n") == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]


@pytest.mark.parametrize("ending", READERS)
def test_a_file_without_rows_has_none(ending):
    assert rows(ending, "") == rows(ending, "\n \n") == []
