"""What becomes of one row: what is read of it, which tokens are learned, and what is told of the rest."""

import copy
import json
from datetime import datetime

import pytest
from datasets import Dataset, load_dataset
from helpers.places import shared_path
from tokenizers.processors import ByteLevel, TemplateProcessing
from transformers import AddedToken, AutoTokenizer, ByT5Tokenizer
from transformers.utils import chat_template_utils

from kava_trainer.data.encoding import encode_dataset
from kava_trainer.data.formats import IGNORED, find_format, unread_columns, without_filler
from kava_trainer.data.rows.encoder import Encoder
from kava_trainer.data.rows.remarks import remark_problems
from kava_trainer.utils.errors import BadRequest

END = "<|endoftext|>"

PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TOOLS = (
    "{% if tools %}[tools]{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '\n' }}{% endif %}{% for m in messages %}"
    "[{{ m.role }}]{% if m.content %}{{ m.content }}{% endif %}{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }} {{ c.function.arguments if c.function.arguments is string else "
    "c.function.arguments | tojson }}</call>{% endfor %}{{ '<|endoftext|>' if m.role == 'assistant' else '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
THINKING = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}"
    "<think>{{ m.reasoning_content or '' }}</think>{% endif %}{{ m.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|endoftext|>' }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ENDED = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<END>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% else %}<|endoftext|>{% endif %}"
)
"""A conversation ends with more than its turns do."""
OTHER_PROMPT = (
    "{% for m in messages %}{{ 'Q: ' if m.role == 'user' else 'ANSWER: ' }}{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}BOT: {% endif %}"
)
"""A generation prompt that no answer begins with."""


def user(text, **more):
    return {"role": "user", "content": text, **more}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


TALK = [user("one?"), assistant("1"), user("two?"), assistant("2"), user("three?"), assistant("3")]


def templated(tokenizer, template):
    own = copy.deepcopy(tokenizer)
    own.chat_template = template
    return own


def encoded(rows, tokenizer, template=None, length=400, turns="last"):
    tokenizer = templated(tokenizer, template) if template else tokenizer
    rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
    return encode_dataset(rows, tokenizer, length, "test", assistant_turns=turns)


def learned(tokenizer, row):
    """The texts of the runs of tokens that are learned."""
    runs, before = [], IGNORED
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        if label != IGNORED:
            runs += [[]] if before == IGNORED else []
            runs[-1].append(token)
        before = label
    return [tokenizer.decode(run) for run in runs]


def told(found, total=1):
    return [problem.what for problem in remark_problems(found.remarks, "the data", "training", total)]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "system", "content": "Be brief."}, *TALK[:2]], "System role not supported"),
        ([user("hi"), *TALK[:2]], "Roles must alternate"),
        ([*TALK[:2], *TALK[3:4]], "Roles must alternate"),
    ],
)
def test_a_row_that_the_template_refuses_is_named(tokenizer, messages, reason):
    rows = [{"messages": TALK[:2]}] * 3 + [{"messages": messages}]
    message = rf"in row 4 of the data, the chat template refuses the conversation \({reason}\). Change it, or leave"
    with pytest.raises(BadRequest, match=message):
        encoded(rows, tokenizer, STRICT)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.content + m.nothing }}{% endfor %}", "'dict object' has no attribute 'nothing'"),
        ("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", "can only concatenate str"),
    ],
)
def test_whatever_a_template_raises_is_a_sentence(tokenizer, template, reason):
    with pytest.raises(BadRequest, match=rf"in row 1 of the data, the chat template refuses the .*{reason}"):
        encoded([{"messages": TALK}], tokenizer, template)


def test_what_is_no_template_is_no_fault_of_a_row(tokenizer):
    with pytest.raises(BadRequest, match=r"^The tokenizer's chat template cannot be read"):
        encoded([{"messages": TALK}], tokenizer, "{% for m in messages %}")


