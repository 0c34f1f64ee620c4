"""Which characters of a rendered conversation the model generates.

A template with ``{% generation %}`` says so itself. For all others (stock Llama 3, Qwen3, Gemma 3, GPT-OSS) it is found
in the one text that is trained on, not by comparing the texts of shorter conversations: those differ from the whole
(Qwen3 drops the thinking of earlier turns, GPT-OSS ends the last turn with ``<|return|>`` and others with ``<|end|>``).

1. The conversation is rendered again with one *marker* character inside every message (special.py). With the markers
   taken out, the text must be the same: so markers changed nothing, and tell where each message ended up.
2. A turn starts where the template's own generation prompt ends: what stands between the marker of the message before
   it and the turn must be what the template writes there when it asks for an answer.
3. A turn ends with the last *end token* before the next message's marker. End tokens are what the template writes after
   an answer: the first special token behind it in three short conversations.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from engine.data.chat import templates
from engine.data.chat.conversation import BadRow, Message
from engine.data.chat.special import MARKER, MAX_MESSAGES, Spelling, marker, message_of
from engine.data.chat.templates import Template
from engine.errors import UserError

_MARKED_FIELDS = ("content", "instruction", "input", "thinking", "reasoning_content")
_ANSWER: Message = {"role": "assistant", "content": "four"}
_ASK: Message = {"role": "user", "content": "two and two?"}
_CALL: Message = {
    "role": "assistant", "content": "",
    "tool_calls": [{"id": "call00001", "type": "function", "function": {"name": "add", "arguments": {"to": "two"}}}],
}  # fmt: skip
_RESULT: Message = {"role": "tool", "name": "add", "tool_call_id": "call00001", "content": "four"}
_PROBES = ([_ASK, _ANSWER], [_ASK, _ANSWER, _ASK, _ANSWER], [_ASK, _CALL, _RESULT, _ANSWER])


@dataclass(frozen=True)
class Rendered:
    """``text``: special tokens of the template as twins, shields still in place. ``turns``: message index -> the ranges
    of characters that the model generates in it."""

    text: str
    turns: dict[int, list[tuple[int, int]]]


@dataclass(frozen=True)
class _Places:
    """A rendered text without markers, and the first and last place in it of each message's marker."""

    text: str
    first: dict[int, int]
    last: dict[int, int]


