"""Which template is taken, that none can do anything but write text, and that ours write what they should."""

from __future__ import annotations

import json
import re

import chat_tokenizers as chat
import pytest

from engine.data.chat import builtin, templates
from engine.data.chat.conversation import BadRow
from engine.data.chat.templates import Template, generated
from engine.data.tokenizer import load_tokenizer, train_tokenizer
from engine.errors import UserError

TALK = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
GPT = chat.tokenizer(chat.HARMONY, None, "<|return|>")
OURS = train_tokenizer(chat.TEXTS, 300)  # has the ChatML tokens
BARE = train_tokenizer(chat.TEXTS, 300, specials=2)


@pytest.fixture
def folder(tmp_path):
    OURS.save(tmp_path)
    return tmp_path


def configured(folder, **changes):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | changes))
    return templates.load("auto", folder, load_tokenizer(folder))


def test_the_tokenizers_own_wherever_it_lies(folder):
    assert configured(folder).texts == {"default": builtin.CHATML}
    assert configured(folder, chat_template="one").texts == {"default": "one"}
    several = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
    own = configured(folder, chat_template=several)
    assert (own.render(TALK), own.render(TALK, [{"function": {}}])) == ("one", "two")
    assert own.sha256 != configured(folder, chat_template="one").sha256
    (folder / "chat_template.json").write_text('{"chat_template": "three"}')
    assert configured(folder).texts == {"default": "three"}
    (folder / "chat_template.jinja").write_text("four")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("five")
    assert configured(folder).texts == {"default": "four", "tool_use": "five"}


def test_variables_are_the_tokens_that_there_are(folder):
    own = configured(folder, chat_template="{{ bos_token }}|{{ eos_token }}|{{ unk_token is defined }}",
                     bos_token={"content": "<|im_start|>"})  # fmt: skip
    assert own.render(TALK) == "<|im_start|>|<|endoftext|>|False"


@pytest.mark.parametrize(("changes", "problem"), [
    ({"chat_template": [{"name": "rag", "template": "x"}]}, "none of its chat templates .rag. is called default"),
    ({"chat_template": [3]}, "neither text nor a list"),
    ({"chat_template": "{% if %}"}, "not a Jinja template"),
])  # fmt: skip
def test_own_templates_that_are_none(folder, changes, problem):
    with pytest.raises(UserError, match=problem):
        configured(folder, **changes)


def test_names_and_files(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}\n{{ m.nope.nope }}{% endfor")
    with pytest.raises(UserError, match=r"mine\.jinja:2: not a Jinja template"):
        templates.load(str(path), None, OURS)
    path.write_text("{{ messages[0].content }}")
    assert templates.load(str(path), None, OURS).render(TALK) == "Q"
    with pytest.raises(UserError, match=r"No such file.*\.jinja file"):
        templates.load(str(tmp_path / "missing.jinja"), None, OURS)
    with pytest.raises(UserError, match="no template is called 'vicuna'"):
        templates.load("vicuna", None, OURS)
    with pytest.raises(UserError, match=r"chatml needs the tokens <\|im_start\|>, <\|im_end\|>"):
        templates.load("chatml", None, BARE)
    with pytest.raises(UserError, match=r"harmony needs the tokens <\|start\|>"):
        templates.load("harmony", None, OURS)
    with pytest.raises(UserError, match="brings no chat template and has no ChatML tokens"):
        templates.load("auto", None, BARE)
    assert templates.load("alpaca", None, BARE).texts == {"default": builtin.ALPACA}


CANARIES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ self.__init__.__globals__['__builtins__']['open']('CANARY', 'w') }}",
    "{{ messages.append(1) }}", "{{ messages[0].update(content='x') }}", "{{ messages[0].pop('content') }}",
    "{{ raise_exception.__globals__['jinja2'] }}", "{% include 'CANARY' %}", "{% import 'CANARY' as x %}",
    "{% for i in range(10 ** 12) %}{% endfor %}", "{{ (messages | attr('__class__')).mro() }}",
    "{{ get_flashed_messages.__globals__ }}", "{{ joiner.__init__.__globals__.os.popen('touch CANARY').read() }}",
]  # fmt: skip