@pytest.mark.parametrize(
    ("messages", "parts"),
    [
        ([user("a", name="Ann"), assistant("b")], ["name of user messages"]),
        ([user("a"), assistant("b", weight=0)], ["weight of assistant messages"]),
        ([user("a"), assistant("b", reasoning_content="c")], ["reasoning_content of assistant messages"]),
        (
            [user("a"), assistant("b", thinking="c", reasoning_content="c")],
            ["reasoning_content of assistant messages", "thinking of assistant messages"],
        ),
        ([user("a"), assistant("b", tool_calls=[{"name": "f"}])], ["tool_calls of assistant messages"]),
        ([user("a"), assistant("b")], []),
        ([user("  a\nb "), assistant('"b"\n\tc\n')], []),
    ],
)
def test_keys_that_a_template_does_not_read_are_told(tokenizer, messages, parts):
    expected = [
        f"In 1 of 1 training rows the chat template leaves out what the data holds: {part}. Row 1 of the data."
        for part in parts
    ]
    assert sorted(told(encoded([{"messages": messages}], tokenizer, PLAIN))) == expected


def test_what_is_read_of_some_messages_alone_is_told(tokenizer):
    reasoned = [user("a"), assistant("b", reasoning_content="first"), user("c"), assistant("d", reasoning_content="2")]
    found = encoded([{"messages": reasoned}, {"messages": reasoned[2:]}], tokenizer, THINKING)
    assert len(told(found, 2)) == 1
    assert told(found, 2)[0].startswith("In 1 of 2 training rows the chat template leaves out what the data holds: rea")


