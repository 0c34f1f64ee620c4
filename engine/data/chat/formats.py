"""The formats of instruction, chat and preference rows, each to one meaning (conversation.py).

| format      | fields                                                                                     |
|-------------|--------------------------------------------------------------------------------------------|
| alpaca      | instruction, input (may be missing), output; system, history ([question, answer] pairs)    |
| instruction | instruction, response; context (Dolly), system                                             |
| messages    | messages: [{role, content, tool_calls …}]; tools, system                                   |
| sharegpt    | conversations: [{from, value}]; tools, system                                              |
| qa          | question or input or prompt, answer or output or completion or response; system            |
| text        | text                                                                                       |
| preference  | prompt (text or messages), chosen, rejected (text, a message, or whole conversations)      |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from engine.data.chat.conversation import (
    BadRow,
    Conversation,
    Message,
    Preference,
    Text,
    conversation,
    decoded,
    kind_name,
    message,
    prompt_messages,
    tool_list,
)

Item = Conversation | Preference | Text

_QUESTIONS = ("question", "prompt", "query", "instruction", "input")
_ANSWERS = ("answer", "completion", "response", "output")
_HUMAN = re.compile(r"\n\n(Human|Assistant):[ \t]*")


def parse(row: Mapping, format: str = "auto") -> Item:
    """The meaning of one row. ``auto`` goes by the names of its fields.

    Raises:
        BadRow: a field is missing or of the wrong kind, a role unknown, a completion empty, chosen equal to rejected.
    """
    if not isinstance(row, Mapping):
        raise BadRow("not_an_object", f"{kind_name(row)}, not an object with fields")
    return _PARSERS[detect(row) if format == "auto" else format](row)


def detect(row: Mapping) -> str:
    """The format that a row's fields tell of."""
    has = {name for name, value in row.items() if value is not None}
    if {"chosen", "rejected"} & has:
        return "preference"
    if "messages" in has:
        return "messages"
    if "conversations" in has or "conversation" in has:
        return "sharegpt"
    if "instruction" in has:
        if "output" in has or not has & {*_ANSWERS}:
            return "alpaca"
        return "instruction" if "response" in has else "qa"
    if has & {*_QUESTIONS} and (has & {*_ANSWERS} or "text" not in has):
        return "qa"
    if "text" in has:
        return "text"
    raise BadRow("unknown_format", f"no format has these fields: {_fields(row)}")


def _alpaca(row: Mapping) -> Conversation:
    return _instruction_row(row, "input", "output")


def _instruction(row: Mapping) -> Conversation:
    return _instruction_row(row, "context" if row.get("context") is not None else "input", "response")


def _instruction_row(row: Mapping, context: str, response: str) -> Conversation:
    instruction = _text(row, "instruction", "missing_prompt")
    given = _text(row, context, None)
    user: Message = {"role": "user", "content": instruction, "instruction": instruction}
    if given.strip():
        # A template that knows no input gets both as one message.
        user |= {"content": f"{instruction}\n\n{given}", "input": given}
    return _turns(row, [*_history(row), user], _text(row, response, "missing_response"))


def _history(row: Mapping) -> list[Message]:
    turns = decoded(row.get("history") or [], "history")
    if not isinstance(turns, Sequence) or not all(
        isinstance(turn, Sequence) and not isinstance(turn, str) and len(turn) == 2 for turn in turns
    ):
        raise BadRow("bad_history", "history is no array of [question, answer]")
    return [{"role": role, "content": text} for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)]  # fmt: skip


def _qa(row: Mapping) -> Conversation:
    question = next((name for name in _QUESTIONS if row.get(name) is not None), "question")
    answer = next((name for name in _ANSWERS if row.get(name) is not None and name != question), "answer")
    user = row.get(question)
    if question == "instruction":
        return _instruction_row(row, "input", answer)
    if isinstance(user, Sequence) and not isinstance(user, str):  # TRL's conversational prompt and completion
        return conversation([*user, *_as_messages(row.get(answer), answer)], tools=row.get("tools"),
                            system=row.get("system"))  # fmt: skip
    turns = [{"role": "user", "content": _text(row, question, "missing_prompt")}]
    return _turns(row, turns, _text(row, answer, "missing_response"))


def _turns(row: Mapping, turns: list[Message], response: str) -> Conversation:
    answered = [*turns, {"role": "assistant", "content": response}]
    return conversation(answered, tools=row.get("tools"), system=row.get("system"))


def _messages(row: Mapping) -> Conversation:
    return _listed(row, "messages", "conversations")


def _sharegpt(row: Mapping) -> Conversation:
    return _listed(row, "conversations", "conversation", "messages")


def _listed(row: Mapping, *names: str) -> Conversation:
    for name in names:
        if row.get(name) is not None:
            system = row.get("system", row.get("system_prompt"))
            return conversation(row[name], tools=row.get("tools"), system=system)
    raise BadRow("no_messages", f"no field {names[0]!r} (fields: {_fields(row)})")


def _plain(row: Mapping) -> Text:
    return Text(_text(row, "text", "missing_text"))


