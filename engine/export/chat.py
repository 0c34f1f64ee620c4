"""The chat template of an export: the one that the model's answers were trained with."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from engine.config import Config
from engine.data.tokenizer import load_tokenizer

_LAST_TOKEN = re.compile(r"(<[^<>\s]+>)\s*$")


@dataclass(frozen=True)
class Chat:
    """``template``: Jinja. ``end``: the token that ends an answer (None: not known)."""

    template: str
    end: str | None


def of(cfg: Config, tokenizer: Path) -> Chat | None:
    """None where no stage trained answers, or with the tokenizer's own template, which travels with it."""
    if cfg.stage not in ("sft", "dpo", "lora"):
        return None
    from engine.data.chat import templates

    loaded = load_tokenizer(tokenizer)
    template = templates.load(cfg.examples.template, tokenizer, loaded)
    shown = template.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    shown = shown.replace(templates.GENERATION_START, "").replace(templates.GENERATION_END, "")
    last = _LAST_TOKEN.search(shown)
    end = last.group(1) if last and loaded.token_id(last.group(1)) is not None else None
    return Chat(template.texts["default"], end)