def test_roles_and_parts_of_texts_that_a_template_leaves_out_are_told(tokenizer):
    template = (
        "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}<{{ m.role }}>"
        "{{ m.content.split('</think>')[-1].split('--')[0] | trim }}{% endif %}{% endfor %}"
    )
    rows = [
        {"messages": [user("a"), {"role": "critic", "content": "a"}, assistant("b")]},
        {"messages": [user("a"), assistant("<think>\nhidden\n</think>\nb")]},
        {"messages": [user("a"), assistant(" b ")]},
        {"messages": [user("a--c"), assistant("b")]},
    ]
    assert told(encoded(rows, tokenizer, template), 4) == [
        "In 1 of 4 training rows the chat template leaves out what the data holds: messages of the role critic. "
        "Row 1 of the data.",
        "In 1 of 4 training rows the chat template leaves out what the data holds: part of the content of assistant "
        "messages. Row 2 of the data.",
        "In 1 of 4 training rows the chat template leaves out what the data holds: part of the content of user "
        "messages. Row 4 of the data.",
    ]


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}}}
CALL = [{"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}]


@pytest.mark.parametrize(
    "tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)]], ids=["list", "text of a list", "list of texts"]
)
@pytest.mark.parametrize("content", [None, ""])
def test_functions_and_calls_are_passed_to_the_template(tokenizer, tools, content):
    found = encoded(
        [{"messages": [user("2+1?"), assistant(content, tool_calls=CALL)], "tools": tools}], tokenizer, TOOLS
    )
    row = found.dataset[0]
    assert (
        tokenizer.decode(row["input_ids"][: row["prompt_length"]])
        == f"[tools]{json.dumps(TOOL)}\n[user]2+1?\n[assistant]"
    )
    assert learned(tokenizer, row) == ['<call>add {"a": 2}</call>' + END]
    assert row["answer_text"] == '<call>add {"a": 2}</call>'
    assert told(found) == []


def test_functions_that_a_template_does_not_read_are_told(tokenizer):
    found = encoded([{"messages": TALK[:2], "tools": [TOOL]}, {"messages": TALK[:2], "tools": None}], tokenizer, PLAIN)
    assert told(found, 2) == [
        "In 1 of 2 training rows the chat template leaves out what the data holds: tools. Row 1 of the data."
    ]


@pytest.mark.parametrize("tools", ["no json", '{"name": "f"}', "[1]"])
def test_what_are_no_functions_is_refused(tokenizer, tools):
    with pytest.raises(BadRequest, match="row 1 of the data, tools must be a list of JSON schemas, or the JSON text"):
        encoded([{"messages": TALK[:2], "tools": tools}], tokenizer, TOOLS)


def test_arguments_that_are_written_as_json_twice_are_told(tokenizer):
    template = TOOLS.replace("c.function.arguments if c.function.arguments is string else ", "")
    calls = [[{"function": {"name": "add", "arguments": own}}] for own in (json.dumps({"a": 2}), {"a": 2})]
    found = [
        encoded([{"messages": [user("2+1?"), assistant("", tool_calls=own)]}], tokenizer, template) for own in calls
    ]
    assert [len(told(one)) for one in found] == [1, 0]
    assert (
        "arguments of tool calls are JSON text, which the chat template writes as JSON a second time"
        in told(found[0])[0]
    )


def test_a_system_column_stands_before_the_messages(tokenizer):
    own = {"role": "system", "content": "Mine."}
    rows = [
        {"messages": TALK[:2], "system": "Be brief."},
        {"messages": TALK[:2], "system": None},
        {"messages": [own, *TALK[:2]], "system": "Be brief."},
        {"messages": [own, *TALK[:2]], "system": "Mine."},
    ]
    found = encoded(rows, tokenizer, PLAIN)
    heads = [tokenizer.decode(row["input_ids"]).split("<user>")[0] for row in found.dataset]
    assert heads == [f"<system>Be brief.{END}\n", "", f"<system>Mine.{END}\n", f"<system>Mine.{END}\n"]
    assert told(found, 4) == [
        "In 1 of 4 training rows the messages begin with a system message of their own, so the column system is not "
        "read. Row 3 of the data."
    ]
    asked = encoded([{"prompt": TALK[:1], "completion": TALK[1:2], "system": "Be brief."}], tokenizer, PLAIN)
    assert asked.dataset[0]["input_ids"] == found.dataset[0]["input_ids"]


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        ({"id": 1, "messages": TALK, "tools": [], "system": "x"}, ["id"]),
        ({"question": "a", "context": "b", "answer": "c", "system": "x"}, ["context", "system"]),
        ({"prompt": "a", "completion": "b", "tools": [], "system": "x"}, ["tools", "system"]),
        ({"prompt": TALK[:1], "completion": TALK[1:2], "tools": [], "source": "x"}, ["source"]),
        ({"text": "a"}, []),
    ],
)
def test_columns_that_nothing_reads_are_known(row, unread):
    assert unread_columns(list(row), row) == unread
    assert set(find_format(list(row))) <= set(row)


@pytest.mark.parametrize("silence", [{"content": ""}, {"content": " \n"}, {"content": None}, {}])
def test_an_empty_answer_teaches_nothing_and_is_counted(tokenizer, silence):
    rows = [{"messages": TALK[:2]}, {"messages": [user("a"), {"role": "assistant", **silence}]}]
    found = encoded(rows, tokenizer, PLAIN)
    assert (len(found.dataset), found.dropped, found.empty) == (1, 1, [1])


def test_a_thousand_empty_answers_before_the_first_one(tokenizer):
    rows = [{"prompt": "a", "completion": ""}] * 1001 + [{"prompt": "a", "completion": "b"}]
    found = encoded(rows, tokenizer)
    assert (len(found.dataset), found.dropped) == (1, 1001)
    assert found.dataset.features["input_ids"].feature.dtype == "int32"


@pytest.mark.parametrize("template", [PLAIN, MARKED, THINKING])
def test_every_answer_is_learned_with_its_end(tokenizer, template):
    found = encoded([{"messages": TALK}], tokenizer, template, turns="all")
    row, last = found.dataset[0], encoded([{"messages": TALK}], tokenizer, template).dataset[0]
    end = "<think></think>3" if template == THINKING else "3"
    assert learned(tokenizer, row) == [f"1{END}", f"2{END}", f"{end}{END}"]
    assert learned(tokenizer, last) == [f"{end}{END}"]
    for name in ("input_ids", "prompt_length", "answer_text"):
        assert row[name] == last[name]
    assert [line.split(" the chat")[0] for line in told(found)] == ["In 1 of 1 training rows"] * (template == THINKING)


