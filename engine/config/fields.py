"""A pydantic model's fields from outside: their paths, types and choices, and how to say them to a person."""

from __future__ import annotations

import types
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

Loc = tuple[str | int, ...]

# What people type who come from another framework, and what it is called here.
SYNONYMS = {
    "learning_rate": "lr", "min_learning_rate": "min_lr", "lr_scheduler_type": "schedule",
    "lr_decay_style": "schedule", "batch_size": "global_batch_size", "train_batch_size": "global_batch_size",
    "train_iters": "max_steps", "max_iters": "max_steps", "num_steps": "max_steps",
    "per_device_train_batch_size": "micro_batch_size", "device_batch_size": "micro_batch_size",
    "max_grad_norm": "clip_grad", "adam_beta1": "beta1", "adam_beta2": "beta2", "adam_epsilon": "eps",
    "adam_eps": "eps", "lr_warmup_iters": "warmup_steps", "lr_decay_iters": "decay_steps", "dtype": "precision",
    "bf16": "precision", "fp16": "precision", "gradient_checkpointing": "recompute",
    "recompute_granularity": "recompute", "num_hidden_layers": "num_layers", "n_layer": "num_layers",
    "n_layers": "num_layers", "n_head": "num_attention_heads", "n_heads": "num_attention_heads",
    "n_embd": "hidden_size", "d_model": "hidden_size", "dim": "hidden_size",
    "num_key_value_heads": "num_query_groups", "n_kv_heads": "num_query_groups", "kv_channels": "head_dim",
    "intermediate_size": "ffn_hidden_size", "max_position_embeddings": "seq_length", "context_length": "seq_length",
    "max_seq_len": "seq_length", "block_size": "seq_length", "tie_word_embeddings": "tie_embeddings",
    "rms_norm_eps": "norm_eps", "rope_theta": "rotary_base", "initializer_range": "init_std",
    "init_method_std": "init_std", "sliding_window": "window_size", "num_local_experts": "num_experts",
    "num_moe_experts": "num_experts", "num_experts_per_tok": "top_k", "moe_router_topk": "top_k",
    "router_aux_loss_coef": "aux_loss_coeff", "tensor_model_parallel_size": "tensor",
    "pipeline_model_parallel_size": "pipeline", "context_parallel_size": "context",
    "expert_model_parallel_size": "expert", "virtual_pipeline_model_parallel_size": "virtual_pipeline",
    "use_distributed_optimizer": "distributed_optimizer", "tp": "tensor", "pp": "pipeline", "cp": "context",
    "ep": "expert", "save_interval": "save_steps", "eval_interval": "eval_steps", "eval_iters": "eval_batches",
    "log_interval": "logging_steps", "save_total_limit": "keep_last", "data_path": "path",
    "resume": "resume_from_checkpoint", "load": "resume_from_checkpoint", "save": "output_dir",
    "save_dir": "output_dir", "out_dir": "output_dir",
}  # fmt: skip


@dataclass(frozen=True)
class Leaf:
    """One settable field: its dotted path, pydantic's description of it, and the model it lives in."""

    path: str
    info: FieldInfo
    owner: type[BaseModel]

    @property
    def section(self) -> str:
        return self.path.rpartition(".")[0]

    @property
    def unit(self) -> str:
        extra = self.info.json_schema_extra
        return str(extra.get("unit") or "") if isinstance(extra, dict) else ""

    @property
    def default(self) -> Any:
        return PydanticUndefined if self.info.is_required() else self.info.get_default(call_default_factory=True)


