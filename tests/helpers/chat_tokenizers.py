"""Tokenizers with the special tokens of known chat templates, and those templates: stock ones out of the trl package
where it is installed, and short ones of the same behaviour, written here."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from engine.data.chat import builtin, encode, templates
from engine.data.tokenizer import HuggingFaceTokenizer, train_tokenizer

TEXTS = ["two and two is four\n\nhello assistant user system, be nice\n", "def f(x):\n    return x\n"] * 5

# Thinking is dropped from turns before the last question; content is split at </think>; calls and results as XML.
LIKE_QWEN3 = """\
{%- set last = namespace(question=-1) %}
{%- for m in messages if m.role == "user" %}{% set last.question = loop.index0 %}{% endfor -%}
{%- set count = namespace(users=0) %}
{%- for m in messages %}
    {%- if m.role == "user" %}{% set count.users = count.users + 1 %}{% endif %}
    {%- if m.role in ("user", "system") %}
        {{- "<|im_start|>" + m.role + "\\n" + m.content + "<|im_end|>\\n" }}
    {%- elif m.role == "tool" %}
        {{- "<|im_start|>user\\n<tool_response>\\n" + m.content + "\\n</tool_response><|im_end|>\\n" }}
    {%- else %}
        {%- set answer = m.content.split("</think>")[-1].lstrip("\\n") %}
        {%- set thought = m.reasoning_content or (m.content.split("</think>")[0].split("<think>")[-1] if "</think>" in m.content else "") %}
        {{- "<|im_start|>assistant\\n" }}
        {%- if count.users > last.question and thought %}{{- "<think>\\n" + thought.strip("\\n") + "\\n</think>\\n\\n" }}{% endif %}
        {{- answer }}
        {%- for call in m.tool_calls or [] %}
            {{- "\\n<tool_call>\\n" + call.function | tojson + "\\n</tool_call>" }}
        {%- endfor %}
        {{- "<|im_end|>\\n" }}
    {%- endif %}
{%- endfor %}
{{- "<|im_start|>assistant\\n" if add_generation_prompt else "" }}
"""  # noqa: E501
# A header of its own before everything, contents trimmed.
LIKE_LLAMA3 = """\
{{- bos_token + "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + strftime_now("%d %b %Y") + "\\n\\n" }}
{%- if messages[0].role == "system" %}{{- messages[0].content | trim }}{% set messages = messages[1:] %}{% endif %}
{{- "<|eot_id|>" }}
{%- for m in messages %}
    {{- "<|start_header_id|>" + m.role + "<|end_header_id|>\\n\\n" + m.content | trim + "<|eot_id|>" }}
{%- endfor %}
{{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" if add_generation_prompt else "" }}
"""
# The system message in the first question, the assistant called model, turns must alternate.
LIKE_GEMMA3 = """\
{{- bos_token }}
{%- set first = "" %}
{%- if messages[0].role == "system" %}
    {%- set first = messages[0].content + "\\n\\n" %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for m in messages %}
    {%- if (m.role == "user") != (loop.index0 % 2 == 0) %}{{- raise_exception("roles must alternate") }}{% endif %}
    {{- "<start_of_turn>" + ("model" if m.role == "assistant" else m.role) + "\\n" }}
    {{- (first if loop.first else "") + m.content | trim + "<end_of_turn>\\n" }}
{%- endfor %}
{{- "<start_of_turn>model\\n" if add_generation_prompt else "" }}
"""
# No generation prompt: an answer follows the closing bracket of the question.
LIKE_MISTRAL = """\
{{- bos_token }}
{%- for m in messages %}
    {{- "[INST] " + m.content + " [/INST]" if m.role == "user" else " " + m.content | trim + eos_token }}
{%- endfor %}
"""
# No special token but the end.
PLAIN_TEXT = """\
{%- for m in messages %}
    {{- "### " + m.role + ":\\n" + m.content + ("\\n\\n" if m.role != "assistant" else eos_token + "\\n\\n") }}
{%- endfor %}
{{- "### assistant:\\n" if add_generation_prompt else "" }}
"""
LIKE_GPTOSS = builtin.HARMONY.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")

CHATML = ("<|im_start|>", "<|im_end|>")
HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>")
LLAMA3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>")
GEMMA = ("<bos>", "<start_of_turn>", "<end_of_turn>")
# name -> (text, special tokens, bos, eos)
TEMPLATES = {
    "like_qwen3": (LIKE_QWEN3, CHATML, None, "<|im_end|>"),
    "like_llama3": (LIKE_LLAMA3, LLAMA3, "<|begin_of_text|>", "<|eot_id|>"),
    "like_gemma3": (LIKE_GEMMA3, GEMMA, "<bos>", "<end_of_turn>"),
    "like_gptoss": (LIKE_GPTOSS, HARMONY, None, "<|return|>"),
    "like_mistral": (LIKE_MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), "<s>", "</s>"),
    "plain_text": (PLAIN_TEXT, ("</s>",), None, "</s>"),
    "chatml": (builtin.CHATML, CHATML, None, "<|im_end|>"),
    "harmony": (builtin.HARMONY, HARMONY, None, "<|return|>"),
    "alpaca": (builtin.ALPACA, ("</s>",), None, "</s>"),
}
STOCK = {
    "llama3_1": (LLAMA3, "<|begin_of_text|>", "<|eot_id|>"),
    "llama3": (LLAMA3, "<|begin_of_text|>", "<|eot_id|>"),
    "qwen3": (CHATML, None, "<|im_end|>"),
    "qwen2_5": (CHATML, None, "<|im_end|>"),
    "gemma3": (GEMMA, "<bos>", "<end_of_turn>"),
    "gptoss": (HARMONY, None, "<|return|>"),
}


def stock(name: str) -> str:
    """The text of a template as its model has it; skips the test where trl is not installed."""
    trl = find_spec("trl")
    path = Path(trl.origin).parent / "chat_templates" / f"{name}.jinja" if trl and trl.origin else None
    if path is None or not path.is_file():
        pytest.skip(f"the text of {name} comes with trl")
    return path.read_text(encoding="utf-8")


@functools.cache
def _base() -> str:
    return train_tokenizer(TEXTS, 360, specials=4).text


def model_of(specials: tuple[str, ...]) -> tokenizers.Tokenizer:
    """A byte-level BPE with these special tokens, and <think> … as added tokens that text may hold (as Qwen3's)."""
    model = tokenizers.Tokenizer.from_str(_base())
    model.add_special_tokens(list(specials))
    names = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
    model.add_tokens([tokenizers.AddedToken(name, special=False, normalized=False) for name in names])
    return model


@functools.cache
def tokenizer(specials: tuple[str, ...], bos: str | None = None, eos: str | None = None,
              template: str | None = None) -> HuggingFaceTokenizer:  # fmt: skip
    config = {"bos_token": bos, "eos_token": eos, "chat_template": template}
    config = {name: value for name, value in config.items() if value is not None}
    return HuggingFaceTokenizer(model_of(specials).to_str(), where="test", config=config)


@functools.cache
def encoder(name: str, seq_length: int = 4096, **settings) -> encode.Encoder:
    """An encoder of one of ``TEMPLATES``."""
    text, specials, bos, eos = TEMPLATES[name]
    made = tokenizer(specials, bos, eos, text)
    return encode.Encoder(made, templates.load("auto", None, made), seq_length, **settings)


def stock_encoder(name: str, variant: str = "", **settings) -> encode.Encoder:
    """An encoder of a stock template, or of trl's ``_training`` variant of it, which has generation marks."""
    specials, bos, eos = STOCK[name]
    made = tokenizer(specials, bos, eos, stock(name + variant))
    return encode.Encoder(made, templates.load("auto", None, made), 4096, **settings)


def supervised(encoder: encode.Encoder, example: encode.Example) -> list[str]:
    """The text of each run of supervised tokens."""
    mask = np.concatenate(([False], example.mask[1:], [False]))
    starts, ends = np.flatnonzero(mask[1:] & ~mask[:-1]) + 1, np.flatnonzero(~mask[1:] & mask[:-1]) + 1
    return [text_of(encoder, example.tokens[start:end]) for start, end in zip(starts, ends, strict=True)]


def text_of(encoder: encode.Encoder, tokens: np.ndarray) -> str:
    return encoder.tokenizer.decode(tokens.tolist())