@pytest.mark.parametrize(
    ("end", "special", "learned_end"),
    [("<|im_end|>", True, "<|im_end|>"), ("<|done|>", True, "<|done|>"), (" ||", False, " ||\n"), ("", False, "\n")],
)
def test_turns_have_their_end_where_the_conversation_ends_otherwise(tokenizer, end, special, learned_end):
    own = copy.deepcopy(tokenizer)
    if special:
        own.add_tokens([AddedToken(end, special=True)])
    found = encoded([{"messages": TALK}], own, ENDED.replace("<END>", end), turns="all")
    assert learned(own, found.dataset[0]) == [f"1{learned_end}", f"2{learned_end}", f"3{end}\n{END}"]
    assert told(found) == []


GENERATED = "{{ m.content + '<|endoftext|>' }}{% endgeneration %}"


@pytest.mark.parametrize(
    ("generated", "runs"),
    [
        ("{{ ' ' + m.content + '<|endoftext|>\n' }}{% endgeneration %}", [f" 1{END}\n", f" 2{END}\n", f" 3{END}"]),
        ("{{ m.content + ' ' }}{% endgeneration %}<|endoftext|>", ["1 ", "2 ", f"3 {END}"]),
        ("{{ m.content }}{% endgeneration %}<|endoftext|>", ["1", "2", f"3{END}"]),
    ],
)
@pytest.mark.parametrize("trimmed", [True, False])
def test_marks_are_learned_as_they_stand_and_the_end_of_text_always(tokenizer, generated, runs, trimmed):
    """Offsets of many tokenizers leave white space out, as those of Llama 3 do."""
    own = copy.deepcopy(tokenizer)
    own.backend_tokenizer.post_processor = ByteLevel(trim_offsets=trimmed)
    assert GENERATED in MARKED
    template = MARKED.replace(GENERATED, generated)
    assert learned(own, encoded([{"messages": TALK}], own, template, turns="all").dataset[0]) == runs
    assert learned(own, encoded([{"messages": TALK[4:]}], own, template, turns="all").dataset[0]) == runs[2:]


@pytest.mark.parametrize("turns", ["last", "all"])
@pytest.mark.parametrize("template", [PLAIN, "{{ 'You help.\n' }}" + PLAIN])
def test_a_greeting_alone_is_learned_without_what_the_template_writes_before_it(tokenizer, turns, template):
    for row in ({"messages": [assistant("Welcome.")]}, {"prompt": [], "completion": [assistant("Welcome.")]}):
        found = encoded([row], tokenizer, template, turns=turns)
        assert learned(tokenizer, found.dataset[0]) == [f"Welcome.{END}"]
        assert told(found) == []


def test_what_others_say_within_a_completion_is_told_where_it_is_learned(tokenizer):
    tool = {"role": "tool", "content": "7"}
    rows = [
        {"prompt": TALK[:1], "completion": TALK[1:]},
        {"prompt": TALK[:1], "completion": [assistant("a"), tool, user("b"), assistant("c")]},
        {"prompt": TALK[:3], "completion": TALK[3:4]},
        {"prompt": TALK[:3], "completion": [*TALK[3:5], assistant("")]},
    ]
    lines = sorted(told(encoded(rows, tokenizer, PLAIN), 4))
    assert [line.split(", which")[0] for line in lines] == [
        "In 1 of 4 training rows the completion holds messages of the role tool",
        "In 2 of 4 training rows the completion holds messages of the role user",
    ]
    assert lines[1].endswith("learned as the assistant's are. Rows 1, 2 of the data.")
    assert not [line for line in told(encoded(rows, tokenizer, PLAIN, turns="all"), 4) if "completion holds" in line]


