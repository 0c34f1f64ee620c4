"""The mask audit: before step 1, is what is supervised what should be?

It looks at tokens and masks as they are trained on, so it finds what goes wrong in a template, an encoder, or a cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar

import numpy as np

from engine.data.chat.encode import Example, Pair
from engine.data.tokenizer import Tokenizer
from engine.errors import UserError

# What is wrong with rows, what to tell of it, and the way out.
PROBLEMS = {
    "nothing_supervised": ("have no supervised token", "Check examples.supervise and the template's generation marks."),
    "all_supervised": ("have a mask of all ones, prompts included",
                       "Mend the template's generation marks, or set examples.supervise to all."),
    "end_not_supervised": ("do not learn the end token of an answer",
                           "Put the end token before {% endgeneration %} in the chat template."),
    "double_bos": ("start with two beginning-of-sequence tokens", "Take the bos_token out of the template or data."),
    "truncated_response": ("end within an answer", "Raise model.seq_length, or drop what is too long."),
    "empty_completion": ("have an empty answer", "Remove them from the data."),
    "chosen_is_rejected": ("have the same answer twice", "Remove them from the data."),
}  # fmt: skip
_PROMPT, _ANSWER, _END, _PLAIN = "\x1b[2m", "\x1b[32m", "\x1b[30;42m", "\x1b[0m"
_LONGEST = 2000  # characters of a sample's prompt or answer that are shown

Row = TypeVar("Row", Example, Pair)


@dataclass
class Audit:
    """``counts`` for the manifest; ``samples`` for the console, with ``colour`` as escape sequences."""

    counts: dict[str, int] = field(default_factory=dict)
    samples: list[str] = field(default_factory=list)


def check(
    examples: Iterable[Example | tuple[str, Example]], tokenizer: Tokenizer, *, end_ids: Collection[int],
    bos_id: int | None = None, samples: int = 3, colour: bool = True,
) -> Audit:  # fmt: skip
    """Looks at every example, with or without its place; renders the first ``samples``.

    ``end_ids`` and ``bos_id`` are the encoder's. A row with mask[0] is meant to be supervised whole (encode.py).

    Raises:
        UserError: rows without supervised tokens, an all-ones mask, an end token that is not supervised, a double BOS,
            truncated responses: how many, and the place of the first.
    """
    ends = _Ends(tokenizer, end_ids)
    return _check(examples, lambda row: _of_example(row, ends, bos_id), samples,
                  lambda row: paint(row, tokenizer, end_ids, colour=colour), _size)  # fmt: skip


def check_pairs(
    pairs: Iterable[Pair | tuple[str, Pair]], tokenizer: Tokenizer, *, end_ids: Collection[int],
    bos_id: int | None = None, samples: int = 3, colour: bool = True,
) -> Audit:  # fmt: skip
    """As `check`, for preferences: empty or equal answers, answers without their end token, a double BOS."""
    ends = _Ends(tokenizer, end_ids)
    return _check(pairs, lambda row: _of_pair(row, ends, bos_id), samples,
                  lambda row: paint_pair(row, tokenizer, end_ids, colour=colour), _pair_size)  # fmt: skip


class _Ends:
    """Whether answers are over. Behind their end token may stand blanks and further special tokens: many templates mark
    the line break after it as generated, too."""

    def __init__(self, tokenizer: Tokenizer, end_ids: Collection[int]):
        self._ids = np.array(sorted(end_ids))
        self._tokenizer = tokenizer
        self._known: dict[int, bool] = {}

    def over(self, tokens: np.ndarray) -> bool:
        """Whether these tokens end with an end token."""
        found = np.flatnonzero(np.isin(tokens[-8:], self._ids))
        return len(found) > 0 and all(self._nothing(int(token)) for token in tokens[-8:][found[-1] + 1 :])

    def _nothing(self, token: int) -> bool:
        if token not in self._known:
            text = self._tokenizer.decode([token])
            # A text never becomes a control token.
            self._known[token] = not text.strip() or self._tokenizer.encode(text) != [token]
        return self._known[token]


def _check(rows: Iterable, problems: Callable[[Row], Iterator[str]], samples: int, render: Callable[[Row], str],
           size: Callable[[Row], tuple[int, int]]) -> Audit:  # fmt: skip
    bad: Counter[str] = Counter()
    first: dict[str, str] = {}
    audit = Audit()
    count = tokens = supervised = 0
    for row in rows:
        place, row = row if isinstance(row, tuple) else (f"example {count + 1:,}", row)
        count += 1
        some, learned = size(row)
        tokens, supervised = tokens + some, supervised + learned
        for problem in problems(row):
            bad[problem] += 1
            first.setdefault(problem, place)
        if len(audit.samples) < samples:
            audit.samples.append(render(row))
    audit.counts = {"rows": count, "tokens": tokens, "supervised_tokens": supervised, **dict(sorted(bad.items()))}
    if not count:
        raise UserError("no examples are left to train on", where="examples", fix="See the counts of refused rows.")
    if bad:
        worst = max(bad, key=lambda name: bad[name])
        text, fix = PROBLEMS[worst]
        others = "".join(f"; {n:,} {PROBLEMS[name][0]}" for name, n in bad.most_common() if name != worst)
        problem = f"mask audit: {bad[worst]:,} of {count:,} examples {text} (the first: {first[worst]}){others}"
        raise UserError(problem, where="examples", fix=fix)
    return audit


def _of_example(row: Example, ends: _Ends, bos_id: int | None) -> Iterator[str]:
    tokens, mask = row.tokens, row.mask
    if _double_bos(tokens, bos_id):
        yield "double_bos"
    labels = mask[1:]
    if not labels.any():
        yield "nothing_supervised"
        return
    if mask[0]:
        return
    if labels.all():
        yield "all_supervised"
    behind = np.flatnonzero(mask & ~np.append(labels, False)) + 1  # of every run of supervised tokens
    starts = np.flatnonzero(mask & ~np.insert(mask[:-1], 0, False))
    open_ends = [end for start, end in zip(starts, behind, strict=True) if not ends.over(tokens[start:end])]
    if open_ends and open_ends[-1] == len(tokens):
        yield "truncated_response"
        open_ends = open_ends[:-1]
    if open_ends:
        yield "end_not_supervised"


def _of_pair(row: Pair, ends: _Ends, bos_id: int | None) -> Iterator[str]:
    if _double_bos(row.prompt, bos_id):
        yield "double_bos"
    if not len(row.chosen) or not len(row.rejected):
        yield "empty_completion"
    elif np.array_equal(row.chosen, row.rejected):
        yield "chosen_is_rejected"
    elif not ends.over(row.chosen) or not ends.over(row.rejected):
        yield "truncated_response"


def _double_bos(tokens: np.ndarray, bos_id: int | None) -> bool:
    return bos_id is not None and len(tokens) > 1 and tokens[0] == tokens[1] == bos_id


def _size(row: Example) -> tuple[int, int]:
    return len(row.tokens), int(row.mask[1:].sum())


def _pair_size(row: Pair) -> tuple[int, int]:
    answers = len(row.chosen) + len(row.rejected)
    return len(row.prompt) + answers, answers


def paint(example: Example, tokenizer: Tokenizer, end_ids: Collection[int] = (), *, colour: bool = True) -> str:
    """The example's text: what is supervised in green with its end token inverse, the rest dim; without ``colour``
    between ⟦ and ⟧."""
    mask = example.mask.copy()
    mask[0] = mask[0] and mask[1:].all()
    borders = [0, *(np.flatnonzero(mask[1:] != mask[:-1]) + 1), len(mask)]
    return "".join(_painted(example.tokens[start:end], bool(mask[start]), tokenizer, end_ids, colour)
                   for start, end in pairwise(borders) if start < end)  # fmt: skip


def paint_pair(pair: Pair, tokenizer: Tokenizer, end_ids: Collection[int] = (), *, colour: bool = True) -> str:
    """Prompt, chosen and rejected, one under the other."""
    prompt, chosen, rejected = (_painted(tokens, answer, tokenizer, end_ids, colour) for tokens, answer in
                                ((pair.prompt, False), (pair.chosen, True), (pair.rejected, True)))  # fmt: skip
    return f"{prompt}\n  chosen: {chosen}\n  rejected: {rejected}"


def _painted(tokens: np.ndarray, supervised: bool, tokenizer: Tokenizer, end_ids: Collection[int], colour: bool) -> str:
    last = int(tokens[-1]) if supervised and len(tokens) and int(tokens[-1]) in end_ids else None
    text = _printable(tokenizer.decode([int(token) for token in tokens[: len(tokens) - (last is not None)]]))
    end = "" if last is None else _printable(tokenizer.decode([last]))
    if not colour:
        return f"⟦{text}{end}⟧" if supervised else text
    return f"{_ANSWER if supervised else _PROMPT}{text}{_PLAIN}" + (f"{_END}{end}{_PLAIN}" if end else "")


def _printable(text: str) -> str:
    """Data must not steer the terminal; a long text is shown by its two ends."""
    if len(text) > _LONGEST:
        left_out = len(text) - _LONGEST
        text = f"{text[: _LONGEST // 2]} […{left_out:,} characters…] {text[-_LONGEST // 2 :]}"
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)
