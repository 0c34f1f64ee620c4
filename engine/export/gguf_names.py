"""Where each tensor of a GGUF file comes from in a Hugging Face checkpoint, and what llama.cpp does not compute.

A tensor is made of the same pieces as the engine's own (engine/export/names.py), so every form of experts on disk is
read, MXFP4 as well, and every stored tensor is used exactly once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engine.config import ModelConfig
from engine.errors import UserError
from engine.export import windows
from engine.export.names import EMBED_TOKENS, LM_HEAD, Entry, Piece

# Transformers' model_type: llama.cpp's architecture.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
                 "qwen3_moe": "qwen3moe", "gpt_oss": "gpt-oss"}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A tensor of the file: ``entry`` (its name there, its rows), of ``experts`` stacked matrices or vectors (0: one).

    ``heads``: rows are reordered within each of that many heads (0: as they are). ``plain``: always in fp32.
    """

    entry: Entry
    experts: int = 0
    heads: int = 0
    plain: bool = False

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.entry.rows, self.entry.columns
        lead = (self.experts, rows // self.experts) if self.experts else (rows,)
        return lead if columns is None else (*lead, columns)


def targets(family: str, m: ModelConfig, vocab_size: int, form: str | None) -> list[Target]:
    """Every tensor, in the order of the layers. ``form``: of the experts on disk, see ``names.MARKERS``."""
    h = m.hidden_size
    found = [_matrix("token_embd", EMBED_TOKENS, vocab_size, h)]
    for i in range(m.num_layers):
        theirs, ours = f"model.layers.{i}.", f"blk.{i}."
        after = "post_attention_norm" if family == "gpt_oss" else "ffn_norm"
        found.append(_vector(f"{ours}attn_norm.weight", f"{theirs}input_layernorm.weight", h))
        found += _attention(ours, f"{theirs}self_attn.", m, permuted=ARCHITECTURES[family] == "llama")
        found.append(_vector(f"{ours}{after}.weight", f"{theirs}post_attention_layernorm.weight", h))
        if m.moe is None:
            found += _dense(ours, f"{theirs}mlp.", m)
        else:
            assert form is not None
            found += _experts(ours, theirs, m, form)
    found.append(_vector("output_norm.weight", "model.norm.weight", h))
    if not m.tie_embeddings or family == "gpt_oss":  # of which llama.cpp wants a head of its own
        found.append(_matrix("output", EMBED_TOKENS if m.tie_embeddings else LM_HEAD, vocab_size, h))
    return found


def _vector(ours: str, theirs: str, rows: int, heads: int = 0) -> Target:
    return Target(Entry(ours, None, (Piece(theirs, rows),)), heads=heads, plain=True)


def _matrix(ours: str, theirs: str, rows: int, columns: int, *, heads: int = 0, plain: bool = False) -> Target:
    theirs = theirs if theirs.endswith(".weight") else f"{theirs}.weight"
    return Target(Entry(f"{ours}.weight", columns, (Piece(theirs, rows),)), heads=heads, plain=plain)


def _linear(ours: str, theirs: str, rows: int, columns: int, *, bias: bool, heads: int = 0) -> Iterator[Target]:
    yield _matrix(ours, theirs, rows, columns, heads=heads)
    if bias:
        yield _vector(f"{ours}.bias", f"{theirs}.bias", rows, heads)


def _attention(ours: str, theirs: str, m: ModelConfig, *, permuted: bool) -> Iterator[Target]:
    """llama.cpp turns neighbouring features of a head in its llama architecture, Transformers those half a head apart.
    """
    heads, groups, d, h = m.num_attention_heads, m.num_query_groups or 0, m.head_dim or 0, m.hidden_size
    bias = m.attention_bias or m.linear_bias
    yield from _linear(f"{ours}attn_q", f"{theirs}q_proj", heads * d, h, bias=bias, heads=heads if permuted else 0)
    yield from _linear(f"{ours}attn_k", f"{theirs}k_proj", groups * d, h, bias=bias, heads=groups if permuted else 0)
    yield from _linear(f"{ours}attn_v", f"{theirs}v_proj", groups * d, h, bias=bias)
    yield from _linear(f"{ours}attn_output", f"{theirs}o_proj", h, heads * d, bias=m.linear_bias)
    if m.qk_norm:
        yield _vector(f"{ours}attn_q_norm.weight", f"{theirs}q_norm.weight", d)
        yield _vector(f"{ours}attn_k_norm.weight", f"{theirs}k_norm.weight", d)
    if m.attention_sinks:
        yield _vector(f"{ours}attn_sinks.weight", f"{theirs}sinks", heads)


def _dense(ours: str, theirs: str, m: ModelConfig) -> Iterator[Target]:
    h, ffn = m.hidden_size, m.ffn_hidden_size or 0
    yield from _linear(f"{ours}ffn_gate", f"{theirs}gate_proj", ffn, h, bias=m.linear_bias)
    yield from _linear(f"{ours}ffn_up", f"{theirs}up_proj", ffn, h, bias=m.linear_bias)
    yield from _linear(f"{ours}ffn_down", f"{theirs}down_proj", h, ffn, bias=m.linear_bias)


def _experts(ours: str, layer: str, m: ModelConfig, form: str) -> Iterator[Target]:
    assert m.moe is not None
    h, ffn, count = m.hidden_size, m.moe.ffn_hidden_size or 0, m.moe.num_experts
    theirs = f"{layer}block_sparse_moe." if form == "w1_w2_w3" else f"{layer}mlp."
    router = f"{theirs}router" if form.startswith("gpt_oss") else f"{theirs}gate"
    yield _matrix(f"{ours}ffn_gate_inp", router, count, h, plain=True)
    if m.linear_bias:
        yield _vector(f"{ours}ffn_gate_inp.bias", f"{router}.bias", count)
    for which, rows, columns in (("gate", ffn, h), ("up", ffn, h), ("down", h, ffn)):
        pieces = tuple(_piece(f"{theirs}experts.", form, which, e, rows) for e in range(count))
        yield Target(Entry(f"{ours}ffn_{which}_exps.weight", columns, pieces), experts=count)
        if form.startswith("gpt_oss"):
            biases = tuple(_piece(f"{theirs}experts.", "bias", which, e, rows) for e in range(count))
            yield Target(Entry(f"{ours}ffn_{which}_exps.bias", None, biases), experts=count, plain=True)


def _piece(theirs: str, form: str, which: str, e: int, rows: int) -> Piece:
    """One expert's gate, up or down projection."""
    if form in ("w1_w2_w3", "gate_up_down"):
        usual = form == "gate_up_down"
        name = f"{which}_proj" if usual else {"gate": "w1", "down": "w2", "up": "w3"}[which]
        return Piece(f"{theirs}{e}.{name}.weight", rows)
    name = "down_proj" if which == "down" else "gate_up_proj"
    if form == "stacked":  # all gates, then all ups
        return Piece(f"{theirs}{name}", rows, rows if which == "up" else 0, expert=e)
    start, step = (0, 1) if which == "down" else (int(which == "up"), 2)  # gate and up in turns
    if form == "bias":
        return Piece(f"{theirs}{name}_bias", rows, start, step, expert=e)
    return Piece(f"{theirs}{name}", rows, start, step, expert=e,
                 transposed=form == "gpt_oss", packed=form == "gpt_oss_mxfp4")


def refuse(family: str, m: ModelConfig, where: str) -> None:
    """UserError for what llama.cpp does not compute in this architecture (seen in its source, b6000 and later)."""
    theirs = ARCHITECTURES[family]
    if m.moe is not None and m.moe.num_dense_layers:
        problem = f"{m.moe.num_dense_layers} layers without experts, which llama.cpp's {theirs} does not have"
        raise UserError(problem, where=f"{where}: mlp_only_layers", fix="Serve it with Transformers or vLLM")
    if theirs == "qwen3moe" and m.moe is not None and m.moe.router != "softmax_after_topk":
        problem = "experts' weights that are not normalised over the chosen, but llama.cpp's qwen3moe always does that"
        raise UserError(problem, where=f"{where}: norm_topk_prob", fix="Serve it with Transformers or vLLM")
    if m.llama3_rope is not None and theirs != "llama":
        problem = f"Llama 3's rotary scaling, which llama.cpp reads in the llama architecture alone, not in {theirs}"
        raise UserError(problem, where=f"{where}: rope_scaling", fix="Use YaRN, or serve it with Transformers")
    if m.yarn is not None and not m.yarn.truncate and theirs not in ("llama", "gpt-oss"):
        problem = f"YaRN without rounding to whole dimensions, which llama.cpp cannot do in {theirs}"
        raise UserError(problem, where=f"{where}: rope_scaling.truncate", fix="Serve it with Transformers or vLLM")
    if theirs == "qwen2" and m.num_attention_heads * (m.head_dim or 0) != m.hidden_size:
        problem = (f"{m.num_attention_heads} heads of {m.head_dim} make no {m.hidden_size} features, as llama.cpp's "
                   "qwen2 needs them to")
        raise UserError(problem, where=f"{where}: head_dim", fix="Serve it with Transformers or vLLM")


def restrictions(family: str, m: ModelConfig) -> list[str]:
    """In words, where llama.cpp computes something else than Transformers although the file is right."""
    found = []
    if family != "gpt_oss" and m.window_size is not None and m.window_size < m.seq_length:
        found.append(f"llama.cpp has no sliding window in {ARCHITECTURES[family]}: the file states a context of "
                     f"{m.window_size} tokens, the window, within which nothing differs")
    if rounds_yarn(family, m):
        found.append("llama.cpp rounds the ends of YaRN's ramp to whole dimensions, this model does not: logits "
                     "differ, as in every GGUF of GPT-OSS")
    return found


def rounds_yarn(family: str, m: ModelConfig) -> bool:
    """Whether llama.cpp computes other rotary frequencies, and there is no way to write the file that avoids it."""
    return family == "gpt_oss" and m.yarn is not None and not m.yarn.truncate


def sliding_layers(m: ModelConfig) -> list[bool]:
    """Which layers have a window."""
    return [name == "sliding_attention" for name in windows.layer_types(m)]
