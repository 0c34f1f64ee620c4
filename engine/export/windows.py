"""Sliding windows in config.json: one for all layers, a list of layer types, or Qwen's switch; and ours."""

from __future__ import annotations

from typing import Any

from engine.config import ModelConfig
from engine.export.settings import Settings

_SLIDING, _FULL = "sliding_attention", "full_attention"


def kind(m: ModelConfig) -> str:
    """Which layers have a window: none, all or some."""
    if m.window_size is None:
        return "none"
    return "all" if m.full_attention_every is None else "some"


def layer_types(m: ModelConfig) -> list[str]:
    """Transformers' name for each layer's attention."""
    every = m.full_attention_every
    return [_FULL if m.window_size is None or (every and (i + 1) % every == 0) else _SLIDING
            for i in range(m.num_layers)]


def _every(types: list[str]) -> dict[str, Any] | None:
    """``full_attention_every`` of a list of types; {} where no layer has a window, None where there is no rule."""
    if set(types) <= {_FULL}:
        return {}
    for n in [None, *range(2, len(types) + 1)]:
        if types == [_FULL if n and (i + 1) % n == 0 else _SLIDING for i in range(len(types))]:
            return {"full_attention_every": n}
    return None


def read(s: Settings, family: str, layers: int) -> dict[str, Any]:
    """The fields of the model section. Raises ``UserError`` for an order of layers that ours cannot say."""
    if family in ("mistral", "mixtral"):
        window = s.get("sliding_window")
        return {} if window is None else {"window_size": window}
    if family == "llama":
        return {}
    window, types = s.get("sliding_window", None), s.get("layer_types", None)
    if family != "gpt_oss":
        first = s.get("max_window_layers", 28) or 0  # those before it see everything
        if not isinstance(first, int):
            raise s.error("max_window_layers", f"is {first!r}, expected a number", "Download the model again")
        if not s.get("use_sliding_window", False):
            window = None
        if family == "qwen3_moe":  # Transformers does not look at max_window_layers here
            types = [_SLIDING] * layers
        elif types is None:
            types = [_FULL if i < first else _SLIDING for i in range(layers)]
    elif types is None:
        types = [_FULL if i % 2 else _SLIDING for i in range(layers)]
    if window is None:
        return {}
    rule = _every(types) if isinstance(types, list) and len(types) == layers else None
    if rule is None:
        key = "layer_types" if "layer_types" in s.config else "max_window_layers"
        raise s.error(key, "gives windows to layers in an order that this engine does not have",
                      "It has windows in all layers, or in all but every N-th")
    return {"window_size": window} | rule if rule else {}


def written(m: ModelConfig, family: str) -> dict[str, Any]:
    """The same in the words of config.json."""
    if family == "llama":
        return {}
    if family in ("mistral", "mixtral"):
        return {"sliding_window": m.window_size}
    if family == "gpt_oss":
        return {"sliding_window": m.window_size or 128, "layer_types": layer_types(m)}
    if m.window_size is None:
        return {"use_sliding_window": False, "sliding_window": None, "max_window_layers": m.num_layers}
    found = {"use_sliding_window": True, "sliding_window": m.window_size, "max_window_layers": 0}
    return found if family == "qwen3_moe" else found | {"layer_types": layer_types(m)}