SEEN_NOTHING = ["{{ strftime_now.__globals__ }}", "{{ lipsum.__globals__ }}", "{{ messages.__class__ }}",
                "{{ ''.format_map.__self__ }}", "{{ '{0.__class__}'.format(1) }}", "{{ namespace.__init__ }}"]


@pytest.mark.parametrize("text", SEEN_NOTHING)
def test_no_template_sees_what_is_inside(text):
    assert Template("evil", {"default": text}).render(TALK) == ""


@pytest.mark.parametrize("text", CANARIES)
def test_no_template_runs_code(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadRow) as refused:
        Template("evil", {"default": text}).render([dict(message) for message in TALK])
    assert refused.value.reason == "refused_by_template"
    assert "\n" not in refused.value.detail
    assert not list(tmp_path.iterdir())


def test_what_templates_of_transformers_rely_on():
    text = ("{%- for m in messages %}\n    {%- if m.role == 'user' %}{% continue %}{% endif %}\n"
            "    {{- m | tojson(indent=1) }}{{ '<é>' | tojson }}{{ 'é' | tojson(ensure_ascii=true) }}{% endfor %}"
            "{{ strftime_now('%d %b %Y') }}")
    expected = '{\n "role": "assistant",\n "content": "A"\n}"<é>""\\u00e9"01 Jan 2025'
    assert Template("t", {"default": text}).render(TALK) == expected
    with pytest.raises(BadRow, match=r"refuses it: roles must alternate"):
        Template("t", {"default": "{{ raise_exception('roles must\nalternate') }}"}).render(TALK)
    with pytest.raises(BadRow, match="TypeError"):
        Template("t", {"default": "{{ 'a' + 1 }}"}).render(TALK)


def test_marks_of_generation():
    text = ("{% macro say(m) %}{% generation %}\n{{ m.content }}<e>{% endgeneration %}{% endmacro %}"
            "{% set whole %}{% for m in messages %}[{{ say(m) }}]{% endfor %}{% endset %}{{- whole -}}"
            "{%- generation -%}{%- endgeneration -%}")  # fmt: skip
    template = Template("t", {"default": text})
    assert template.marked()
    written, ranges = generated(template.render(TALK))
    assert written == "[Q<e>][A<e>]"
    assert [written[start:end] for start, end in ranges] == ["Q<e>", "A<e>"]
    assert not Template("t", {"default": "{{ generation }}"}).marked()


