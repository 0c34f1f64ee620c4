"""A Hugging Face directory as a GGUF file, which llama.cpp loads: weights, settings and tokenizer in one.

``write`` streams one tensor at a time into a file beside its place, reads it back and renames it. Matrices get the type
asked for; vectors, norms, routers and biases stay fp32, as llama.cpp wants them.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from engine import disk
from engine.config import ModelConfig
from engine.errors import UserError
from engine.export import families, gguf_names, gguf_tokenizer, names, rope
from engine.export.files import Files
from engine.export.gguf_names import ARCHITECTURES, Target
from engine.export.gguf_tokenizer import Vocabulary
from engine.export.names import EMBED_TOKENS, LM_HEAD

Dtype = Literal["auto", "f32", "f16", "bf16", "q8_0"]
# Our own names for the same.
_NAMES = {"fp32": "f32", "fp16": "f16", "float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_STORED = {"F64": "f32", "F32": "f32", "F16": "f16", "BF16": "bf16"}
_ROWS = 4096  # converted at once
_F16_MAX = 65504.0


@dataclass
class Written:
    """What is in the file. ``notes``: in words, where llama.cpp differs from Transformers although it is right;
    ``exact``: not in the logits."""

    path: Path
    dtype: str
    architecture: str
    tensors: dict[str, int] = field(default_factory=dict)  # GGUF's type: tensors of it
    bytes: int = 0
    notes: list[str] = field(default_factory=list)
    exact: bool = True


@dataclass(frozen=True)
class Model:
    """An opened Hugging Face directory, with what llama.cpp will call its parts."""

    family: str
    config: ModelConfig
    vocab_size: int
    targets: list[Target]
    vocabulary: Vocabulary
    files: Files

    @property
    def architecture(self) -> str:
        return ARCHITECTURES[self.family]


def write(hf_directory: Path | str, output: Path | str, dtype: str = "auto") -> Written:
    """``output`` (a file that must not exist) from a directory as `mainspring export` or Transformers writes it.

    ``dtype``: f32, f16, bf16, q8_0 (blocks of 32 with an fp16 scale; matrices whose rows are no multiple stay f16), or
    auto, the type that the directory's matrices have. Raises ``UserError`` and leaves nothing: a model, setting or
    tokenizer that llama.cpp lacks, a tensor missing, left over or of another shape, a value that f16 does not hold.
    """
    package = _package()
    directory, output = Path(hf_directory), Path(output)
    if output.exists():
        raise UserError("exists already", where=str(output), fix="Choose another file, or remove it")
    with opened(directory) as model:
        kind = _kind(dtype, model)
        done = Written(output, kind, model.architecture, exact=not gguf_names.rounds_yarn(model.family, model.config),
                       notes=[*gguf_names.restrictions(model.family, model.config), *model.vocabulary.notes])
        partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            done.tensors = dict(_write(package, model, partial, kind, _title(directory)))
            disk.sync(partial)
            _read_back(package, model, partial, kind)
            done.bytes = partial.stat().st_size
            partial.rename(output)
            disk.sync(output.parent)
        except OSError as error:
            raise UserError(error.strerror or str(error), where=str(output), fix="Free space there, or mend its "
                            "permissions, or choose another file") from error
        finally:
            partial.unlink(missing_ok=True)
    return done


@contextlib.contextmanager
def opened(directory: Path) -> Iterator[Model]:
    """The directory, with every tensor's name, shape and type checked. Raises ``UserError``."""
    family, config = families.read_config(directory)
    where = directory / "config.json"
    m = ModelConfig(**families.section_of(family, config, where))
    assert m.vocab_size is not None
    gguf_names.refuse(family.model_type, m, str(where))
    vocabulary = gguf_tokenizer.read(directory, m.vocab_size)
    with Files(directory) as files:
        form = None
        if m.moe is not None:
            marker = {form: f"model.layers.0.{names.MARKERS[form]}" for form in family.experts}
            form = next((form for form in family.experts if marker[form] in files.names()), family.experts[0])
        found = gguf_names.targets(family.model_type, m, m.vocab_size, form)
        spare = {LM_HEAD} if m.tie_embeddings else set()
        files.check(names.stored(target.entry for target in found), spare=spare)
        yield Model(family.model_type, m, m.vocab_size, found, vocabulary, files)


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError("writing GGUF needs the gguf package", where="format", fix="pip install gguf") from None
    return gguf