def _preference(row: Mapping) -> Preference:
    sides = {}
    for name in ("chosen", "rejected"):
        value = row.get(name)
        if value is None:
            raise BadRow(f"missing_{name}", f"no field {name!r} (fields: {_fields(row)})")
        if isinstance(value, str) and value.lstrip().startswith(("[{", "{\"")):
            value = decoded(value, name)
        if isinstance(value, str) and not value.strip():
            raise BadRow("empty_completion", f"{name} is empty")
        sides[name] = value
    prompt = _preference_prompt(row)
    if not prompt and all(isinstance(side, str) for side in sides.values()):
        sides = {name: _human_assistant(side, name) for name, side in sides.items()}
    chosen, rejected = (_whole(prompt, side, name) for name, side in sides.items())
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == len(chosen) == len(rejected) or chosen == rejected:
        raise BadRow("chosen_is_rejected", "chosen and rejected are the same")
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if shared != len(side) - 1:
            place = f"they part at message {shared + 1} of {len(side)} in {name}"
            raise BadRow("parts_too_early", f"only the last message of chosen and rejected may differ, {place}")
        if side[-1]["role"] != "assistant":
            raise BadRow("missing_response", f"the last message of {name} is from the {side[-1]['role']}")
    if not any(one["role"] in ("user", "tool") for one in chosen[:-1]):
        raise BadRow("missing_prompt", "chosen and rejected answer no prompt")
    return Preference(chosen[:-1], chosen[-1], rejected[-1], tool_list(row.get("tools")))


def _preference_prompt(row: Mapping) -> list[Message]:
    name = next((name for name in ("prompt", *_QUESTIONS) if row.get(name) not in (None, "", [])), None)
    if name is None:
        return []
    prompt = row[name]
    if isinstance(prompt, str) and prompt.lstrip().startswith("[{"):
        prompt = decoded(prompt, name)
    if not isinstance(prompt, str):
        messages = prompt_messages(prompt)
    elif not prompt.strip():
        raise BadRow("missing_prompt", f"{name} is empty")
    else:
        given = row.get("input")
        user: Message = {"role": "user", "content": prompt}
        if name == "instruction" and isinstance(given, str) and given.strip():
            user |= {"content": f"{prompt}\n\n{given}", "instruction": prompt, "input": given}
        messages = [user]
    system = row.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _whole(prompt: list[Message], side: object, name: str) -> list[Message]:
    """The conversation of one side: a text or an assistant's message answers the prompt, a longer list holds it."""
    messages = prompt_messages(_as_messages(side, name))
    if prompt and all(one["role"] == "assistant" for one in messages):
        return [*prompt, *messages]
    if prompt and messages[: len(prompt)] != prompt:
        # A list that holds the prompt without the row's system message, say, is completed by it.
        head = [one for one in prompt if one["role"] in ("system", "developer")]
        return messages if messages[0]["role"] in ("system", "developer") else [*head, *messages]
    return messages


def _as_messages(value: object, name: str) -> list:
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    if isinstance(value, Mapping):
        return [message(value)]
    if value is None:
        raise BadRow("missing_response", f"no field {name!r}")
    if not isinstance(value, Sequence):
        raise BadRow("not_messages", f"{name} holds {kind_name(value)}, neither text nor messages")
    if not value:
        raise BadRow("empty_completion", f"{name} is empty")
    return list(value)


def _human_assistant(text: object, name: str) -> list[Message]:
    """Anthropic's hh-rlhf: one text of ``\\n\\nHuman: … \\n\\nAssistant: …`` turns, the prompt inside."""
    assert isinstance(text, str)
    parts = _HUMAN.split(text if text.startswith("\n\n") else f"\n\n{text}")
    if len(parts) < 5 or parts[0].strip():
        raise BadRow("missing_prompt", f"no prompt, and {name} is not a text of Human: and Assistant: turns")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said} for who, said in zip(parts[1::2], parts[2::2], strict=True)]


def _text(row: Mapping, name: str, missing: str | None) -> str:
    """The text of a field; ``missing`` is the reason of a row without it, None where it may be left out."""
    value = row.get(name)
    if value is None:
        if missing is None:
            return ""
        raise BadRow(missing, f"no field {name!r} (fields: {_fields(row)})")
    if not isinstance(value, str):
        raise BadRow("field_not_text", f"field {name!r} holds {kind_name(value)}, not text")
    if missing and not value.strip():
        raise BadRow("empty_completion" if missing == "missing_response" else missing, f"field {name!r} is empty")
    return value


def _fields(row: Mapping) -> str:
    names = [str(name)[:40] for name in list(row)[:10]]
    return (", ".join(names) + (", …" if len(row) > 10 else "")) or "none"


_PARSERS: dict[str, Callable[[Mapping], Item]] = {
    "alpaca": _alpaca, "instruction": _instruction, "messages": _messages, "sharegpt": _sharegpt, "qa": _qa,
    "text": _plain, "preference": _preference,
}  # fmt: skip
