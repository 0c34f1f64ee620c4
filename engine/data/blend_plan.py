"""What a run reads from each of its sources, from the first step to the last and over every resume.

Planned are weights that change at a step, sources that leave at their last epoch, and sources that come or go between
two starts of a run. All of it becomes segments of a ``BlendIndex``; a checkpoint keeps those up to its position, and
the next start goes on from there whatever the configuration says by then. A source is known by its content
(`SampleIndex.content`): moved to another path, it goes on with its next block.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from engine.data.blend import NEVER, BlendIndex, Segment, integer_weights
from engine.data.ledger import Given
from engine.data.samples import SampleIndex
from engine.errors import UserError


@dataclass(frozen=True)
class Source:
    """A prepared directory. ``blocks``: of model.seq_length tokens, in an epoch. ``fingerprint``: what tells its data
    from others."""

    path: str
    fingerprint: str
    tokens: int
    documents: int
    blocks: int
    max_epochs: float | None = None

    def limit(self) -> int:
        """The blocks that it may give in the whole run."""
        # By its decimals: 0.29 epochs of 100 blocks are 29, which the binary fraction is a little below.
        return NEVER if self.max_epochs is None else int(Fraction(repr(self.max_epochs)) * self.blocks)


@dataclass(frozen=True)
class Change:
    """Weights (of tokens, one for each source of the configuration) from a step on; the first is of step 0."""

    step: int
    weights: tuple[float, ...]


def token_weights(sources: Sequence[Source], weights: Sequence[float | None] | None, by: str) -> tuple[float, ...]:
    """Weights as shares of tokens. ``by`` "documents": they are shares of documents. None: in proportion to sizes.

    UserError for a weight that is none, or where none is above 0.
    """
    if weights is None or None in weights:
        return tuple(float(source.blocks) for source in sources)
    given = [float(weight) for weight in weights if weight is not None]
    for place, weight in enumerate(given):
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"{weight} is no weight", where=f"data.blend[{place}].weight",
                            fix="Give a number that is not negative")
    if not any(given):
        raise UserError("no source has a weight above 0", where="data.blend", fix="Give at least one a positive weight")
    if by == "tokens":
        return tuple(given)
    return tuple(weight * source.tokens / max(1, source.documents)
                 for weight, source in zip(given, sources, strict=True))


@dataclass(frozen=True)
class Wanted:
    """What a configuration says of its blend. ``tokens_before(s)``: what the steps before step s read."""

    paths: tuple[str, ...]
    max_epochs: tuple[float | None, ...]
    weights: tuple[tuple[int, Sequence[float | None] | None], ...]  # (step, one for each source or None) from step 0 on
    by: str
    tokens_before: Callable[[int], int]

    @classmethod
    def of(cls, cfg: Any) -> Wanted:
        """What ``cfg.data`` says (a Config, or what has its fields)."""
        data, train, full = cfg.data, cfg.train, cfg.model.seq_length

        def tokens_before(step: int) -> int:
            return train.tokens_before(step, full)

        if data.path is not None:
            return cls((str(data.path),), (None,), ((0, (1.0,)),), "tokens", tokens_before)
        weights = [(0, [entry.weight for entry in data.blend])]
        weights += [(change.step, change.weights) for change in data.blend_changes]
        return cls(tuple(str(entry.path) for entry in data.blend), tuple(entry.max_epochs for entry in data.blend),
                   tuple(weights), data.blend_by, tokens_before)

    def plan(self, indices: Sequence[SampleIndex], *, step: int = 0, position: int = 0,
             record: dict[str, Any] | None = None) -> BlendPlan:
        """The plan over opened sources for a run that stands at ``position`` tokens; see ``BlendPlan``."""
        sources = [Source(path, index.content, index.dataset.num_tokens, len(index.dataset),
                          index.blocks_per_epoch, limit)
                   for path, index, limit in zip(self.paths, indices, self.max_epochs, strict=True)]
        changes = [Change(begin, token_weights(sources, weights, self.by)) for begin, weights in self.weights]
        if record is None or position == 0:  # from the beginning, or as if it had been: no record, no other past
            step, position, record = 0, 0, None
        done = position - self.tokens_before(step)  # 0, but where the schedules have changed since
        return BlendPlan(sources, changes, seq_length=indices[0].seq_length, seed=indices[0].seed, step=step,
                         position=position, record=record,
                         position_of=lambda at: done + self.tokens_before(at))


class BlendPlan:
    """The blend of a run that stands at ``position`` (tokens), after ``step`` steps.

    ``position_of(s)``: the position at step s. ``record``: what an earlier start of the run wrote (``record``), None at
    the first. ``index`` numbers sources as ``sources`` does: those of the record, also where they have left, then those
    that have come; its ``locate`` names them by their places in the configuration. ``notes``: what is other than in the
    record, for people. Raises UserError where the record is of other blocks (``seq_length``, ``seed``), or of a source
    that has left in the middle of a block.
    """

    def __init__(self, sources: Sequence[Source], changes: Sequence[Change], *, seq_length: int, seed: int,
                 position_of: Callable[[int], int], step: int = 0, position: int = 0,
                 record: dict[str, Any] | None = None):
        self.seq_length, self.seed = seq_length, seed
        self._position_of = position_of
        self.notes: list[str] = []
        known = [] if record is None else [Source(**one) for one in record["sources"]]
        segments = [] if record is None else self._segments(record, len(known))
        self.sources, places, self._readers = self._joined(known, sources)
        self._first_block = -(-position // seq_length)  # of this start's own making
        past = _padded(segments, len(self.sources))
        if past and position % seq_length:
            self._check_rest(past, position)
        self.index = self._planned(past, changes, places, step)

    def _segments(self, record: dict[str, Any], sources: int) -> list[Segment]:
        for name, value, field in (("seq_length", self.seq_length, "model.seq_length"),
                                   ("seed", self.seed, "data.shuffle_seed")):
            if record[name] != value:
                raise UserError(f"is {value}, but the checkpoint's samples are those of {record[name]}: to go on would "
                                "replay some and lose others", where=field,
                                fix=f"Set it to {record[name]}, or start a new stage from the checkpoint's weights")
        return [Segment(one["start"], tuple(one["sources"]), tuple(one["weights"]), tuple(one["given"]))
                for one in record["segments"]]

    def _joined(self, known: list[Source], present: Sequence[Source]) -> tuple[list[Source], list[int], list[int]]:
        """(all sources, the number of each present one, the place in the configuration of each or -1)."""
        joined, readers, places = list(known), [-1] * len(known), []
        exact = {(one.path, one.fingerprint): number for number, one in reversed(list(enumerate(known)))}
        taken = {exact[key] for one in present if (key := (one.path, one.fingerprint)) in exact}
        for place, one in enumerate(present):
            number = exact.get((one.path, one.fingerprint))
            if number is None:  # moved?
                number = next((n for n, other in enumerate(known)
                               if n not in taken and other.fingerprint == one.fingerprint), None)
            if number is None:
                number = len(joined)
                joined.append(one)
                readers.append(place)
                if known:
                    other = any(old.path == one.path for old in known)
                    self.notes.append(f"{one.path} {'holds other data than before' if other else 'is new'}: it begins "
                                      "with its first block")
            else:
                taken.add(number)
                joined[number], readers[number] = one, place
            places.append(number)
        return joined, places, readers

    def _check_rest(self, past: list[Segment], position: int) -> None:
        """What is left of a block must be read from the source that began it."""
        source = int(BlendIndex.of(past).locate(np.array([position // self.seq_length]))[0][0])
        if self._readers[source] < 0:
            raise UserError(f"has left the blend, but {position % self.seq_length} tokens of its next block are read",
                            where=self.sources[source].path,
                            fix="Keep it in data.blend with weight 0 until a later checkpoint")

    def _planned(self, past: list[Segment], changes: Sequence[Change], places: list[int], step: int) -> BlendIndex:
        """``past`` goes on with the weights of now; then whatever comes first, a change or a source's last block."""
        at, segments, count = self._first_block, list(past), len(self.sources)
        given = segments[-1].counts(at) if segments else np.zeros(count, np.int64)
        weights = [change for change in changes if change.step <= step][-1].weights
        coming = [(max(at, -(-self._position_of(change.step) // self.seq_length)), change.weights)
                  for change in changes if change.step > step]
        limits = [source.limit() for source in self.sources]
        while True:
            while coming and coming[0][0] <= at:
                weights = coming.pop(0)[1]
            active = sorted((places[place], weight) for place, weight in enumerate(weights)
                            if weight > 0 and given[places[place]] < limits[places[place]])
            if not active:
                return self._index(segments or [Segment(0, (0,), (1,), (0,) * count)], end=at)
            numbers = tuple(number for number, _ in active)
            shares = tuple(integer_weights([weight for _, weight in active]).tolist())
            if not segments or (segments[-1].sources, segments[-1].weights) != (numbers, shares):
                if past and at == self._first_block:
                    self.notes.append(self._mixture(numbers, shares))
                segments.append(Segment(at, numbers, shares, tuple(given.tolist())))
            at = min(segments[-1].first_end(limits), coming[0][0] if coming else NEVER)
            if at >= NEVER:
                return self._index(segments)
            given = segments[-1].counts(at)

    def _index(self, segments: list[Segment], end: int | None = None) -> BlendIndex:
        return BlendIndex.of(segments, end=end, readers=self._readers)

    def _mixture(self, numbers: Sequence[int], shares: Sequence[int]) -> str:
        text = ", ".join(f"{self.sources[number].path} {share / sum(shares):.2%}"
                         for number, share in zip(numbers, shares, strict=True))
        return f"the blend changes here, at {self._first_block * self.seq_length:,} tokens: {text}"

    @property
    def end(self) -> int | None:
        """Tokens after which all sources are used up, None for never."""
        return None if self.index.end is None else self.index.end * self.seq_length

    def check_enough(self, steps: int) -> None:
        """UserError where ``steps`` steps read more than all sources may give."""
        end = self.end
        if end is None or self._position_of(steps) <= end:
            return
        enough = bisect.bisect_right(range(steps + 1), end, key=self._position_of) - 1
        raise UserError(f"its sources are used up (max_epochs) after {end:,} tokens, but {steps} steps "
                        f"(train.max_steps) read {self._position_of(steps):,}", where="data.blend",
                        fix="Raise max_epochs, add a source" + (f", or set train.max_steps to {enough}" if enough > 0
                                                                else ""))

    def record(self, position: int) -> dict[str, Any]:
        """What a later start needs to go on from ``position`` tokens: plain values."""
        begun = max(1, -(-position // self.seq_length))
        return {"seq_length": self.seq_length, "seed": self.seed,
                "sources": [dataclasses.asdict(source) for source in self.sources],
                "segments": [{"start": one.start, "sources": list(one.sources), "weights": list(one.weights),
                              "given": list(one.given)} for one in self.index.segments if one.start < begun]}

    def given(self, position: int) -> list[Given]:
        """What each source gave of the first ``position`` tokens, exactly; also those that have left."""
        blocks, rest = divmod(position, self.seq_length)
        counts = self.index.counts(blocks)
        tokens = counts * self.seq_length
        if rest:
            tokens += rest * (self.index.counts(blocks + 1) - counts)
        return [Given(source.path, int(count), int(read), int(read) / (source.blocks * self.seq_length),
                      int(read) / (source.blocks * self.seq_length) * source.documents)
                for source, count, read in zip(self.sources, counts, tokens, strict=True)]


def _padded(segments: list[Segment], sources: int) -> list[Segment]:
    """The same where there are more sources by now."""
    return [dataclasses.replace(one, given=one.given + (0,) * (sources - len(one.given))) for one in segments]