def _kind(dtype: str, model: Model) -> str:
    """f32, f16, bf16 or q8_0."""
    kind = _NAMES.get(dtype, dtype)
    if kind == "auto":
        return _STORED[model.files.dtype(EMBED_TOKENS)]
    if kind not in ("f32", "f16", "bf16", "q8_0"):
        raise UserError(f"{dtype!r} is no type that is written here", where="dtype", fix="Use f32, f16, bf16 or q8_0")
    return kind


def _title(directory: Path) -> str:
    return directory.resolve().name or "model"


def kind_of(package: Any, target: Target, kind: str) -> Any:
    """GGUF's type of one tensor."""
    types = package.GGMLQuantizationType
    if target.plain:
        return types.F32
    if kind == "q8_0" and target.shape[-1] % package.GGML_QUANT_SIZES[types.Q8_0][0]:
        return types.F16
    return types[kind.upper()]


def values(model: Model, target: Target) -> Iterator[np.ndarray]:
    """The rows of a tensor in fp32 and their order in the file, some at a time: [rows, columns] or [rows]."""
    columns = None if target.entry.columns is None else range(target.entry.columns)
    for piece in target.entry.pieces:
        step = piece.rows if target.heads else _ROWS  # a head's rows change places
        for first in range(0, piece.rows, step):
            rows = model.files.rows(piece, first, min(first + step, piece.rows), columns).float().numpy()
            yield _interleaved(rows, target.heads) if target.heads else np.ascontiguousarray(rows)


def _interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Features i and i + d/2 of each head side by side."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def encoded(package: Any, model: Model, target: Target, kind: Any) -> np.ndarray:
    """The tensor's bytes. Raises ``UserError`` for a value that is not finite or does not fit."""
    parts = []
    for rows in values(model, target):
        largest = float(np.abs(rows).max(initial=0.0))
        if not math.isfinite(largest):
            raise UserError(f"{target.entry.pieces[0].name} holds values that are not finite",
                            where=str(model.files.directory), fix="Export another checkpoint")
        if kind == package.GGMLQuantizationType.F16 and largest > _F16_MAX:
            raise UserError(f"{target.entry.pieces[0].name} reaches {largest:.3g}, f16 ends at {_F16_MAX:.0f}",
                            where=str(model.files.directory), fix="Use --dtype bf16 or fp32")
        parts.append(package.quants.quantize(rows, kind).view(np.uint8).reshape(-1))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _write(package: Any, model: Model, path: Path, kind: str, title: str) -> Counter[str]:
    writer = package.GGUFWriter(path, model.architecture)
    writer.add_name(title)
    _add_settings(package, writer, model)
    _add_tokenizer(writer, model.vocabulary)
    file_types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(package.LlamaFileType[file_types[kind]])
    writer.add_quantization_version(package.GGML_QUANT_VERSION)
    counts: Counter[str] = Counter()
    factors = _rope_factors(model.config, model.family)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for target in model.targets:
        of = kind_of(package, target, kind)
        shape = package.quant_shape_to_byte_shape(target.shape, of)
        writer.add_tensor_info(target.name, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=of)
        counts[of.name] += 1
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for target in model.targets:
            writer.write_tensor_data(encoded(package, model, target, kind_of(package, target, kind)))
    finally:
        writer.close()
    return counts


