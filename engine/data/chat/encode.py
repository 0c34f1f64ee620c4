"""Conversations, texts and preferences as tokens, with the mask of what is supervised.

Shapes: n tokens of an example. An example of n tokens takes n - 1 positions: its inputs are tokens[:-1], its labels
tokens[1:], and ``mask[t]`` says whether token t is learned as a label. The first token is nobody's label: mask[0] only
tells the audit that the example is meant to be supervised whole (a text, or supervise "all").
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from engine.data.chat.conversation import BadRow, Conversation, Message, Preference, Text
from engine.data.chat.special import spelling
from engine.data.chat.templates import Template
from engine.data.chat.turns import Rendered, Turns
from engine.data.tokenizer import Tokenizer

Supervise = Literal["assistant", "last", "all"]


@dataclass(frozen=True)
class Example:
    """``tokens`` int32 [n], ``mask`` bool [n]; the mask of the labels tokens[1:] is mask[1:]."""

    tokens: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True)
class Pair:
    """int32 each: the prompt up to where the answers start, and both answers with their end token."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray

    def positions(self, *, shared: bool) -> int:
        """Positions of a row that the pair takes, with the prompt once or twice."""
        prompts = 1 if shared else 2
        # The last token of the prompt starts either branch, the last of each answer is only a label.
        return prompts * (len(self.prompt) - 1) + len(self.chosen) + len(self.rejected)


