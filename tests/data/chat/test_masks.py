"""What is supervised, under stock and marked templates: the answers with their end token, and nothing else."""

from __future__ import annotations

import datetime

import chat_tokenizers as chat
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.data.chat import audit, builtin, templates
from engine.data.chat.conversation import BadRow, Conversation
from engine.data.chat.encode import Encoder
from engine.errors import UserError

TALK = [
    {"role": "system", "content": "be nice"},
    {"role": "user", "content": "hi there"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nfirst"},
    {"role": "user", "content": "more\n"},
    {"role": "assistant", "content": "second", "thinking": "why", "reasoning_content": "why"},
]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer"}}}}}]  # fmt: skip
AGENT = [
    {"role": "user", "content": "add"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": 'the "sum"'},
    {"role": "assistant", "content": "four"},
]
FINAL = "<|channel|>final<|message|>"
THOUGHT = "<|channel|>analysis<|message|>why<|end|><|start|>assistant"
# What is supervised of TALK: the thinking of the first turn is dropped where the model would not see it again.
EXPECTED = {
    "qwen3": ["first<|im_end|>", "<think>\nwhy\n</think>\n\nsecond<|im_end|>"],
    "llama3_1": ["<think>\nhm\n</think>\n\nfirst<|eot_id|>", "second<|eot_id|>"],
    "gemma3": ["<think>\nhm\n</think>\n\nfirst<end_of_turn>", "second<end_of_turn>"],
    "gptoss": [f"{FINAL}<think>\nhm\n</think>\n\nfirst<|end|>", f"{THOUGHT}{FINAL}second<|return|>"],
}
AGENT_CALL = '<|channel|>commentary json<|message|>{"a": 2}<|call|>'
EXPECTED_CALLS = {
    "qwen3": ['<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>',
              "<think>\n\n</think>\n\nfour<|im_end|>"],
    "llama3_1": ['{"name": "add", "parameters": {"a": 2}}<|eot_id|>', "four<|eot_id|>"],
    "gptoss": [f" to=functions.add{AGENT_CALL}", f"{FINAL}four<|return|>"],
}  # fmt: skip


@pytest.mark.parametrize("name", list(EXPECTED))
def test_stock_templates_without_marks(name):
    encoder = chat.stock_encoder(name)
    assert not encoder.template.marked()
    assert chat.supervised(encoder, encoder.example(Conversation(TALK))) == EXPECTED[name]
    last = chat.stock_encoder(name, supervise="last")
    assert chat.supervised(last, last.example(Conversation(TALK))) == EXPECTED[name][1:]


@pytest.mark.parametrize("name", list(EXPECTED_CALLS))
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_stock_templates_with_calls(name, tools):
    encoder = chat.stock_encoder(name)
    assert chat.supervised(encoder, encoder.example(Conversation(AGENT, tools))) == EXPECTED_CALLS[name]


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "gemma3", "gptoss"])
def test_the_short_templates_behave_like_the_stock_ones(name):
    encoder = chat.encoder({"llama3_1": "like_llama3"}.get(name, f"like_{name}"))
    assert chat.supervised(encoder, encoder.example(Conversation(TALK))) == EXPECTED[name]


def test_harmony_marks_the_same_as_found_without_them():
    marked, found = chat.encoder("harmony"), chat.encoder("like_gptoss")
    assert marked.template.marked()
    assert not found.template.marked()
    for item in (Conversation(TALK), Conversation(AGENT, TOOLS), Conversation(AGENT[:2])):
        one, other = marked.example(item), found.example(item)
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.mask.tolist() == other.mask.tolist()


@pytest.mark.parametrize("name", ["qwen2_5", "gemma3", "llama3"])
def test_found_turns_are_those_that_trl_marks(name):
    """trl's variants mark a line break behind the end token as well, Qwen's one before the answer; else the same."""
    found, marked = chat.stock_encoder(name), chat.stock_encoder(name, "_training")
    assert marked.template.marked()
    assert not found.template.marked()
    talk = Conversation([{key: message[key] for key in ("role", "content")} for message in TALK])
    one, other = found.example(talk), marked.example(talk)
    assert one.tokens.tolist() == other.tokens.tolist()
    assert [text.strip("\n") for text in chat.supervised(marked, other)] == chat.supervised(found, one)


@pytest.mark.parametrize("name", list(chat.STOCK))
def test_tokens_are_those_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    specials, bos, eos = chat.STOCK[name]
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=chat.model_of(specials), bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False)
    encoder = chat.stock_encoder(name)
    for messages in (TALK, TALK[1:3], [TALK[1], {"role": "assistant", "content": "\n\n  x é世 "}]):
        # Ours takes one date for every day.
        text = theirs.apply_chat_template(messages, chat_template=chat.stock(name), tokenize=False)
        text = text.replace(datetime.date.today().isoformat(), templates.DATE.date().isoformat())
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        assert encoder.example(Conversation(messages)).tokens.tolist() == expected


@pytest.mark.parametrize("name", ["gptoss", "qwen2_5"])
def test_masks_of_marks_are_those_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    specials, bos, eos = chat.STOCK[name]
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=chat.model_of(specials), bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False)
    text = chat.stock(f"{name}_training").replace('strftime_now("%Y-%m-%d")', '"2025-01-01"')
    made = theirs.apply_chat_template(TALK, chat_template=text, tokenize=True, return_dict=True,
                                      return_assistant_tokens_mask=True)
    example = chat.stock_encoder(name, "_training").example(Conversation(TALK))
    assert example.tokens.tolist() == made["input_ids"]
    assert example.mask.tolist() == [bool(one) for one in made["assistant_masks"]]