@cache
def options(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, without ``Annotated``; a type that is no union is its own only member."""
    if get_origin(annotation) is Annotated:
        return options(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(kind for member in get_args(annotation) for kind in options(member))
    return (annotation,)


def choices(annotation: Any) -> list[Any]:
    return [value for kind in options(annotation) if get_origin(kind) is Literal for value in get_args(kind)]


def takes_none(annotation: Any) -> bool:
    return any(kind is type(None) for kind in options(annotation))


def takes_text(annotation: Any) -> bool:
    """True if a bare word is a value of this type, so that text must not be read as a number."""
    return any(
        kind is str or (isinstance(kind, type) and issubclass(kind, Path)) for kind in options(annotation)
    ) or any(isinstance(choice, str) for choice in choices(annotation))


def list_item(annotation: Any) -> Any | None:
    """The item type of a list or tuple field, else None."""
    for kind in options(annotation):
        if get_origin(kind) in (list, tuple, set) or kind in (list, tuple, set):
            return (get_args(kind) or (Any,))[0]
    return None


def submodel(annotation: Any) -> type[BaseModel] | None:
    for kind in options(annotation):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def walk(model: type[BaseModel]) -> tuple[Leaf, ...]:
    """Every field in order of declaration, sections before the fields inside them."""
    return _walk(model, "")


@cache
def _walk(model: Any, prefix: str) -> tuple[Leaf, ...]:
    found: list[Leaf] = []
    for name, info in model.model_fields.items():
        found.append(Leaf(prefix + name, info, model))
        inner = submodel(info.annotation)
        if inner is not None:
            found += _walk(inner, f"{prefix}{name}.")
    return tuple(found)


def find(model: type[BaseModel], loc: Loc) -> tuple[Any, FieldInfo | None]:
    """The annotation and the field at ``loc``; integers step into list items. (None, None) if there is none."""
    annotation: Any = model
    info: FieldInfo | None = None
    for step in loc:
        if isinstance(step, int):
            annotation, info = list_item(annotation), None
            continue
        inner = submodel(annotation)
        if inner is None or step not in inner.model_fields:
            return None, None
        info = inner.model_fields[step]
        annotation = info.annotation
    return annotation, info


def suggest(model: type[BaseModel], loc: Loc) -> str | None:
    """The dotted path that the unknown field at ``loc`` most likely means, or None."""
    *parents, key = loc
    key = str(key).replace("-", "_").lower()
    parent, _ = find(model, tuple(parents))
    inner = submodel(parent)
    siblings = list(inner.model_fields) if inner else []
    head = ".".join(str(part) for part in parents)
    everywhere = [leaf.path for leaf in walk(model)]

    def here(name: str) -> str:
        return f"{head}.{name}" if head else name

    for name in (key, SYNONYMS.get(key)):
        if name in siblings:
            return here(name)
        named = [path for path in everywhere if path.rpartition(".")[2] == name]
        if named:
            return min(named, key=lambda path: path.count("."))
    close = get_close_matches(key, siblings, n=1, cutoff=0.6)
    if close:
        return here(close[0])
    dotted = ".".join([*map(str, parents), key])
    elsewhere = [path for path in everywhere if not dotted.startswith(f"{path}.")]
    close = get_close_matches(dotted, elsewhere, n=1, cutoff=0.75)
    if close:
        return close[0]
    tails = {path.rpartition(".")[2]: path for path in reversed(everywhere)}
    close = get_close_matches(key, list(tails), n=1, cutoff=0.75)
    return tails[close[0]] if close else None


def kind_name(annotation: Any) -> str:
    """A short upper-case name of the type for ``--help``: INT, FLOAT, PATH, or the choices."""
    named = choices(annotation)
    if named:
        return "|".join(str(choice) for choice in named)
    item = list_item(annotation)
    if item is not None:
        return f"LIST of {kind_name(item)}"
    inner = submodel(annotation)
    if inner is not None:
        return "{" + ", ".join(inner.model_fields) + "}"
    for kind, name in ((bool, "BOOL"), (int, "INT"), (float, "FLOAT"), (Path, "PATH"), (str, "TEXT")):
        if kind in options(annotation):
            return name
    return "VALUE"


def expected(annotation: Any, info: FieldInfo | None) -> str:
    """What a value of this field must be, in words: 'a whole number from 1 to 4096, or null'."""
    named = choices(annotation)
    item = list_item(annotation)
    inner = submodel(annotation)
    kinds = options(annotation)
    if named:
        text = "one of " + ", ".join(str(choice) for choice in named)
    elif item is not None:
        text = f"a list, each item {expected(item, None)}"
    elif inner is not None:
        text = "a mapping with the fields " + ", ".join(inner.model_fields)
    elif bool in kinds:
        text = "true or false"
    elif int in kinds or float in kinds:
        text = ("a number" if float in kinds else "a whole number") + _limits(info)
    elif any(isinstance(kind, type) and issubclass(kind, Path) for kind in kinds):
        text = "a path (text; quote it if it looks like a number)"
    elif str in kinds:
        text = "text (quote it if it looks like a number)"
    else:
        text = "another value"
    return f"{text}, or null" if takes_none(annotation) else text


def _limits(info: FieldInfo | None) -> str:
    found: dict[str, Any] = {}
    for mark in info.metadata if info else ():
        for name in ("ge", "gt", "le", "lt"):
            if getattr(mark, name, None) is not None:
                found[name] = getattr(mark, name)
    if "ge" in found and "le" in found:
        return f" from {found['ge']:,} to {found['le']:,}"
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    text = " and ".join(f"{words[name]} {found[name]:,}" for name in ("ge", "gt", "le", "lt") if name in found)
    return f" {text}" if text else ""
