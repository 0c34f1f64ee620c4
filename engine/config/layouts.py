"""Layouts that cannot run: the two fields in conflict, and the nearest layout that works.

The rules follow megatron-core 0.16's ``parallel_state``, ``TransformerConfig.__post_init__``, its expert layers and
the ``training/arguments.py`` that the wheel leaves out, all of which refuse the same later and less clearly.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from engine.config.base import Problem
from engine.config.model import ModelConfig, divisors
from engine.config.sections import near_multiple
from engine.errors import UserError

if TYPE_CHECKING:
    from engine.config.schema import Config
    from engine.config.sections import TrainConfig

Conflict = tuple[str, str]  # the field to name first, and the rest of the line, which names the other one


@dataclass(frozen=True)
class Sizes:
    """The part of ``ParallelConfig`` that decides which rank holds what."""

    tensor: int = 1
    sequence_parallel: bool = False
    context: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    expert: int = 1
    expert_tensor: int | None = None

    @classmethod
    def of(cls, parallel: Any) -> Sizes:
        return cls(**{field.name: getattr(parallel, field.name) for field in fields(cls)})

    def model_ranks(self) -> int:
        """Ranks that hold one copy of a model without experts."""
        return self.tensor * self.context * self.pipeline

    def smallest_world(self, experts: bool) -> int:
        """Ranks that the layout takes, or a multiple of them: those that hold one copy of the model."""
        expert_ranks = (self.expert_tensor or self.tensor) * self.expert if experts else 1
        return self.pipeline * math.lcm(self.tensor * self.context, expert_ranks)

    def least_data_parallel(self, experts: bool) -> int:
        """More than 1 where experts are spread over more ranks than the rest of the model."""
        return self.smallest_world(experts) // self.model_ranks()

    def changes(self, other: Sizes) -> dict[str, Any]:
        return {f"parallel.{f.name}": getattr(self, f.name) for f in fields(self)
                if getattr(self, f.name) != getattr(other, f.name)}

    def distance(self, other: Sizes) -> float:
        """Factors of two between the sizes, and a little for every field that has to be changed."""
        names = [field.name for field in fields(self) if field.name != "sequence_parallel"]
        pairs = [(getattr(self, name) or self.tensor, getattr(other, name) or other.tensor) for name in names]
        own_words = other.expert_tensor is None and self.expert_tensor is not None  # where it followed tensor
        return 0.25 * len(self.changes(other)) + 2.0 * own_words + sum(abs(math.log2(a / b)) for a, b in pairs)


def across(m: ModelConfig, t: TrainConfig, s: Sizes, training: bool) -> Iterator[Conflict]:
    """Inside a layer: tensor ranks, sequences, context ranks."""
    moe, tensor = m.moe, s.tensor
    groups = m.num_query_groups or m.num_attention_heads
    if m.num_attention_heads % tensor:
        yield "parallel.tensor", f"{tensor} does not divide model.num_attention_heads ({m.num_attention_heads})"
    elif groups % tensor and tensor % groups:
        yield "parallel.tensor", f"{tensor} and model.num_query_groups ({groups}) do not divide each other"
    elif (features := (m.num_attention_heads + 2 * groups) * (m.head_dim or 1)) % tensor:
        yield "parallel.tensor", (f"{tensor} does not divide the {features} features of queries, keys and values, with "
                                  f"fewer groups (model.num_query_groups {groups}) than tensor ranks")
    if (m.ffn_hidden_size or 0) % tensor:
        yield "parallel.tensor", f"{tensor} does not divide model.ffn_hidden_size ({m.ffn_hidden_size})"
    if moe and (moe.shared_ffn_hidden_size or 0) % tensor:
        width = moe.shared_ffn_hidden_size
        yield "parallel.tensor", f"{tensor} does not divide model.moe.shared_ffn_hidden_size ({width})"
    if s.sequence_parallel and tensor == 1:
        yield "parallel.sequence_parallel", "shares sequences over tensor ranks, but parallel.tensor is 1"
    if moe and training and tensor > 1 and not s.sequence_parallel:
        yield "parallel.sequence_parallel", f"a mixture of experts (model.moe) with parallel.tensor {tensor} needs it"
    lengths = [("model.seq_length", m.seq_length), *(
        (f"train.seq_length_schedule.{i}.seq_length", stage.seq_length)
        for i, stage in enumerate(t.seq_length_schedule))]
    for field, length in lengths:
        if s.context > 1 and length % (2 * s.context):
            yield field, f"{length} tokens do not divide into 2 x parallel.context = {2 * s.context} equal parts"
        elif s.sequence_parallel and length % (tensor * s.context):
            over = f"parallel.tensor {tensor}" + (f" x parallel.context {s.context}" if s.context > 1 else "")
            yield "parallel.sequence_parallel", f"shares {field} ({length}) over {over} ranks, which do not divide it"


def along(m: ModelConfig, t: TrainConfig, s: Sizes, training: bool) -> Iterator[Conflict]:
    """From layer to layer: pipeline stages and their chunks."""
    stages, chunks = s.pipeline, s.virtual_pipeline
    if chunks > 1 and stages == 1:
        yield "parallel.virtual_pipeline", (f"{chunks} chunks interleave pipeline stages, but parallel.pipeline is 1")
    elif m.num_layers % (stages * chunks):
        name = "pipeline" if chunks == 1 or m.num_layers % stages else "virtual_pipeline"
        split = f"{stages} stages" + (f" of {chunks} chunks" if chunks > 1 else "")
        yield f"parallel.{name}", f"{split} do not divide model.num_layers ({m.num_layers})"
    elif chunks > 1 and training:
        for field, size in t.unit_batches():
            if size % t.micro_batch_size == 0 and size % (t.micro_batch_size * stages):
                yield field, (f"{size} gives {size // t.micro_batch_size} micro-batches, not a multiple of "
                              f"parallel.pipeline ({stages}) as interleaving (parallel.virtual_pipeline) needs")


def experts(m: ModelConfig, t: TrainConfig, s: Sizes, training: bool) -> Iterator[Conflict]:
    """Expert ranks, and the batch that the data-parallel ranks under them take."""
    moe, shared = m.moe, s.expert_tensor or s.tensor
    if moe is None:
        for name, size in (("expert", s.expert), ("expert_tensor", s.expert_tensor or 1)):
            if size > 1:
                yield f"parallel.{name}", f"{size} ranks share experts, but the model has none (model.moe is null)"
        return
    if moe.num_experts % s.expert:
        yield "parallel.expert", f"{s.expert} ranks do not divide model.moe.num_experts ({moe.num_experts})"
    name = "parallel.expert_tensor" if s.expert_tensor else "parallel.tensor"
    if (moe.ffn_hidden_size or 0) % shared:
        yield name, f"{shared} ranks do not divide an expert's model.moe.ffn_hidden_size ({moe.ffn_hidden_size})"
    if m.linear_bias and shared > 1:
        yield name, f"experts with biases (model.linear_bias) cannot be split over {shared} ranks"
    copies = s.least_data_parallel(True)
    least = t.micro_batch_size * copies * (s.pipeline if s.virtual_pipeline > 1 else 1)
    for field, size in t.unit_batches() if training and copies > 1 else ():
        if size % t.micro_batch_size == 0 and size % least:
            yield "parallel.expert", (f"{s.expert} x {shared} ranks of experts are {copies} or more data-parallel ranks"
                                      f", over which {field} ({size}) does not divide")


RULES = (across, along, experts)


def problems(cfg: Config, *, training: bool = True) -> Iterator[Problem]:
    """What is wrong with the layout; the way out is the nearest one for all of it."""
    sizes = Sizes.of(cfg.parallel)
    found = [conflict for rule in RULES for conflict in rule(cfg.model, cfg.train, sizes, training)]
    if found:
        fix = f"The nearest layout that works: {in_words(nearest(cfg, training=training).changes(sizes))}"
        yield from (Problem(field, text, fix) for field, text in found)


def in_words(changes: dict[str, Any]) -> str:
    plain = {True: "true", False: "false", None: "null"}
    return ", ".join(f"{name} {plain[value] if isinstance(value, bool | None) else value}"
                     for name, value in changes.items())


@lru_cache(maxsize=256)
def _nearby(size: int, whole: int) -> list[int]:
    """The divisors of ``whole`` that are closest to ``size``, and 1."""
    found = sorted(divisors(whole), key=lambda d: (abs(math.log2(d / size)), d))[:10]
    return found if 1 in found else [*found, 1]


def _pick(start: Sizes, candidates: Iterator[Sizes], works: Callable[[Sizes], bool]) -> Sizes:
    return next(sizes for sizes in sorted(candidates, key=start.distance) if works(sizes))


def nearest(cfg: Config, *, training: bool = True) -> Sizes:
    """The layout closest to the configured one that breaks no rule.

    The three groups of rules share few fields, so each is mended by itself, the ones on which others depend first.
    There is always one: every size 1.
    """
    m, t, start = cfg.model, cfg.train, Sizes.of(cfg.parallel)

    def obeys(rule: Any) -> Callable[[Sizes], bool]:
        return lambda sizes: next(rule(m, t, sizes, training), None) is None

    inner = (replace(start, tensor=tensor, sequence_parallel=shared, context=context) for tensor, shared, context in
             itertools.product(_nearby(start.tensor, m.num_attention_heads), (False, True),
                               _nearby(start.context, max(m.seq_length // 2, 1))))
    found = _pick(start, inner, obeys(across))
    outer = (replace(found, pipeline=stages, virtual_pipeline=chunks)
             for stages in _nearby(start.pipeline, m.num_layers)
             for chunks in _nearby(start.virtual_pipeline, m.num_layers // stages))
    found = _pick(start, outer, obeys(along))
    experts_, width = (m.moe.num_experts, m.moe.ffn_hidden_size or 1) if m.moe else (1, 1)
    spread = (replace(found, expert=expert, expert_tensor=split)
              for expert in _nearby(start.expert, experts_)
              for split in dict.fromkeys([start.expert_tensor, None,
                                          *_nearby(start.expert_tensor or found.tensor, width)]))
    return _pick(start, spread, obeys(experts))


def data_parallel_size(cfg: Config, world_size: int, *, training: bool = True) -> int:
    """Data-parallel ranks among ``world_size`` ranks.

    Raises ``UserError`` when the layout does not fit the world size, or (``training``) when a batch of the run does
    not divide over the ranks.
    """
    s, moe, t = Sizes.of(cfg.parallel), cfg.model.moe is not None, cfg.train
    group, units = s.smallest_world(moe), t.unit_batches() if training else []
    if world_size < 1 or world_size % group:
        named = [f"{f.name} {getattr(s, f.name)}" for f in fields(s)
                 if f.name not in ("sequence_parallel", "virtual_pipeline") and (getattr(s, f.name) or 1) > 1]
        started = "rank does" if world_size == 1 else "ranks do"
        smaller = _for_world(cfg, world_size, training) if world_size > 1 else None
        other = f", or use {in_words(smaller.changes(s))}" if smaller else ""
        raise UserError(f"{world_size} {started} not fit {' x '.join(named) or 'any layout'}, which takes a multiple "
                        f"of {group}", where="parallel",
                        fix=f"Start {_starts(cfg, s, world_size, units)} ranks{other}")
    ranks = world_size // s.model_ranks()
    for field, size in units:
        if size % (t.micro_batch_size * ranks):
            raise UserError(f"{size} sequences do not divide over {ranks} data-parallel ranks x train.micro_batch_size "
                            f"{t.micro_batch_size}", where=field, fix=_batch_fix(cfg, s, world_size, field))
        steps = size // (t.micro_batch_size * ranks)
        if s.virtual_pipeline > 1 and steps % s.pipeline:
            raise UserError(f"{size} sequences are {steps} micro-batches on each of {ranks} data-parallel ranks, not a "
                            f"multiple of parallel.pipeline ({s.pipeline}) as parallel.virtual_pipeline needs",
                            where=field, fix=_batch_fix(cfg, s, world_size, field))
    return ranks


def _starts(cfg: Config, s: Sizes, world_size: int, units: list[tuple[str, int]]) -> str:
    """The numbers of ranks on both sides of ``world_size`` over which layout and batches divide."""
    experts_ = cfg.model.moe is not None
    group = s.smallest_world(experts_)
    if not units:
        below, above = world_size // group * group, -(-world_size // group) * group
    else:
        every = cfg.train.micro_batch_size * (s.pipeline if s.virtual_pipeline > 1 else 1)
        most = math.gcd(*(size for _, size in units)) // every  # data-parallel ranks are divisors of this
        copies = [d for d in divisors(most) if d % s.least_data_parallel(experts_) == 0]
        worlds = [d * s.model_ranks() for d in copies]
        below = max((w for w in worlds if w <= world_size), default=0)
        above = min((w for w in worlds if w >= world_size), default=0)
    return " or ".join(dict.fromkeys(str(world) for world in (below, above) if world)) or str(group)


def _batch_fix(cfg: Config, s: Sizes, world_size: int, field: str) -> str:
    t, ranks = cfg.train, world_size // s.model_ranks()
    every = ranks * (s.pipeline if s.virtual_pipeline > 1 else 1)
    units = t.unit_batches()
    ways = [f"start {_starts(cfg, s, world_size, units)} ranks"]
    shared = math.gcd(*(size for _, size in units))
    if shared % every == 0:
        best = min(divisors(shared // every), key=lambda size: abs(math.log2(size / t.micro_batch_size)))
        ways.insert(0, f"use train.micro_batch_size {best}")
    if t.batch_size_schedule is None:
        ways.insert(0, f"use {field} {near_multiple(t.global_batch_size, every * t.micro_batch_size)}")
    text = ", or ".join(ways)
    return text[0].upper() + text[1:]


def _for_world(cfg: Config, world_size: int, training: bool) -> Sizes | None:
    """The closest layout that this many ranks can have with these batches, if there is one."""
    m, t, start = cfg.model, cfg.train, Sizes.of(cfg.parallel)
    units = [size for _, size in t.unit_batches()] if training else []

    def works(s: Sizes) -> bool:
        if world_size % s.smallest_world(m.moe is not None) or any(
                next(rule(m, t, s, training), None) for rule in RULES):
            return False
        every = t.micro_batch_size * (world_size // s.model_ranks()) * (s.pipeline if s.virtual_pipeline > 1 else 1)
        return all(size % every == 0 for size in units)

    def dividing(size: int, whole: int) -> list[int]:
        return [d for d in _nearby(size, math.gcd(whole, world_size)) if d <= size][:4]

    sizes = itertools.product(
        dividing(start.tensor, m.num_attention_heads), {start.sequence_parallel, False},
        dividing(start.context, m.seq_length), dividing(start.pipeline, m.num_layers), {start.virtual_pipeline, 1},
        dividing(start.expert, m.moe.num_experts if m.moe else 1), {start.expert_tensor, None})
    candidates = (Sizes(*size) for size in sizes)
    return next((s for s in sorted(candidates, key=start.distance) if works(s)), None)