class Turns:
    """Renders conversations with one template and tokenizer, and finds the assistant's turns."""

    def __init__(self, template: Template, spelling: Spelling):
        self.template = template
        self.spelling = spelling

    def render(self, messages: list[Message], tools: list[dict] | None) -> Rendered:
        """Text and turns of a conversation.

        Raises:
            BadRow: the template refuses it, or a turn cannot be told from what is around it.
        """
        if len(messages) > MAX_MESSAGES:
            raise BadRow("too_many_messages", f"{len(messages):,} messages, at most {MAX_MESSAGES:,}")
        try:
            return self._render(messages, tools)
        except RecursionError:
            raise BadRow("too_deep", "a call's arguments or the tools are nested too deeply") from None

    def _render(self, messages: list[Message], tools: list[dict] | None) -> Rendered:
        messages, tools = self.spelling.shield_all(messages), self.spelling.shield_all(tools)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if self.template.marked(tools):
            text, ranges = templates.generated(self._twins(messages, tools))
            if len(ranges) == len(answers):
                return Rendered(text, {i: [one] for i, one in zip(answers, ranges, strict=True)})
            return Rendered(text, self._by_marker(messages, tools, text, ranges))
        plain = self._twins(messages, tools)
        places = self._places(messages, tools)
        if places.text != plain:
            raise BadRow("turns_not_found", "the chat template reads the messages in a way that hides their borders")
        return Rendered(plain, self._turns(messages, tools, answers, places))

    def prompt(self, messages: list[Message], tools: list[dict] | None) -> str:
        """The text that asks for the answer to ``messages``, special tokens as twins. BadRow if it is refused."""
        messages, tools = self.spelling.shield_all(messages), self.spelling.shield_all(tools)
        return templates.generated(self._twins(messages, tools, prompt=True))[0]

    def _twins(self, messages: list[Message], tools: list[dict] | None, *, prompt: bool = False) -> str:
        return self.spelling.twins(self.template.render(messages, tools, prompt=prompt))

    def _places(self, messages: list[Message], tools: list[dict] | None, *, prompt: bool = False) -> _Places:
        marked = [_marked(message, i) for i, message in enumerate(messages)]
        text, _ = templates.generated(self._twins(marked, tools, prompt=prompt))
        parts, first, last, place = [], {}, {}, 0
        for piece in re.split(f"({MARKER.pattern})", text):
            if MARKER.match(piece):
                first.setdefault(message_of(piece), place)
                last[message_of(piece)] = place
            else:
                parts.append(piece)
                place += len(piece)
        return _Places("".join(parts), first, last)

    def _by_marker(self, messages: list[Message], tools: list[dict] | None, text: str,
                   ranges: list[tuple[int, int]]) -> dict[int, list[tuple[int, int]]]:  # fmt: skip
        """Turns of a template that encloses parts of them: each part belongs to the assistant's message inside it, or
        to the one that the part before it belonged to."""
        places = self._places(messages, tools)
        if places.text != text:
            raise BadRow("turns_not_found", "the chat template's marks do not enclose one turn each")
        turns: dict[int, list[tuple[int, int]]] = {}
        owner = None
        for start, end in ranges:
            inside = [i for i, place in places.last.items() if start <= place <= end]
            owner = max(inside) if inside else owner
            if owner is None or messages[owner]["role"] != "assistant":
                raise BadRow("turns_not_found", "the chat template's marks enclose what is not the assistant's")
            turns.setdefault(owner, []).append((start, end))
        return turns

    def _turns(self, messages: list[Message], tools: list[dict] | None, answers: list[int],
               places: _Places) -> dict[int, list[tuple[int, int]]]:  # fmt: skip
        turns, before = {}, 0  # the end of the turn before
        for i in answers:
            start = self._start(messages, tools, i, places, before)
            later = [places.first[j] for j in range(i + 1, len(messages)) if j in places.first]
            ends = [one.end() for one in self._end.finditer(places.text, start, min(later, default=len(places.text)))]
            if not ends:
                raise BadRow("turns_not_found", f"no end token follows the answer in message {i + 1}")
            if not start <= places.last.get(i, start) <= ends[-1]:
                raise BadRow("turns_not_found", f"where the answer in message {i + 1} ends is not clear")
            before = ends[-1]
            turns[i] = [(start, before)]
        return turns

    def _start(self, messages: list[Message], tools: list[dict] | None, i: int, places: _Places, before: int) -> int:
        """Where the generation prompt of message ``i`` ends in the text."""
        previous = max((place for j, place in places.last.items() if j < i), default=0)
        begin = max(previous, before)
        header = self._header
        if header is not None:
            stop = places.first.get(i, len(places.text))
            found = [one.start() for one in re.finditer(re.escape(header), places.text[begin:stop])]
            if found:
                # Of several (a message that shows nothing of itself may lie between) the one most like the prompt.
                heads = [places.text[begin + at : begin + at + len(self._prompt)] for at in found]
                best = max(range(len(found)), key=lambda n: _shared(self._prompt, heads[n]))
                return begin + found[best] + self._common(self._prompt, heads[best])
        elif begin == previous and i:
            # A prompt without special tokens could be spelt in a message as well, so it is not searched for: what
            # follows the message before must be what the template writes when it asks for this very answer.
            asked = self._places(messages[:i], tools, prompt=True)
            rest = asked.text[asked.last[i - 1] :] if i - 1 in asked.last else ""
            shared = self._common(rest, places.text[begin : begin + len(rest)])
            if shared:
                return begin + shared
        raise BadRow("turns_not_found", f"where the answer in message {i + 1} starts is not clear")

    @cached_property
    def _prompt(self) -> str:
        """What the template appends to ask for an answer, special tokens as twins."""
        without, asked = (self._twins([_ASK], None, prompt=prompt) for prompt in (False, True))
        return asked[len(without) :] if asked.startswith(without) else ""

    @cached_property
    def _header(self) -> str | None:
        """The start of the prompt up to its last special token, None if it has none: no message can hold it."""
        twins = list(self.spelling.twin_class.finditer(self._prompt))
        return self._prompt[: twins[-1].end()] if twins else None

    def _common(self, asked: str, text: str) -> int:
        """The length of what two texts start with in common, cut back to the end of a special token or a line: a prompt
        may go on with what not every answer starts with (``<think>``)."""
        length = _shared(asked, text)
        while 0 < length < len(asked) and asked[length - 1] != "\n" and not self.spelling.is_twin(asked[length - 1]):
            length -= 1
        return length

    @cached_property
    def _end(self) -> re.Pattern[str]:
        found = sorted(set(self._ends()))
        return re.compile("|".join(map(re.escape, found)))

    @cached_property
    def end_tokens(self) -> list[str]:
        """Names of the special tokens that end a turn of the assistant.

        Raises:
            UserError: the template ends no turn with a special token; a model could not learn to stop.
        """
        return sorted({self.spelling.name(twin) for twin in self._ends()})

    def _ends(self) -> Iterator[str]:
        found, problem = False, ""
        for probe in _PROBES:
            try:
                places = self._places(self.spelling.shield_all(probe), None)
            except BadRow as refused:  # system prompts, tools: not every template has them
                problem = problem or refused.detail
                continue
            for i, message in enumerate(probe):
                if message["role"] == "assistant" and i in places.last:
                    following = [places.first[j] for j in range(i + 1, len(probe)) if j in places.first]
                    stop = min(following, default=len(places.text))
                    # A call is over behind its last bracket (Gemma 4 puts special tokens around each string as well).
                    bracket = places.text.find("}", places.last[i], stop) if "tool_calls" in message else -1
                    end = self.spelling.twin_class.search(places.text, max(bracket, places.last[i]), stop)
                    if end:
                        found = True
                        yield end[0]
        if not found:
            none = "it writes no special token after an answer, so a model could not learn to stop"
            fix = "Take another (examples.template)." if problem else "End the answers with {{ eos_token }}."
            raise UserError(problem or none, where=f"chat template ({self.template.name})", fix=fix)