def test_a_prompt_that_goes_on_with_what_not_every_answer_starts_with():
    text = chat.LIKE_QWEN3.replace('"<|im_start|>assistant\\n" if add', '"<|im_start|>assistant\\n<think>\\n" if add')
    assert text != chat.LIKE_QWEN3
    made = chat.tokenizer(chat.CHATML, None, "<|im_end|>", text)
    encoder = Encoder(made, templates.load("auto", None, made), 4096)
    found = chat.supervised(encoder, encoder.example(Conversation(TALK)))
    assert found == ["first<|im_end|>", "why\n</think>\n\nsecond<|im_end|>"]
    # What an answer shares with half a line of the prompt is its own.
    half = Conversation([TALK[1], {"role": "assistant", "content": "<th is it"}])
    assert chat.supervised(encoder, encoder.example(half)) == ["<th is it<|im_end|>"]


@pytest.mark.parametrize("shown", ["{instruction} + {input}", "{instruction}", "{input}"])
def test_turns_behind_a_question_that_shows_its_fields(shown):
    shown = shown.format(instruction="message.instruction", input="message.input")
    text = builtin.ALPACA.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    text = text.replace('message.instruction + "\\n\\n### Input:\\n" + message.input', shown)
    assert shown in text
    made = chat.tokenizer(("</s>",), None, "</s>", text)
    encoder = Encoder(made, templates.load("auto", None, made), 4096)
    question = {"role": "user", "content": "add\n\n2", "instruction": "add", "input": "2"}
    example = encoder.example(Conversation([question, {"role": "assistant", "content": "four"}]))
    assert chat.supervised(encoder, example) == ["four</s>"]


def test_messages_of_weight_zero_are_context():
    encoder = chat.encoder("like_llama3")
    example = encoder.example(Conversation(TALK, unsupervised=frozenset([2])))
    assert chat.supervised(encoder, example) == ["second<|eot_id|>"]
    with pytest.raises(BadRow, match="supervised"):
        encoder.example(Conversation(TALK, unsupervised=frozenset([2, 4])))


def test_a_token_over_the_border_belongs_to_the_answer():
    """The tokenizer joins the header's line break with the answer's: at inference the model writes the second one."""
    encoder = chat.encoder("chatml")
    example = encoder.example(Conversation([TALK[1], {"role": "assistant", "content": "\nx"}]))
    first = int(np.flatnonzero(example.mask)[0])
    assert encoder.tokenizer.encode("\n\n") == [example.tokens[first]]
    assert chat.supervised(encoder, example) == ["\n\nx<|im_end|>"]


def test_a_template_that_ends_nothing_is_refused():
    text = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    made = chat.tokenizer(chat.CHATML, None, "<|im_end|>", text)
    with pytest.raises(UserError, match=r"could not learn to stop.*eos_token"):
        _ = Encoder(made, templates.load("auto", None, made), 64).end_ids
    refusing = chat.tokenizer(chat.CHATML, None, "<|im_end|>", "{{ raise_exception('never') }}")
    with pytest.raises(UserError, match="never"):
        _ = Encoder(refusing, templates.load("auto", None, refusing), 64).end_ids


def test_a_template_that_hides_its_turns_is_refused_and_not_guessed():
    text = chat.LIKE_LLAMA3.replace("m.content | trim", "m.content[:3] + m.content | length | string")
    made = chat.tokenizer(chat.LLAMA3, "<|begin_of_text|>", "<|eot_id|>", text)
    encoder = Encoder(made, templates.load("auto", None, made), 4096)
    with pytest.raises(BadRow) as refused:
        encoder.example(Conversation(TALK))
    assert refused.value.reason == "turns_not_found"


# Pieces of text that a template, a tokenizer or a trimmer could stumble over.
PIECES = ["hello", " ", "\n", "\n\n", "é世", "x", "{{ x }}", "{% raw %}", '"', "\\", "### assistant:\n", "assistant",
          "🙂", *chat.CHATML, *chat.HARMONY, *chat.LLAMA3, *chat.GEMMA, "<s>", "</s>", "[INST]", "[/INST]",
          "<|im_start|>assistant\n", "<|endoftext|>", "<<|im_end|>", "<|im_<|im_end|>end|>"]  # fmt: skip
CONTENT = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join).filter(str.strip)

@pytest.mark.parametrize("name", list(chat.TEMPLATES))
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.lists(CONTENT, min_size=2, max_size=6).filter(lambda found: len(found) % 2 == 0))
def test_whatever_people_write_answers_and_only_answers_are_supervised(name, contents):
    encoder = chat.encoder(name)
    # An answer that starts with a blank may share a token with the header (tested above).
    messages = [{"role": ("user", "assistant")[i % 2], "content": text if i % 2 == 0 else f"A{text.rstrip()}Z"}
                for i, text in enumerate(contents)]  # fmt: skip
    example = encoder.example(Conversation(messages))
    head = {"like_mistral": " ", "like_gptoss": FINAL, "harmony": FINAL}.get(name, "")
    turns = [head + message["content"] for message in messages[1::2]]
    ends = {encoder.tokenizer.token_id(token) for token in encoder.turns.end_tokens}
    found = chat.supervised(encoder, example)
    assert [text[: len(turn)] for text, turn in zip(found, turns, strict=True)] == turns
    assert all(encoder.tokenizer.token_id(text[len(turn):]) in ends for text, turn in zip(found, turns, strict=True))
    # The special tokens are those of the same conversation about nothing: nobody wrote himself another.
    tame = encoder.example(Conversation([message | {"content": "AxZ"} for message in messages]))
    specials = set(encoder.spelling.specials.values())
    found, expected = ([token for token in one.tokens.tolist() if token in specials] for one in (example, tame))
    assert found == expected
    audit.check([example], encoder.tokenizer, end_ids=encoder.end_ids, bos_id=encoder.bos_id)