def test_a_tokenizer_that_knows_no_characters_learns_every_answer(tokenizer):
    """Those written in Python say not which characters a token stands for."""
    slow = ByT5Tokenizer()
    assert not slow.is_fast
    ended = MARKED.replace(END, "</s>")
    for template in (ended, ended.replace("{% generation %}", "").replace("{% endgeneration %}", "")):
        row = encoded([{"messages": TALK}], slow, template, turns="all").dataset[0]
        assert learned(slow, row) == ["1</s>", "2</s>", "3</s>"]


def test_a_first_message_of_the_assistant_is_learned_without_its_head(tokenizer):
    found = encoded([{"messages": [assistant("Welcome."), *TALK[:2]]}], tokenizer, PLAIN, turns="all")
    assert learned(tokenizer, found.dataset[0]) == [f"Welcome.{END}", f"1{END}"]
    assert told(found) == []


def test_answers_to_functions_are_learned_too(tokenizer):
    talk = [user("2+1?"), assistant(None, tool_calls=CALL), {"role": "tool", "content": "3"}, assistant("It is 3.")]
    row = encoded([{"messages": talk, "tools": [TOOL]}], tokenizer, TOOLS, turns="all").dataset[0]
    assert learned(tokenizer, row) == [f'<call>add {{"a": 2}}</call>{END}', f"It is 3.{END}"]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_of_a_completion_its_own_answers_are_learned(tokenizer, template):
    row = {"prompt": TALK[:3], "completion": TALK[3:]}
    assert learned(tokenizer, encoded([row], tokenizer, template, turns="all").dataset[0]) == [f"2{END}", f"3{END}"]
    whole = learned(tokenizer, encoded([row], tokenizer, template).dataset[0])
    assert len(whole) == 1
    assert whole[0].startswith("2")


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_empty_answers_between_others_are_not_learned_and_counted(tokenizer, template):
    talk = [user("a"), assistant(""), *TALK[:2], user("b"), assistant(" ")]
    found = encoded([{"messages": talk}, {"messages": TALK}], tokenizer, template, turns="all")
    row = found.dataset[0]
    assert learned(tokenizer, row) == [f"1{END}"]
    assert row["answer_text"] == "1"
    assert tokenizer.decode(row["input_ids"]).endswith(f"1{END}")
    assert told(found, 2) == [
        "In 1 of 2 training rows assistant messages are empty and teach nothing, 2 in all. Row 1 of the data."
    ]
    silent = encoded([{"messages": talk[:2]}, {"messages": TALK}], tokenizer, template, turns="all")
    assert (silent.dropped, silent.empty) == (1, [0])


def test_calls_that_the_template_leaves_out_teach_nothing(tokenizer):
    call = assistant("", tool_calls=CALL)
    rows = [
        {"messages": [user("2+1?"), call]},
        {"messages": [user("2+1?"), call, {"role": "tool", "content": "3"}, assistant("It is 3.")]},
        {"messages": [*TALK[:2], user("2+1?"), call]},
    ]
    last, every = (encoded(rows, tokenizer, PLAIN, turns=turns) for turns in ("last", "all"))
    assert [learned(tokenizer, row) for row in last.dataset] == [[f"It is 3.{END}"]]
    assert [learned(tokenizer, row) for row in every.dataset] == [[f"It is 3.{END}"], [f"1{END}"]]
    assert (last.empty, every.empty) == ([0, 2], [0])
    assert told(every, 3) == [
        "In 3 of 3 training rows the chat template leaves out what the data holds: tool_calls of assistant messages. "
        "Rows 1, 2, 3 of the data.",
        "In 2 of 3 training rows assistant messages are empty and teach nothing, 2 in all. Rows 2, 3 of the data.",
    ]


def test_of_a_cut_conversation_the_last_answer_that_is_left_is_asked_for(tokenizer):
    talk = [*TALK[:2], user("word " * 90), assistant("far")]
    row = encoded([{"messages": talk}], tokenizer, PLAIN, 60, "all").dataset[0]
    assert row["answer_text"] == "1"
    assert tokenizer.decode(row["input_ids"][: row["prompt_length"]]).endswith("<assistant>")
    assert learned(tokenizer, row) == [f"1{END}"]


