"""Rotary embeddings in config.json, as Transformers 4 (``rope_theta``, ``rope_scaling``) and 5 (``rope_parameters``)
write them, and in the engine's model section: plain, Llama 3's and YaRN."""

from __future__ import annotations

import math
from typing import Any

from engine.config import ModelConfig
from engine.export.settings import Settings

_LLAMA3 = ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
_YARN = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate", "attention_factor",
         "mscale", "mscale_all_dim")
_OURS = {"original_max_position_embeddings": "original_seq_length"}


def read(s: Settings) -> dict[str, Any]:
    """``rotary_base`` with ``yarn`` or ``llama3_rope``. Raises ``UserError`` for a kind or setting that is not ours."""
    new, old = s.get("rope_parameters", None), s.get("rope_scaling", None)
    key = "rope_parameters" if new else "rope_scaling"
    given = new or old or s.defaults.get("rope_scaling", {})  # as Transformers 5: null is the family's own
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise s.error(key, "is not one set of rotary settings for all layers")
    settings = dict(given)
    kind = settings.pop("rope_type", None) or settings.pop("type", None) or "default"
    settings.pop("type", None)
    beside = s.get("rope_theta")
    base = settings.pop("rope_theta", None) or beside
    for share in (settings.pop("partial_rotary_factor", None), s.get("partial_rotary_factor", None)):
        if share not in (None, 1, 1.0):
            raise s.error("partial_rotary_factor", f"is {share}; of these models all of each head turns")
    read_kind = {"default": _plain, "llama3": _llama3, "yarn": _yarn}.get(kind) if isinstance(kind, str) else None
    if read_kind is None:
        raise s.error(key, f"{kind!r} is a kind of rotary embedding that is not known here",
                      "Those that are: default, llama3, yarn")
    return {"rotary_base": base} | read_kind(s, settings, key)


def _only(s: Settings, settings: dict, allowed: tuple[str, ...], key: str) -> None:
    for name, value in settings.items():
        if name not in allowed and value is not None:
            raise s.error(f"{key}.{name}", f"is a setting that is not known here ({value})")


def _plain(s: Settings, settings: dict, key: str) -> dict:
    # Leftovers of a scaling that "default" does not use.
    _only(s, settings, (*_LLAMA3, "original_max_position_embeddings"), key)
    return {}


def _llama3(s: Settings, settings: dict, key: str) -> dict:
    _only(s, settings, _LLAMA3, key)
    settings.setdefault("original_max_position_embeddings", s.get("max_position_embeddings"))
    for name in _LLAMA3:
        if not _is_number(settings.get(name)):
            raise s.error(f"{key}.{name}", f"is {settings.get(name)!r}, expected a number", "Download the model again")
    return {"llama3_rope": {_OURS.get(name, name): settings[name] for name in _LLAMA3}}


def _yarn(s: Settings, settings: dict, key: str) -> dict:
    _only(s, settings, _YARN, key)
    for name in set(_YARN) - {"truncate"}:
        if settings.get(name) is not None and not _is_number(settings[name]):
            raise s.error(f"{key}.{name}", f"is {settings[name]!r}, expected a number", "Download the model again")
    original = settings.get("original_max_position_embeddings") or s.get("max_position_embeddings")
    factor = settings.get("factor") or s.get("max_position_embeddings") / original
    if not _is_number(factor):
        raise s.error(f"{key}.factor", f"is {factor!r}, expected a number", "Download the model again")
    usual = magnitude(factor)
    wanted = settings.get("attention_factor")
    scales = settings.get("mscale"), settings.get("mscale_all_dim")
    if wanted is None and scales[0] and scales[1]:
        wanted = magnitude(factor, scales[0]) / magnitude(factor, scales[1])
    if wanted is not None and not math.isclose(wanted, usual, rel_tol=1e-6):
        name = "attention_factor" if settings.get("attention_factor") is not None else "mscale"
        raise s.error(f"{key}.{name}", f"multiplies the rotation by {wanted}; here it is 0.1 ln(factor) + 1 = {usual}")
    return {"yarn": {"factor": factor, "original_seq_length": original, "beta_fast": settings.get("beta_fast") or 32.0,
                     "beta_slow": settings.get("beta_slow") or 1.0,
                     "truncate": settings.get("truncate", True) is not False}}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def magnitude(factor: float, scale: float = 1.0) -> float:
    """What YaRN multiplies cos and sin by (Peng et al., 2023, arXiv:2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def written(m: ModelConfig) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling``, which Transformers 4 and 5 both read. Null would be GPT-OSS's own YaRN.
    """
    plain = {"rope_type": "default"} if m.attention_sinks else None
    found: dict[str, Any] = {"rope_theta": m.rotary_base, "rope_scaling": plain}
    if m.llama3_rope is not None:
        r = m.llama3_rope
        found["rope_scaling"] = {"rope_type": "llama3", "factor": r.factor, "low_freq_factor": r.low_freq_factor,
                                 "high_freq_factor": r.high_freq_factor,
                                 "original_max_position_embeddings": r.original_seq_length}
    elif m.yarn is not None:
        y = m.yarn
        found["rope_scaling"] = {"rope_type": "yarn", "factor": y.factor, "beta_fast": y.beta_fast,
                                 "beta_slow": y.beta_slow, "truncate": y.truncate,
                                 "original_max_position_embeddings": y.original_seq_length}
    return found
