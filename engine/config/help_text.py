"""``--help``: every field of a model with its type, unit and default, section by section."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from engine.config import fields

WIDTH = 118


def render(model: type[BaseModel], prog: str, aliases: Mapping[str, str]) -> str:
    leaves = list(fields.walk(model))
    lines = [f"usage: {prog} [--config FILE] [--section.field VALUE | section.field=VALUE] ...", ""]
    if model.__doc__:
        lines += [*textwrap.wrap(" ".join(model.__doc__.split("\n\n")[0].split()), WIDTH), ""]
    lines += ["Values on the command line win over those in files. Lists: repeat the flag, or write '[a, b]'.", ""]
    lines += ["flags"]
    lines += _entry("--config FILE", "YAML file; may be given several times, later ones over earlier ones")
    by_path = {leaf.path: leaf for leaf in leaves}
    for name, path in aliases.items():
        flag = name.lstrip("-")
        boolean = path in by_path and bool in fields.options(by_path[path].info.annotation)
        lines += _entry(f"--{flag} / --no-{flag}" if boolean else f"--{flag} VALUE", f"the same as --{path}")
    lines += _entry("--print-config", "print the resolved configuration as YAML and stop")
    lines += _entry("--debug", "show the traceback of an error")
    lines += _entry("--help", "print this and stop")
    top = [leaf for leaf in leaves if not leaf.section]
    lines += ["", *_group(top, "")]
    for leaf in leaves:
        inner = fields.submodel(leaf.info.annotation)
        if inner is not None:
            note = "" if leaf.default is not None else " (null unless a field of it is set)"
            lines += ["", f"{leaf.path}: {leaf.info.description or ''}{note}"]
            lines += _group([each for each in leaves if each.section == leaf.path], leaf.path)
    return "\n".join(lines)


def _group(leaves: list[fields.Leaf], section: str) -> list[str]:
    lines: list[str] = []
    for leaf in leaves:
        if fields.submodel(leaf.info.annotation) is not None:
            continue
        notes = [f"default: {show(leaf.default)}" if leaf.default is not PydanticUndefined else "required"]
        if leaf.unit:
            notes.append(f"unit: {leaf.unit if leaf.unit != '1' else 'none'}")
        lines += _entry(
            f"--{leaf.path} {fields.kind_name(leaf.info.annotation)}",
            f"{leaf.info.description or ''} [{'; '.join(notes)}]",
        )
    return lines


def _entry(flag: str, text: str) -> list[str]:
    return [f"  {flag}", *textwrap.wrap(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)]


def show(value: Any) -> str:
    """A default as one would type it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Path):
        return str(value)
    return "[]" if value == [] else str(value)
