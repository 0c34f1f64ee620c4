"""What a row of chat data means, whatever its format: a conversation, a preference, or a plain text.

Messages are the plain dictionaries that chat templates read: ``role``, ``content`` (always text), and where they have
them ``thinking`` and ``reasoning_content`` (the same text, for templates of either name), ``tool_calls`` (arguments
as objects, not as JSON text), ``name``, ``tool_call_id``, ``instruction`` and ``input`` (of Alpaca rows).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]

ROLES = {
    "system": "system", "developer": "developer",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "tool": "tool", "function": "tool", "ipython": "tool", "observation": "tool", "tool_response": "tool",
    "function_response": "tool",
    "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
# An assistant's message whose content is itself the call, as JSON.
_CALLS = ("function_call", "tool_call")
_REASONING = ("reasoning_content", "thinking", "reasoning")
_KEPT = ("name", "tool_call_id", "instruction", "input")
_NAMES = {list: "an array", dict: "an object", str: "text", int: "a number", float: "a number", bool: "a boolean"}


class BadRow(Exception):
    """A row that cannot be trained on. ``reason`` is what the manifest counts, ``detail`` what a person reads."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Conversation:
    """``unsupervised``: indices of assistant messages that are context only (``"weight": 0`` in the data)."""

    messages: list[Message]
    tools: list[dict] | None = None
    unsupervised: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Preference:
    """Two answers, each one assistant message, to the same prompt."""

    prompt: list[Message]
    chosen: Message
    rejected: Message
    tools: list[dict] | None = None


@dataclass(frozen=True)
class Text:
    """A document without turns."""

    text: str


def kind_name(value: object) -> str:
    """A JSON value's type for a person."""
    return "null" if value is None else _NAMES.get(type(value), type(value).__name__)


def conversation(raw: object, *, tools: object = None, system: object = None) -> Conversation:
    """Checked messages that end with an assistant's. ``system`` becomes the first message if there is none.

    Raises:
        BadRow: not a list of messages, an unknown role, an empty one, no response.
    """
    messages, unsupervised = _all_messages(raw)
    if isinstance(system, str) and system.strip() and messages[0]["role"] not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": system})
        unsupervised = [index + 1 for index in unsupervised]
    last = messages[-1]["role"]
    if last != "assistant":
        raise BadRow("missing_response", f"the last message is from the {last}, there is no response to it")
    if all(message["role"] in ("assistant", "system", "developer") for message in messages):
        raise BadRow("missing_prompt", "no message but the assistant's")
    return Conversation(messages, tool_list(tools), frozenset(unsupervised))


def prompt_messages(raw: object) -> list[Message]:
    """Checked messages that are answered by what follows them."""
    return _all_messages(raw)[0]


def decoded(raw: object, what: str) -> object:
    """``raw``, parsed where it is JSON in text (as a CSV column or a Parquet column of strings holds lists)."""
    if not isinstance(raw, str):
        return raw
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadRow("not_json", f"{what} is text that is not JSON ({error})") from None


def tool_list(raw: object) -> list[dict] | None:
    """The functions that may be called, as JSON schemas; None for none."""
    if raw is None or raw in ("", [], {}):
        return None
    tools = decoded(raw, "tools")
    tools = [tools] if isinstance(tools, Mapping) else tools
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise BadRow("bad_tools", f"tools holds {kind_name(tools)}, not an array")
    for tool in tools:
        if not isinstance(tool, Mapping):
            raise BadRow("bad_tools", f"tools holds {kind_name(tool)}, not objects")
    # Templates expect {"type": "function", "function": {...}}; many files hold the inner object alone.
    return [dict(one) if "function" in one else {"type": "function", "function": dict(one)} for one in tools] or None


def _all_messages(raw: object) -> tuple[list[Message], list[int]]:
    raw = decoded(raw, "the list of messages")
    if not isinstance(raw, Sequence) or isinstance(raw, str):
        raise BadRow("not_messages", f"the messages are {kind_name(raw)}, not an array")
    if not raw:
        raise BadRow("no_messages", "the list of messages is empty")
    messages, unsupervised = [], []
    for index, one in enumerate(raw):
        messages.append(message(one, index))
        if one.get("weight") == 0 or one.get("train") is False:
            unsupervised.append(index)
    return messages, unsupervised


def message(raw: object, index: int = 0) -> Message:
    """One message; both ``role``/``content`` and ``from``/``value`` are read. ``index`` (from 0) is for the error."""
    where = f"message {index + 1}"
    if not isinstance(raw, Mapping):
        raise BadRow("not_a_message", f"{where} is {kind_name(raw)}, not an object")
    name = raw.get("role") or raw.get("from")
    if not isinstance(name, str):
        raise BadRow("no_role", f"{where} has no role (fields: {', '.join(map(str, raw)) or 'none'})")
    role = ROLES.get(name.strip().lower())
    if role is None:
        raise BadRow("unknown_role", f"{where} has the unknown role {name[:40]!r}")
    content = _content(raw["value"] if raw.get("content") is None and "value" in raw else raw.get("content"), where)
    result: Message = {"role": role, "content": content}
    calls = raw.get("tool_calls")
    if name.strip().lower() in _CALLS:
        calls, result["content"] = content, ""
    elif isinstance(raw.get("function_call"), Mapping):
        calls = raw["function_call"]
    if calls and role == "assistant":
        result["tool_calls"] = _tool_calls(calls, where)
    for field in _KEPT:
        if isinstance(raw.get(field), str):
            result[field] = raw[field]
    reasoning = next((raw[field] for field in _REASONING if isinstance(raw.get(field), str)), None)
    if role == "assistant" and reasoning:
        result["thinking"] = result["reasoning_content"] = reasoning
    _not_empty(result, where)
    return result


def _not_empty(made: Message, where: str) -> None:
    role = made["role"]
    if role == "tool" or made["content"].strip() or made.get("tool_calls"):
        return  # a tool may well have nothing to say
    if role == "assistant":
        raise BadRow("empty_completion", f"{where}, the assistant's, is empty")
    raise BadRow("empty_message", f"{where}, of the {role}, is empty")


def _content(raw: object, where: str) -> str:
    """Text, also of a list of parts; a part that is no text (an image) cannot be trained on here."""
    if raw is None:
        return ""
    if isinstance(raw, str):
        return raw
    if not isinstance(raw, Sequence):
        raise BadRow("content_not_text", f"the content of {where} is {kind_name(raw)}, not text")
    texts = []
    for part in raw:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type", "object") if isinstance(part, Mapping) else kind_name(part)
            raise BadRow("content_not_text", f"{where} has a part that is not text ({kind})")
        texts.append(text)
    return "".join(texts)


def _tool_calls(raw: object, where: str) -> list[dict]:
    raw = decoded(raw, f"the call of {where}")
    calls = [raw] if isinstance(raw, Mapping) else raw
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise BadRow("bad_tool_call", f"the calls of {where} are {kind_name(calls)}, not an array")
    result = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise BadRow("bad_tool_call", f"a call of {where} names no function")
        arguments = function.get("arguments", function.get("parameters"))
        if isinstance(arguments, str):
            arguments = decoded(arguments.strip() or "{}", f"the arguments of {function['name'][:40]} in {where}")
        arguments = {} if arguments is None else arguments
        if not isinstance(arguments, Mapping):
            raise BadRow("bad_tool_call", f"the arguments of {function['name'][:40]} in {where} are no object")
        made: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        if isinstance(call.get("id"), str):
            made["id"] = call["id"]
        result.append(made)
    return result