def _add_settings(package: Any, writer: Any, model: Model) -> None:
    m = model.config
    windowed = m.window_size is not None and model.family != "gpt_oss"
    writer.add_context_length(min(m.seq_length, m.window_size or m.seq_length) if windowed else m.seq_length)
    writer.add_embedding_length(m.hidden_size)
    writer.add_block_count(m.num_layers)
    writer.add_feed_forward_length(m.ffn_hidden_size)
    writer.add_head_count(m.num_attention_heads)
    writer.add_head_count_kv(m.num_query_groups)
    writer.add_key_length(m.head_dim)
    writer.add_value_length(m.head_dim)
    writer.add_layer_norm_rms_eps(m.norm_eps)
    writer.add_vocab_size(model.vocab_size)
    writer.add_rope_dimension_count(m.head_dim)
    writer.add_rope_freq_base(m.rotary_base)
    if _rope_factors(m, model.family) is not None and m.yarn is not None:
        writer.add_rope_scaling_attn_factors(rope.magnitude(m.yarn.factor))
    elif m.yarn is not None:
        writer.add_rope_scaling_type(package.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(m.yarn.factor)
        writer.add_rope_scaling_orig_ctx_len(m.yarn.original_seq_length)
        writer.add_rope_scaling_yarn_beta_fast(m.yarn.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(m.yarn.beta_slow)
    if m.moe is not None:
        writer.add_expert_count(m.moe.num_experts)
        writer.add_expert_used_count(m.moe.top_k)
        writer.add_expert_feed_forward_length(m.moe.ffn_hidden_size)
    if model.family == "gpt_oss":
        layers = gguf_names.sliding_layers(m)
        writer.add_sliding_window(m.window_size or m.seq_length)  # it must have one: all of the context changes nothing
        if any(layers) and layers != [i % 2 == 0 for i in range(m.num_layers)]:  # which is llama.cpp's own rule
            writer.add_sliding_window_pattern(layers)


def _rope_factors(m: ModelConfig, family: str) -> np.ndarray | None:
    """[d/2] fp32: what llama.cpp divides each rotary frequency by. Llama 3.1's stretch; YaRN where its ramp is not
    rounded, which llama.cpp's own YaRN always does (but only its llama architecture takes factors)."""
    d = m.head_dim or 0
    if m.llama3_rope is not None:
        stretch = m.llama3_rope
        wavelengths = 2 * math.pi * m.rotary_base ** (np.arange(0, d, 2, dtype=np.float64) / d)
        turns = stretch.original_seq_length / wavelengths  # within the original context
        span = stretch.high_freq_factor - stretch.low_freq_factor
        kept = ((turns - stretch.low_freq_factor) / span).clip(0, 1)
        factor = stretch.factor
    elif m.yarn is not None and not m.yarn.truncate and ARCHITECTURES[family] == "llama":
        first, last = (d * math.log(m.yarn.original_seq_length / (turns * 2 * math.pi)) / (2 * math.log(m.rotary_base))
                       for turns in (m.yarn.beta_fast, m.yarn.beta_slow))
        first, last = max(first, 0), min(last, d - 1)
        kept = 1 - ((np.arange(d // 2) - first) / max(last - first, 0.001)).clip(0, 1)
        factor = m.yarn.factor
    else:
        return None
    return (1 / ((1 - kept) / factor + kept)).astype(np.float32)


def _add_tokenizer(writer: Any, v: Vocabulary) -> None:
    writer.add_tokenizer_model(v.model)
    writer.add_tokenizer_pre(v.pre)
    writer.add_token_list(v.tokens)
    writer.add_token_types(v.types)
    if v.model == "gpt2":
        writer.add_token_merges(v.merges)
    else:
        writer.add_token_scores(v.scores)
    for name, number in v.special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(v.add_bos)
    writer.add_add_eos_token(v.add_eos)
    if v.space_prefix is not None:
        writer.add_add_space_prefix(v.space_prefix)
    if v.remove_extra_spaces is not None:
        writer.add_remove_extra_whitespaces(v.remove_extra_spaces)
    if v.charsmap:
        writer.add_precompiled_charsmap(v.charsmap)
    if v.chat_template:
        writer.add_chat_template(v.chat_template)


def _read_back(package: Any, model: Model, path: Path, kind: str) -> None:
    """The file as a reader sees it: every tensor with its type and shape, every token."""
    reader = package.GGUFReader(path)
    found = {tensor.name: (tensor.tensor_type, tuple(map(int, reversed(tensor.shape)))) for tensor in reader.tensors}
    wanted = {target.name: (kind_of(package, target, kind), target.shape) for target in model.targets}
    extra = found.keys() - wanted.keys() - {"rope_freqs.weight"}
    assert not extra, extra
    assert wanted.items() <= found.items(), wanted.items() - found.items()
    tokens = reader.fields["tokenizer.ggml.tokens"]
    assert len(tokens.data) == model.vocab_size
