"""Where each tensor of the engine's model lies in a Hugging Face checkpoint: one map, read in both directions.

A tensor of the unsplit model is a stack of pieces along its first dimension, each of them rows of one stored tensor. So
Megatron's fused projections come apart (queries, keys and values by group; gate and up), and so do the layouts that
experts have on disk. Every element of a stored tensor belongs to exactly one piece.

Names are those of ``engine.model.whole``; ``m`` is the model's configuration.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from engine.config import ModelConfig

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
LM_HEAD, EMBED_TOKENS = "lm_head.weight", "model.embed_tokens.weight"
# Buffers that old versions of Transformers saved; they follow from config.json.
IGNORED = re.compile(r"\.rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$")
# The name of a layer's stored tensor by which a checkpoint shows which form its experts have.
MARKERS = {"w1_w2_w3": "block_sparse_moe.experts.0.w1.weight", "gate_up_down": "mlp.experts.0.gate_proj.weight",
           "stacked": "mlp.experts.gate_up_proj", "gpt_oss": "mlp.experts.gate_up_proj",
           "gpt_oss_mxfp4": "mlp.experts.gate_up_proj_blocks"}
GROUP = 32  # values of a row that share an MXFP4 scale, two in a byte


@dataclass(frozen=True)
class Piece:
    """``rows`` rows of a stored tensor: ``start``, ``start + step``, …

    ``expert``: the place in a first dimension of experts. ``transposed``: rows are columns there. ``packed``: stored as
    MXFP4 ``…_blocks`` and ``…_scales``.
    """

    name: str
    rows: int
    start: int = 0
    step: int = 1
    expert: int | None = None
    transposed: bool = False
    packed: bool = False


@dataclass(frozen=True)
class Entry:
    """A tensor of the engine: its columns (None: a vector) and the pieces that its rows are stacked of."""

    name: str
    columns: int | None
    pieces: tuple[Piece, ...]

    @property
    def rows(self) -> int:
        return sum(piece.rows for piece in self.pieces)


@dataclass(frozen=True)
class Stored:
    """A tensor of the checkpoint. ``kind``: values, or MXFP4's blocks or scales (bytes)."""

    shape: tuple[int, ...]
    kind: str = "values"


