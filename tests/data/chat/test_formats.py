"""Every format to its meaning, and every bad row to its reason."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data.chat import formats
from engine.data.chat.conversation import BadRow, Conversation, Preference, Text

USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
SYSTEM = {"role": "system", "content": "S"}
ASKED = {"role": "user", "content": "Q", "instruction": "Q"}
WITH_INPUT = {"role": "user", "content": "Q\n\nI", "instruction": "Q", "input": "I"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "R"}
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(("row", "name", "messages"), [
    ({"instruction": "Q", "input": "", "output": "A"}, "alpaca", [ASKED, ANSWER]),
    ({"instruction": "Q", "output": "A"}, "alpaca", [ASKED, ANSWER]),
    ({"instruction": "Q", "input": "I", "output": "A", "system": "S"}, "alpaca", [SYSTEM, WITH_INPUT, ANSWER]),
    ({"instruction": "Q", "output": "A", "history": [["Q", "A"]]}, "alpaca", [USER, ANSWER, ASKED, ANSWER]),
    ({"instruction": "Q", "response": "A"}, "instruction", [ASKED, ANSWER]),
    ({"instruction": "Q", "context": "I", "response": "A", "category": "x"}, "instruction", [WITH_INPUT, ANSWER]),
    ({"question": "Q", "answer": "A"}, "qa", [USER, ANSWER]),
    ({"input": "Q", "output": "A"}, "qa", [USER, ANSWER]),
    ({"prompt": "Q", "completion": "A", "system": "S"}, "qa", [SYSTEM, USER, ANSWER]),
    ({"instruction": "Q", "input": "I", "answer": "A"}, "qa", [WITH_INPUT, ANSWER]),
    ({"prompt": [USER], "completion": [ANSWER]}, "qa", [USER, ANSWER]),
    ({"messages": [USER, ANSWER]}, "messages", [USER, ANSWER]),
    ({"messages": json.dumps([USER, ANSWER])}, "messages", [USER, ANSWER]),
    ({"messages": [USER, ANSWER], "system": "S"}, "messages", [SYSTEM, USER, ANSWER]),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}], "tool_calls": None}, ANSWER]},
     "messages", [USER, ANSWER]),
    ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, "sharegpt", [USER, ANSWER]),
    ({"conversations": [{"from": "human", "value": "Q", "role": None, "content": None}, {"from": "gpt", "value": "A"}]},
     "sharegpt", [USER, ANSWER]),
    ({"conversations": [USER, ANSWER], "system": "S"}, "sharegpt", [SYSTEM, USER, ANSWER]),
    ({"conversations": [{"from": "human", "value": "Q"},
                        {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
                        {"from": "observation", "value": "R"}, {"from": "gpt", "value": "A"}]},
     "sharegpt", [USER, CALLING, RESULT, ANSWER]),
    ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [
        {"function": {"name": "f", "arguments": '{"a": 1}'}}]}, RESULT, ANSWER]},
     "messages", [USER, CALLING, RESULT, ANSWER]),
    ({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "parameters": {"a": 1}}]}]},
     "messages", [USER, CALLING]),
    ({"messages": [USER, {"role": "assistant", "content": "A", "reasoning": "T"}]}, "messages",
     [USER, {"role": "assistant", "content": "A", "thinking": "T", "reasoning_content": "T"}]),
])  # fmt: skip
def test_conversations(row, name, messages):
    assert formats.detect(row) == name
    for format in (name, "auto"):
        found = formats.parse(row, format)
        assert found == Conversation(messages)


def test_tools_text_and_weights():
    for tools in ([TOOL], [TOOL["function"]], json.dumps([TOOL])):
        assert formats.parse({"messages": [USER, ANSWER], "tools": tools}) == Conversation([USER, ANSWER], [TOOL])
    weighted = {"messages": [USER, ANSWER | {"weight": 0}, USER, ANSWER], "system": "S"}
    expected = Conversation([SYSTEM, USER, ANSWER, USER, ANSWER], unsupervised=frozenset([2]))
    assert formats.parse(weighted) == expected
    assert formats.parse({"text": " one "}) == Text(" one ")


BETTER, WORSE = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}
HH = "\n\nHuman: Q\n\nAssistant: A\n\nHuman: Q\n\nAssistant: "


@pytest.mark.parametrize(("row", "prompt"), [
    ({"prompt": "Q", "chosen": "good", "rejected": "bad"}, [USER]),
    ({"prompt": "Q", "chosen": "good", "rejected": "bad", "system": "S"}, [SYSTEM, USER]),
    ({"question": "Q", "chosen": "good", "rejected": "bad"}, [USER]),
    ({"instruction": "Q", "input": "I", "chosen": "good", "rejected": "bad"}, [WITH_INPUT]),
    ({"prompt": [USER, ANSWER, USER], "chosen": [BETTER], "rejected": [WORSE]}, [USER, ANSWER, USER]),
    ({"prompt": "Q", "chosen": BETTER, "rejected": WORSE}, [USER]),
    ({"prompt": "Q", "chosen": [USER, BETTER], "rejected": [USER, WORSE]}, [USER]),
    ({"prompt": "Q", "system": "S", "chosen": [USER, BETTER], "rejected": [USER, WORSE]}, [SYSTEM, USER]),
    ({"chosen": [USER, ANSWER, USER, BETTER], "rejected": [USER, ANSWER, USER, WORSE]}, [USER, ANSWER, USER]),
    ({"chosen": json.dumps([USER, BETTER]), "rejected": json.dumps([USER, WORSE])}, [USER]),
    ({"chosen": HH + "good", "rejected": HH + "bad"}, [USER, ANSWER, USER]),
])  # fmt: skip
def test_preferences(row, prompt):
    assert formats.parse(row) == Preference(prompt, BETTER, WORSE)


@pytest.mark.parametrize(("row", "format", "reason", "detail"), [
    ({"instruction": "Q"}, "auto", "missing_response", "'output'"),
    ({"instruction": "Q", "output": None}, "auto", "missing_response", "'output'"),
    ({"instruction": "Q", "output": " \n"}, "auto", "empty_completion", "'output' is empty"),
    ({"instruction": " ", "output": "A"}, "auto", "missing_prompt", "'instruction'"),
    ({"instruction": "Q", "output": 3}, "auto", "field_not_text", "a number"),
    ({"instruction": "Q", "output": "A", "history": ["Q"]}, "auto", "bad_history", "history"),
    ({"question": "Q"}, "auto", "missing_response", "'answer'"),
    ({"messages": [USER]}, "auto", "missing_response", "from the user"),
    ({"messages": [USER, CALLING, RESULT]}, "auto", "missing_response", "from the tool"),
    ({"messages": [ANSWER]}, "auto", "missing_prompt", "no message but"),
    ({"messages": []}, "auto", "no_messages", "empty"),
    ({"messages": "[{"}, "auto", "not_json", "not JSON"),
    ({"messages": 3}, "auto", "not_messages", "a number"),
    ({"messages": ["hi"]}, "auto", "not_a_message", "message 1"),
    ({"messages": [{"content": "x"}]}, "auto", "no_role", "message 1 has no role"),
    ({"messages": [USER, {"role": "narrator", "content": "x"}]}, "auto", "unknown_role", "message 2 .*'narrator'"),
    ({"messages": [USER, {"role": "assistant", "content": ""}]}, "auto", "empty_completion", "message 2"),
    ({"messages": [{"role": "user", "content": " "}, ANSWER]}, "auto", "empty_message", "message 1, of the user"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}, "auto", "content_not_text", "image"),
    ({"messages": [USER, ANSWER | {"tool_calls": [{"function": {}}]}]}, "auto", "bad_tool_call", "names no function"),
    ({"messages": [USER, ANSWER | {"tool_calls": [{"name": "f", "arguments": "{"}]}]}, "auto", "not_json", "of f in"),
    ({"messages": [USER, ANSWER], "tools": [3]}, "auto", "bad_tools", "a number"),
    ({"conversations": [{"from": "alien", "value": "x"}]}, "auto", "unknown_role", "alien"),
    ({"text": ""}, "text", "missing_text", "empty"),
    ({"a": 1}, "auto", "unknown_format", "fields: a"),
    ({"messages": [USER, ANSWER]}, "alpaca", "missing_prompt", "'instruction'"),
    ({"prompt": "Q", "chosen": "same", "rejected": "same"}, "auto", "chosen_is_rejected", "same"),
    ({"prompt": "Q", "chosen": "good"}, "auto", "missing_rejected", "'rejected'"),
    ({"prompt": "Q", "rejected": "bad"}, "auto", "missing_chosen", "'chosen'"),
    ({"prompt": "Q", "chosen": "good", "rejected": ""}, "auto", "empty_completion", "rejected"),
    ({"prompt": "Q", "chosen": "good", "rejected": []}, "auto", "empty_completion", "rejected"),
    ({"prompt": " ", "chosen": "good", "rejected": "bad"}, "auto", "missing_prompt", "prompt is empty"),
    ({"chosen": "good", "rejected": "bad"}, "auto", "missing_prompt", "no prompt"),
    ({"chosen": [USER, ANSWER, USER, BETTER], "rejected": [USER, WORSE, USER, WORSE]}, "auto", "parts_too_early",
     "message 2 of 4"),
    ({"chosen": [USER, BETTER], "rejected": [USER, USER]}, "auto", "missing_response", "rejected is from the user"),
    ([1], "auto", "not_an_object", "an array"),
])  # fmt: skip
def test_bad_rows(row, format, reason, detail):
    with pytest.raises(BadRow, match=detail) as bad:
        formats.parse(row, format)
    assert bad.value.reason == reason


NAMES = ["role", "content", "from", "value", "tool_calls", "function", "name", "arguments", "text", "weight"]
LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(
    ["user", "assistant", "human", "[{}]", '{"role": "user"}'])  # fmt: skip
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.sampled_from(NAMES), inner, max_size=4), max_leaves=12)  # fmt: skip
FIELDS = ["messages", "conversations", "instruction", "input", "output", "response", "prompt", "chosen", "rejected",
          "text", "system", "tools", "history", "question", "answer", "completion"]  # fmt: skip


@given(row=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=5),
       format=st.sampled_from(["auto", *formats._PARSERS]))  # fmt: skip
def test_any_json_is_understood_or_refused(row, format):
    try:
        found = formats.parse(row, format)
    except BadRow:
        return
    if isinstance(found, Conversation):
        assert found.messages[-1]["role"] == "assistant"
        assert all(isinstance(message["content"], str) for message in found.messages)