@pytest.mark.parametrize("turns", ["last", "all"])
@pytest.mark.parametrize("template", [PLAIN, MARKED, ENDED.replace("<END>", " ||")])
def test_a_cut_conversation_teaches_what_is_left_of_it_and_nothing_more(tokenizer, template, turns):
    own, names = templated(tokenizer, template), ("messages",)
    whole = Encoder(names, own, 400, turns)({"messages": TALK})
    assert not whole["truncated"]
    for length in range(2, len(whole["input_ids"])):
        cut = Encoder(names, own, length, turns)({"messages": TALK})
        assert cut["truncated"]
        for name in ("input_ids", "labels"):
            assert cut[name] == whole[name][:length]


def test_an_answer_that_cannot_be_found_is_not_learned_and_told(tokenizer):
    hidden = "{% for m in messages %}<{{ m.role }}>{{ m.content if loop.last else '...' }}<|endoftext|>{% endfor %}"
    found = encoded([{"messages": TALK}], tokenizer, hidden, turns="all")
    assert len(learned(tokenizer, found.dataset[0])) == 1
    assert any(
        "assistant messages cannot be found in what the chat template makes of them" in line for line in told(found)
    )


def test_other_turns_than_these_are_refused(tokenizer):
    with pytest.raises(BadRequest, match=r"assistant_turns is 'every'; write last or all\."):
        encoded([{"messages": TALK}], tokenizer, PLAIN, turns="every")


@pytest.mark.parametrize("turns", ["last", "all"])
def test_a_generation_prompt_that_answers_do_not_begin_with_is_told(tokenizer, turns):
    found = encoded([{"messages": TALK[:2]}, {"messages": TALK}], tokenizer, OTHER_PROMPT, turns=turns)
    assert learned(tokenizer, found.dataset[0])[0].strip() == f"1\n{END}"
    assert [run.replace(END, "").strip() for run in learned(tokenizer, found.dataset[1])] == (
        ["3"] if turns == "last" else ["1", "2", "3"]
    )
    assert told(found, 2)[0].startswith("In 2 of 2 training rows the chat template's generation prompt is not what its")


def test_a_template_that_takes_no_prompt_without_an_answer_is_no_refusal(tokenizer):
    closed = "{% if messages[-1].role == 'user' %}{{ raise_exception('no') }}{% endif %}" + PLAIN
    assert learned(tokenizer, encoded([{"messages": TALK}], tokenizer, closed).dataset[0]) == [f"3{END}"]


def test_control_tokens_in_the_text_are_told(tokenizer):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": f"a{END}c", "completion": "b"}]
    expected = (
        "In 1 of {} training rows control tokens stand in the text (<|endoftext|>), which the models do not read as"
    )
    assert told(encoded(rows, tokenizer), 2)[0].startswith(expected.format(2))
    assert told(encoded([{"prompt": "a", "completion": f"b{END}"}], tokenizer)) == []
    talk = [{"messages": [user(f"a{END}"), assistant("b")]}, {"messages": TALK}, {"messages": TALK}]
    assert told(encoded(talk, tokenizer, PLAIN), 3)[0].startswith(expected.format(3))


def bos_tokenizer(tokenizer, added):
    """The tokenizer with a beginning-of-text token, which it puts before text where that is wanted."""
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"bos_token": "<s>"})
    if added:
        own.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", own.bos_token_id)]
        )
    return own


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize(
    "row", [{"text": "<s>a b</s>"}, {"prompt": "<s>a", "completion": " b"}, {"question": "a", "answer": "b"}]
)
def test_text_has_one_beginning(tokenizer, added, row):
    own = bos_tokenizer(tokenizer, added)
    ids = encoded([row], own).dataset[0]["input_ids"]
    assert ids.count(own.bos_token_id) == (1 if added or "question" not in row else 0)
    assert (ids[0] == own.bos_token_id) == (added or "question" not in row)


