"""``load_config``: a configuration from a file, for programs; command lines use ``parse``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.config.base import build, set_path
from engine.config.schema import Config
from engine.config.yaml_io import YamlFile


def load_config(path: str | Path, changes: Mapping[str, Any] | None = None) -> Config:
    """The configuration in a YAML file, with fields changed by dotted path: ``{"train.max_steps": 3}``.

    Raises ``UserError``, with file and line, for what ``Config`` refuses.
    """
    file = YamlFile(Path(path))
    for field, value in (changes or {}).items():
        set_path(file.data, field.split("."), value)
    return build(Config, file.data, file.locate)