def _shared(one: str, other: str) -> int:
    """The length of what two texts start with in common."""
    differ = (k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))


def _marked(message: Message, number: int) -> Message:
    """The message with its marker inside every text that a template may show."""
    sign = marker(number)
    result = dict(message)
    for field in _MARKED_FIELDS:
        if field in result and (result[field] or message["role"] == "tool"):
            result[field] = _insert(result[field], sign)
    if message.get("tool_calls"):
        result["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _in_first_text(call["function"]["arguments"], sign)}}
            for call in message["tool_calls"]
        ]
    return result


def _insert(text: str, sign: str) -> str:
    """Into the middle, where no template trims or compares; behind the thinking, which templates cut off."""
    start = text.rfind("</think>") + len("</think>") if "</think>" in text else 0
    inner = text[start:].strip()
    start = text.index(inner, start) if inner else len(text)
    place = start + len(inner) // 2
    return text[:place] + sign + text[place:]


def _in_first_text(value: Any, sign: str) -> Any:
    """``value`` with the marker in its first non-empty text; as it is where it holds none."""
    if isinstance(value, str) and value:
        return _insert(value, sign)
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, one in items:
            changed = _in_first_text(one, sign)
            if changed is not one:
                copy = value.copy()
                copy[key] = changed
                return copy
    return value