class Encoder:
    """Encodes by one tokenizer and one template. ``seq_length`` in positions; ``system`` is put before conversations
    that have no system message.

    ``too_long="truncate"`` keeps whole turns: the last ones of a conversation are left out until it fits, of a
    preference the first ones. What does not fit even so is refused, as everything too long is with "drop": a cut answer
    would teach the model not to end. A text without turns is cut.
    """

    def __init__(self, tokenizer: Tokenizer, template: Template, seq_length: int, supervise: Supervise = "assistant",
                 too_long: Literal["drop", "truncate"] = "drop", *, system: str | None = None,
                 prefix_sharing: bool = True):  # fmt: skip
        self.tokenizer = tokenizer
        self.template = template
        self.seq_length = seq_length
        self.supervise = supervise
        self.truncate = too_long == "truncate"
        self.system = system
        self.prefix_sharing = prefix_sharing
        self.spelling = spelling(tokenizer)
        self.turns = Turns(template, self.spelling)

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Ids that end a turn of the assistant. UserError if the template ends none with a special token."""
        return frozenset(self.spelling.specials[name] for name in self.turns.end_tokens)

    @cached_property
    def bos_id(self) -> int | None:
        """The id of the tokenizer's beginning-of-sequence token, if it has one."""
        name = self.template.variables.get("bos_token")
        return self.spelling.specials.get(name) if name else None

    def example(self, item: Conversation | Text) -> Example:
        """Tokens and mask.

        Raises:
            BadRow: too long, refused by the template, or nothing in it is supervised.
        """
        if isinstance(item, Text):
            return self._text(item)
        messages = self._with_system(item.messages)
        shift = len(messages) - len(item.messages)
        unsupervised = {index + shift for index in item.unsupervised}
        while True:
            tokens, mask = self._encoded(messages, item, unsupervised)
            if len(tokens) - 1 <= self.seq_length:
                break
            shorter = _without_last_turn(messages) if self.truncate else None
            if shorter is None:
                raise self._too_long(len(tokens))
            messages = shorter
        if not mask[1:].any():
            raise BadRow("nothing_supervised", "no token of it is supervised")
        return Example(tokens, mask)

    def pair(self, item: Preference) -> Pair:
        """Prompt and both answers, tokenized as whole conversations.

        Raises:
            BadRow: as `example`, or the template renders the prompt differently before the two answers.
        """
        prompt = self._with_system(item.prompt)
        while True:
            pair = self._pair(prompt, item)
            longest = len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) - 1
            needed = max(longest, pair.positions(shared=self.prefix_sharing))
            if needed <= self.seq_length:
                return pair
            shorter = _without_first_turn(prompt) if self.truncate else None
            if shorter is None:
                raise self._pair_too_long(pair, needed)
            prompt = shorter

    def prompt(self, messages: list[Message], tools: list[dict] | None = None) -> np.ndarray:
        """int32: what a model is given to answer ``messages``. BadRow if the template refuses them."""
        return self._tokens(self.turns.prompt(self._with_system(messages), tools))[0]

    def _pair(self, prompt: list[Message], item: Preference) -> Pair:
        sides, starts = [], []
        for answer in (item.chosen, item.rejected):
            rendered = self.turns.render([*prompt, answer], item.tools)
            tokens, ranges = self._tokens(rendered.text)
            turn = rendered.turns.get(len(prompt))
            if not turn:
                raise BadRow("empty_completion", "the chat template renders nothing of the answer")
            inside = np.flatnonzero(_overlap(ranges, turn))
            # What a template writes behind the end token is no part of the answer.
            sides.append(tokens[: inside[-1] + 1])
            starts.append(int(inside[0]))
        start = min(starts)
        chosen, rejected = sides
        if start == 0 or not np.array_equal(chosen[:start], rejected[:start]):
            raise BadRow("prompts_differ", "the chat template renders the prompt differently before the two answers")
        if np.array_equal(chosen, rejected):
            raise BadRow("chosen_is_rejected", "chosen and rejected are the same tokens")
        return Pair(chosen[:start], chosen[start:], rejected[start:])

    def _encoded(
        self, messages: list[Message], item: Conversation, unsupervised: set[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        rendered = self.turns.render(messages, item.tools)
        tokens, ranges = self._tokens(rendered.text)
        if self.supervise == "all":
            return tokens, np.ones(len(tokens), bool)
        mask = _overlap(ranges, self._supervised(rendered, unsupervised))
        mask[:1] = False
        return tokens, mask

    def _supervised(self, rendered: Rendered, unsupervised: set[int]) -> list[tuple[int, int]]:
        wanted = [index for index in rendered.turns if index not in unsupervised]
        if self.supervise == "last":
            wanted = [index for index in wanted if index == max(rendered.turns)]
        return [one for index in wanted for one in rendered.turns[index]]

    def _tokens(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        tokens, ranges = self.spelling.encode(self.spelling.plain(text))
        self._check_specials(text, tokens)
        return tokens, ranges

    def _check_specials(self, text: str, tokens: np.ndarray) -> None:
        """A message's words must not have become a special token (a tokenizer may hold one as an ordinary piece)."""
        written = [self.spelling.name(twin) for twin in self.spelling.twin_class.findall(text)]
        found = int(np.isin(tokens, self._special_ids).sum())
        if found != sum(name not in self._unknown for name in written):
            raise BadRow("special_in_content", "the tokenizer turns words of a message into a special token")

    @cached_property
    def _unknown(self) -> frozenset:
        """Names of the token for what is not in the vocabulary, which comes from any text."""
        return frozenset((self.template.variables.get("unk_token"), "<unk>", "[UNK]"))

    @cached_property
    def _special_ids(self) -> np.ndarray:
        specials = self.spelling.specials.items()
        return np.array([token for name, token in specials if name not in self._unknown], np.int32)

    def _text(self, item: Text) -> Example:
        if not item.text.strip():
            raise BadRow("missing_text", "the text is empty")
        tokens, _ = self.spelling.encode(self.spelling.plain(self.spelling.shield(item.text)))
        if not len(tokens):  # of characters that the tokenizer's normaliser drops
            raise BadRow("missing_text", "the tokenizer makes no token of the text")
        tokens = np.append(tokens, np.int32(self.tokenizer.eod_id))
        if len(tokens) - 1 > self.seq_length:
            if not self.truncate:
                raise self._too_long(len(tokens))
            tokens = tokens[: self.seq_length + 1]
        return Example(tokens, np.ones(len(tokens), bool))

    def _too_long(self, tokens: int) -> BadRow:
        return BadRow("too_long", f"{tokens:,} tokens take {tokens - 1:,} positions, seq_length is {self.seq_length:,}")

    def _pair_too_long(self, pair: Pair, needed: int) -> BadRow:
        prompt, chosen, rejected = len(pair.prompt), len(pair.chosen), len(pair.rejected)
        sizes = f"{prompt:,} tokens of prompt, {chosen:,} and {rejected:,} of answers need {needed:,} positions"
        reason = "prompt_too_long" if prompt > self.seq_length else "too_long"
        return BadRow(reason, f"{sizes}, seq_length is {self.seq_length:,}")

    def _with_system(self, messages: list[Message]) -> list[Message]:
        if not self.system or messages[0]["role"] in ("system", "developer"):
            return messages
        return [{"role": "system", "content": self.system}, *messages]


def _overlap(ranges: np.ndarray, spans: list[tuple[int, int]]) -> np.ndarray:
    """bool [n]: the tokens that hold a character of one of ``spans``. ``ranges`` int64 [n, 2] ascend."""
    mask = np.zeros(len(ranges), bool)
    for start, end in spans:
        mask |= (ranges[:, 0] < end) & (ranges[:, 1] > start)
    return mask


def _without_last_turn(messages: list[Message]) -> list[Message] | None:
    """The conversation up to the answer before the last one; None if there is none."""
    for last in range(len(messages) - 2, 0, -1):
        if messages[last]["role"] == "assistant" and messages[last + 1]["role"] == "user":
            return messages[: last + 1]
    return None


def _without_first_turn(prompt: list[Message]) -> list[Message] | None:
    """The prompt without its first question and answer, the system message kept; None if no question would be left."""
    head = 1 if prompt[0]["role"] in ("system", "developer") else 0
    for start in range(head + 1, len(prompt)):
        if prompt[start]["role"] == "user" and prompt[start - 1]["role"] == "assistant":
            return [*prompt[:head], *prompt[start:]]
    return None