def test_tokens_are_not_taken_from_the_cache_of_another_beginning(tokenizer, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": TALK}) + "\n")
    rows = load_dataset("json", data_files=str(path), split="train")
    own = bos_tokenizer(tokenizer, False)
    own.add_tokens([AddedToken("<t>", special=True)])
    for beginning in ("<s>", "<t>", "<s>"):
        own.bos_token = beginning
        ids = encoded(rows, own, "{{ bos_token }}" + PLAIN).dataset[0]["input_ids"]
        assert own.decode(ids[:1]) == beginning


def test_a_template_that_writes_the_beginning_gets_no_second_one(tokenizer):
    own = bos_tokenizer(tokenizer, True)
    row = encoded([{"messages": TALK}], own, "{{ bos_token }}" + PLAIN).dataset[0]
    assert row["input_ids"].count(own.bos_token_id) == 1
    assert row["prompt_length"] > 1


class Tomorrow(datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2031, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("head", "day"),
    [
        ("{{ strftime_now('%d %B %Y, %-d.%m.%y %H:%M') }}\n", "26 July 2024, 26.07.24 00:00\n"),
        (
            "{% if date_string is not defined %}{% if strftime_now is defined %}"
            "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{% endif %}Today: {{ date_string }}\n",
            "Today: 26 Jul 2024\n",
        ),
        ("\n  {% if true %}x{% endif %}{% for m in messages[:1] %}{{ strftime_now('%Y') }}{% endfor %}\n", "\nx2024"),
    ],
)
def test_the_day_is_the_same_on_any_day(tokenizer, monkeypatch, head, day):
    first = encoded([{"messages": TALK[:2]}], tokenizer, head + PLAIN)
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    again = encoded([{"messages": TALK[:2]}, {"messages": TALK[:2]}], tokenizer, head + PLAIN)
    assert first.dataset[0] == again.dataset[0]
    assert tokenizer.decode(first.dataset[0]["input_ids"]).startswith(day)
    assert "2031" in templated(tokenizer, "{{ strftime_now('%Y') }}").apply_chat_template(TALK, tokenize=False)


def test_keys_of_other_rows_are_none_of_this_one(tokenizer):
    rows = Dataset.from_list(
        [
            {"messages": [user("a"), assistant("b", tool_calls=[{"function": {"name": "f", "arguments": {"x": 1}}}])]},
            {"messages": [user("a"), assistant("c", tool_calls=[{"function": {"name": "g", "arguments": {"y": 2}}}])]},
        ]
    )
    assert rows[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"x": 1, "y": None}
    texts = [learned(tokenizer, row) for row in encoded(rows, tokenizer, TOOLS).dataset]
    assert texts == [[f'b<call>f {{"x": 1}}</call>{END}'], [f'c<call>g {{"y": 2}}</call>{END}']]
    assert without_filler([{"a": None, "b": {"c": None}}], None) == [{"a": None, "b": {"c": None}}]
    assert without_filler({"a": None}, {"a": "a type"}) == {}


def test_a_real_template_with_functions(tokenizer):
    """Qwen2.5's own, whose prompt lists the functions, and whose calls are objects."""
    real = AutoTokenizer.from_pretrained(shared_path("models", "qwen2.5-tokenizer"))
    call = [{"function": {"name": "add", "arguments": {"a": 2}}}]
    talk = [user("2+1?"), assistant(None, tool_calls=call), {"role": "tool", "content": "3"}, assistant("It is 3.")]
    found = encoded([{"messages": talk, "tools": [TOOL]}], real, turns="all", length=600)
    row = found.dataset[0]
    assert real.decode(row["input_ids"]).startswith(real.apply_chat_template(talk, tools=[TOOL], tokenize=False))
    assert learned(real, row) == [
        '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>',
        f"It is 3.<|im_end|>\n{END}",
    ]
    assert told(found) == []