TOOLS = [{"type": "function", "function": {"name": "f", "description": "does", "parameters": {
    "type": "object", "required": ["a"], "properties": {
        "a": {"type": "integer", "description": "how many", "default": 3},
        "b": {"type": "array", "items": {"type": "object", "properties": {"z": {"type": "string"}}}},
        "c": {"oneOf": [{"type": "object"}, {"type": "number"}]},
        "d": {"type": ["string", "null"]},
        "e": {"type": "string", "enum": ["p", "q"], "default": "p"},
        "g": {"type": "array", "items": {"type": "string"}, "nullable": True},
        "h": {"type": "array", "items": {"type": "integer"}},
        "i": {"type": "array"}, "j": {"type": "string", "nullable": True}, "k": {"type": "boolean"}, "l": {}}}}},
    {"type": "function", "function": {"name": "g", "description": "nothing"}}]  # fmt: skip
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1, "c": {"é": [None]}}}}
AGENT = [
    {"role": "system", "content": "be\nnice"},
    {"role": "user", "content": "do"},
    {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": [CALL]},
    {"role": "tool", "content": 'x"y\n'},
    {"role": "assistant", "content": "done", "thinking": "so"},
    {"role": "user", "content": "again"},
    {"role": "assistant", "content": "well", "tool_calls": [CALL]},
    {"role": "tool", "content": "z"},
]


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("count", range(2, 9))
@pytest.mark.parametrize("prompt", [False, True])
def test_harmony_is_what_gpt_oss_renders(tools, count, prompt):
    theirs = Template("gpt-oss", {"default": chat.stock("gptoss")})
    ours = templates.load("harmony", None, GPT)
    for messages in (AGENT[:count], AGENT[1:count]):
        expected = theirs.render(messages, tools, prompt=prompt)
        # Within unions and objects theirs lets its own line breaks and indents through.
        expected = re.sub(r"(?<= \| )\n|(?<=: )\n +", "", expected)
        assert generated(ours.render(messages, tools, prompt=prompt))[0] == expected


@pytest.mark.parametrize(("messages", "problem"), [
    ([AGENT[1], AGENT[3]], "follows no call"),
    ([AGENT[1], AGENT[2] | {"tool_calls": [CALL, CALL]}], "one call a message"),
    ([AGENT[1], AGENT[2] | {"content": "x"}], "either thinking or content"),
    ([AGENT[1], AGENT[0]], "only at the start"),
])  # fmt: skip
def test_what_harmony_cannot_say(messages, problem):
    with pytest.raises(BadRow, match=problem):
        templates.load("harmony", None, GPT).render(messages)


def test_alpaca():
    intro = "Below is an instruction that describes a task"
    request = "Write a response that appropriately completes the request."
    alpaca = templates.load("alpaca", None, OURS)
    plain = [{"role": "user", "content": "Q", "instruction": "Q"}, TALK[1]]
    text, ranges = generated(alpaca.render(plain))
    assert text == f"{intro}. {request}\n\n### Instruction:\nQ\n\n### Response:\nA<|endoftext|>"
    assert [text[start:end] for start, end in ranges] == ["A<|endoftext|>"]
    assert alpaca.render(plain[:1], prompt=True) == text[: ranges[0][0]]
    given = [{"role": "user", "content": "Q\n\nI", "instruction": "Q", "input": "I"}, *TALK[1:], *TALK]
    assert generated(alpaca.render(given))[0] == (
        f"{intro}, paired with an input that provides further context. {request}\n\n### Instruction:\nQ"
        "\n\n### Input:\nI\n\n### Response:\nA<|endoftext|>\n\n### Instruction:\nQ\n\n### Response:\nA<|endoftext|>")
    system = [{"role": "system", "content": "S"}, *TALK]
    assert generated(alpaca.render(system))[0] == "S\n\n### Instruction:\nQ\n\n### Response:\nA<|endoftext|>"
    for bad in (AGENT[1:3], [AGENT[1], AGENT[3]]):
        with pytest.raises(BadRow, match="alpaca template knows no"):
            alpaca.render(bad)


def test_chatml():
    chatml = templates.load("chatml", None, OURS)
    text, ranges = generated(chatml.render([{"role": "developer", "content": "S"}, *AGENT[1:5]], TOOLS[1:]))
    assert text == (
        "<|im_start|>system\nS\n\n# Tools\n\nYou may call these functions:\n<tools>\n"
        '{"type": "function", "function": {"name": "g", "description": "nothing"}}\n</tools>\n\n'
        "For a call, answer with its JSON between tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <arguments-object>}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\ndo<|im_end|>\n<|im_start|>assistant\n<think>\nhm\n</think>\n\n<tool_call>\n"
        '{"name": "f", "arguments": {"a": 1, "c": {"é": [null]}}}\n</tool_call><|im_end|>\n'
        '<|im_start|>tool\nx"y\n<|im_end|>\n<|im_start|>assistant\n<think>\nso\n</think>\n\ndone<|im_end|>\n')
    turns = [text[start:end] for start, end in ranges]
    assert [(turn[:7], turn[-10:]) for turn in turns] == [("<think>", "<|im_end|>")] * 2
    prompt = chatml.render(TALK[:1], prompt=True)
    assert prompt == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    assert generated(chatml.render(TALK))[0] == prompt + "A<|im_end|>\n"