def entries(m: ModelConfig, vocab_size: int, experts: str | None) -> list[Entry]:
    """Every tensor of the model, in the order of its layers. ``experts``: their form, of ``MARKERS``."""
    found = [Entry(EMBEDDING, m.hidden_size, (Piece(EMBED_TOKENS, vocab_size),))]
    for i in range(m.num_layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        found.append(_vector(f"{ours}input_layernorm.weight", f"{theirs}input_layernorm.weight", m.hidden_size))
        found += _attention(f"{ours}self_attention.", f"{theirs}self_attn.", m)
        found.append(_vector(f"{ours}pre_mlp_layernorm.weight", f"{theirs}post_attention_layernorm.weight",
                             m.hidden_size))
        if m.moe is None or i < m.moe.num_dense_layers:
            found += _dense(f"{ours}mlp.", f"{theirs}mlp.", m)
        else:
            assert experts is not None
            found += _experts(f"{ours}mlp.", theirs, m, experts)
    found.append(_vector("decoder.final_layernorm.weight", "model.norm.weight", m.hidden_size))
    if not m.tie_embeddings:
        found.append(Entry(HEAD, m.hidden_size, (Piece(LM_HEAD, vocab_size),)))
    return found


def _vector(ours: str, theirs: str, rows: int) -> Entry:
    return Entry(ours, None, (Piece(theirs, rows),))


def _linear(ours: str, theirs: str, rows: int, columns: int, *, bias: bool) -> Iterator[Entry]:
    yield Entry(f"{ours}.weight", columns, (Piece(f"{theirs}.weight", rows),))
    if bias:
        yield _vector(f"{ours}.bias", f"{theirs}.bias", rows)


def _attention(ours: str, theirs: str, m: ModelConfig) -> Iterator[Entry]:
    """Megatron's fused projection is [group][queries of the group, key, value]."""
    heads, groups, d = m.num_attention_heads, m.num_query_groups or 0, m.head_dim or 0
    queries = heads // groups * d

    def fused(kind: str) -> tuple[Piece, ...]:
        return tuple(piece for g in range(groups) for piece in (
            Piece(f"{theirs}q_proj.{kind}", queries, g * queries), Piece(f"{theirs}k_proj.{kind}", d, g * d),
            Piece(f"{theirs}v_proj.{kind}", d, g * d)))

    yield Entry(f"{ours}linear_qkv.weight", m.hidden_size, fused("weight"))
    if m.attention_bias or m.linear_bias:
        yield Entry(f"{ours}linear_qkv.bias", None, fused("bias"))
    if m.qk_norm:
        yield _vector(f"{ours}q_layernorm.weight", f"{theirs}q_norm.weight", d)
        yield _vector(f"{ours}k_layernorm.weight", f"{theirs}k_norm.weight", d)
    if m.attention_sinks:
        yield _vector(f"{ours}core_attention.softmax_offset", f"{theirs}sinks", heads)
    yield from _linear(f"{ours}linear_proj", f"{theirs}o_proj", m.hidden_size, heads * d, bias=m.linear_bias)


def _gate_and_up(ours: str, gate: str, up: str, rows: int, columns: int, *, bias: bool) -> Iterator[Entry]:
    yield Entry(f"{ours}.weight", columns, (Piece(f"{gate}.weight", rows), Piece(f"{up}.weight", rows)))
    if bias:
        yield Entry(f"{ours}.bias", None, (Piece(f"{gate}.bias", rows), Piece(f"{up}.bias", rows)))


def _dense(ours: str, theirs: str, m: ModelConfig) -> Iterator[Entry]:
    ffn = m.ffn_hidden_size or 0
    yield from _gate_and_up(f"{ours}linear_fc1", f"{theirs}gate_proj", f"{theirs}up_proj", ffn, m.hidden_size,
                            bias=m.linear_bias)
    yield from _linear(f"{ours}linear_fc2", f"{theirs}down_proj", m.hidden_size, ffn, bias=m.linear_bias)


def _experts(ours: str, layer: str, m: ModelConfig, form: str) -> Iterator[Entry]:
    assert m.moe is not None
    h, ffn, count = m.hidden_size, m.moe.ffn_hidden_size or 0, m.moe.num_experts
    theirs = f"{layer}block_sparse_moe." if form == "w1_w2_w3" else f"{layer}mlp."
    router = "router" if form.startswith("gpt_oss") else "gate"
    yield from _linear(f"{ours}router", f"{theirs}{router}", count, h, bias=m.linear_bias)
    for e in range(count):
        mine, his = f"{ours}experts.local_experts.{e}.", f"{theirs}experts."
        if form in ("w1_w2_w3", "gate_up_down"):
            gate, down, up = ("w1", "w2", "w3") if form == "w1_w2_w3" else ("gate_proj", "down_proj", "up_proj")
            yield from _gate_and_up(f"{mine}linear_fc1", f"{his}{e}.{gate}", f"{his}{e}.{up}", ffn, h, bias=False)
            yield from _linear(f"{mine}linear_fc2", f"{his}{e}.{down}", h, ffn, bias=False)
        elif form == "stacked":
            yield Entry(f"{mine}linear_fc1.weight", h, (Piece(f"{his}gate_up_proj", 2 * ffn, expert=e),))
            yield Entry(f"{mine}linear_fc2.weight", ffn, (Piece(f"{his}down_proj", h, expert=e),))
        else:
            yield from _gpt_oss_expert(mine, his, e, h, ffn, packed=form == "gpt_oss_mxfp4")


def _gpt_oss_expert(ours: str, theirs: str, e: int, h: int, ffn: int, *, packed: bool) -> Iterator[Entry]:
    """Input features first where the values are stored (output features where they are packed); gate and up in turns.
    """
    how = {"expert": e, "packed": True} if packed else {"expert": e, "transposed": True}
    yield Entry(f"{ours}linear_fc1.weight", h, tuple(
        Piece(f"{theirs}gate_up_proj", ffn, start, 2, **how) for start in (0, 1)))
    yield Entry(f"{ours}linear_fc1.bias", None, tuple(
        Piece(f"{theirs}gate_up_proj_bias", ffn, start, 2, expert=e) for start in (0, 1)))
    yield Entry(f"{ours}linear_fc2.weight", ffn, (Piece(f"{theirs}down_proj", h, **how),))
    yield Entry(f"{ours}linear_fc2.bias", None, (Piece(f"{theirs}down_proj_bias", h, expert=e),))


def stored(found: Iterable[Entry]) -> dict[str, Stored]:
    """The checkpoint's tensors that the pieces make up, in the order of the model."""
    sizes: dict[str, tuple[int, int, Entry, Piece]] = {}  # rows and experts counted up, and a piece to tell the rest
    for entry in found:
        for piece in entry.pieces:
            rows, experts, *_ = sizes.get(piece.name, (0, 0))
            sizes[piece.name] = (max(rows, piece.start + (piece.rows - 1) * piece.step + 1),
                                 max(experts, 0 if piece.expert is None else piece.expert + 1), entry, piece)
    result = {}
    for name, (rows, experts, entry, piece) in sizes.items():
        shape = (rows,) if entry.columns is None else (rows, entry.columns)
        lead = (experts,) if experts else ()
        if piece.packed:
            assert entry.columns is not None
            groups = -(-entry.columns // GROUP)
            result[f"{name}_blocks"] = Stored((*lead, rows, groups, GROUP // 2), "blocks")
            result[f"{name}_scales"] = Stored((*lead, rows, groups), "scales")
        else:
            result[name] = Stored((*lead, *(shape[::-1] if piece.transposed else shape)))
    return result


def units(found: Iterable[Entry]) -> list[list[Entry]]:
    """The entries in groups that share no stored tensor with each other, in order: what must be held at once."""
    groups: dict[frozenset[str], list[Entry]] = {}
    for entry in found:
        groups.setdefault(frozenset(piece.name for piece in entry.pieces), []).append(entry)
    return list(groups.values())
