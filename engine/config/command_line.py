"""``parse``: files, overrides and flags of a command line into any configuration model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel

from engine.config import fields, help_text
from engine.config.base import brief, build, printable, set_path
from engine.config.yaml_io import YamlFile, dump_yaml, parse_flow
from engine.errors import UserError

Model = TypeVar("Model", bound=BaseModel)


def parse(model: type[Model], argv: Sequence[str], *, prog: str, aliases: Mapping[str, str] | None = None,
          fixed: Mapping[str, Any] | None = None) -> Model:
    """A configuration from ``argv``, later words over earlier ones, and all of them over ``--config`` files.

    Understands ``--config FILE``, ``--a.b value``, ``--a.b=value``, ``a.b=value``, ``--flag`` and ``--no-flag`` for
    true/false fields, lists by repetition or as ``[a, b]``, ``null``, dashes for underscores, ``--help`` and
    ``--print-config`` (which print and raise ``SystemExit(0)``), and leaves ``--debug`` to the caller. ``aliases`` maps
    short flags to dotted paths, beside those that the model declares in a class variable ``aliases``. ``fixed``: top-
    level fields that this command has the value of, and that may not be given another.

    Raises:
        UserError: one line with the file and line, or the flag, the field, and the way out.
    """
    known = {**getattr(model, "aliases", {}), **(aliases or {})}
    line = _CommandLine(model, {flag.lstrip("-").replace("-", "_"): path for flag, path in known.items()})
    line.read(list(argv))
    if line.help:
        print(help_text.render(model, prog, known))
        raise SystemExit(0)
    data = line.merged()
    for name, value in (fixed or {}).items():
        if data.setdefault(name, value) != value:
            raise UserError(f"is {brief(data[name])}, but {prog} is for {value}", where=line.locate((name,)) or name,
                            fix=f"Start the command of {name} {brief(data[name])}, or leave {name} out")
    config = build(model, data, line.locate)
    if line.print_config:
        print(dump_yaml(config), end="")
        raise SystemExit(0)
    return config


class _CommandLine:
    """The words of a command line, sorted into files and overrides."""

    def __init__(self, model: type[BaseModel], aliases: dict[str, str]):
        self.model = model
        self.aliases = aliases
        self.leaves = {leaf.path: leaf for leaf in fields.walk(model)}
        self.files: list[YamlFile] = []
        self.overrides: dict[str, tuple[Any, str]] = {}  # dotted path -> value, the flag as it was typed
        self.help = False
        self.print_config = False

    def read(self, words: list[str]) -> None:
        while words:
            word = words.pop(0)
            name, equals, text = word.partition("=")
            if word in ("-h", "--help"):
                self.help = True
            elif word in ("--print-config", "--print_config"):
                self.print_config = True
            elif word == "--debug":
                continue
            elif name == "--config":
                self.files.append(YamlFile(Path(text if equals else self._next(words, "--config", "a file"))))
            elif name.startswith("--"):
                self._flag(name, text if equals else None, words)
            elif equals and not name.startswith("-"):
                self._flag("--" + name, text, words, typed=name)
            else:
                raise UserError(
                    f"unexpected word {brief(word)}", fix="Write --section.field value, or section.field=value"
                )

    def _next(self, words: list[str], flag: str, wanted: str) -> str:
        if not words or words[0].startswith("--"):
            raise UserError(f"needs a value: {wanted}", where=flag)
        return words.pop(0)

    def _flag(self, flag: str, text: str | None, words: list[str], typed: str | None = None) -> None:
        typed = typed or flag
        name = flag[2:].replace("-", "_")
        path = self.aliases.get(name, name)
        if path not in self.leaves and name.startswith("no_"):
            positive = self.aliases.get(name[3:], name[3:])
            leaf = self.leaves.get(positive)
            if leaf is not None and bool in fields.options(leaf.info.annotation):
                if text is not None:
                    raise UserError("takes no value", where=typed, fix=f"Use {flag}, or --{name[3:]}={text}")
                self.overrides[positive] = (False, typed)
                return
        if path not in self.leaves:
            self._unknown(typed, name)
        annotation = self.leaves[path].info.annotation
        if text is None and bool in fields.options(annotation):
            follows = bool(words) and words[0].lower() in ("true", "false", "null")
            text = words.pop(0) if follows else "true"
        if text is None:
            text = self._next(words, typed, fields.expected(annotation, self.leaves[path].info))
        self._set(path, read_value(annotation, text, typed), typed, annotation)

    def _set(self, path: str, value: Any, typed: str, annotation: Any) -> None:
        if isinstance(value, list) and fields.list_item(annotation) is not None and path in self.overrides:
            earlier = self.overrides[path][0]
            value = [*(earlier if isinstance(earlier, list) else []), *value]
        inside = [name for name in self.overrides if name.startswith(path + ".")]
        for name in inside:  # a section set as a whole replaces what was set in it before
            del self.overrides[name]
        self.overrides.pop(path, None)  # the last mention decides the order of application
        self.overrides[path] = (value, typed)

    def _unknown(self, typed: str, name: str) -> NoReturn:
        flags = {**self.aliases, **{path: path for path in self.leaves}}
        meant = fields.suggest(self.model, tuple(name.split(".")))
        if meant is None or "." not in name:
            close = get_close_matches(name, list(flags), n=1, cutoff=0.7)
            meant = close[0] if close else meant
        dashes = "--" if typed.startswith("--") else ""
        raise UserError(
            "unknown option",
            where=printable(typed),
            fix=f"Did you mean {dashes}{meant}?" if meant else "`--help` lists every option",
        )

    def merged(self) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for file in self.files:
            _merge(data, file.data)
        for path, (value, _) in self.overrides.items():
            parts = path.split(".")
            current = data
            for part in parts[:-1]:
                current = current.get(part) if isinstance(current, dict) else None
            if isinstance(value, dict) and isinstance(current, dict) and isinstance(current.get(parts[-1]), dict):
                _merge(current[parts[-1]], value)
            else:
                set_path(data, parts, value)
        return data

    def locate(self, loc: fields.Loc) -> str | None:
        """The flag, or the file and line, that the value at ``loc`` came from."""
        parts = [str(part) for part in loc]
        for end in range(len(parts), 0, -1):
            path = ".".join(parts[:end])
            if path in self.overrides:
                return self.overrides[path][1]
            for file in reversed(self.files):
                if loc[:end] in file.lines:
                    return file.locate(loc)
        return None


def read_value(annotation: Any, text: str, flag: str) -> Any:
    """``text`` as the field's type has it: words stay words where text is wanted, else YAML."""
    if (
        fields.takes_none(annotation)
        and text in ("null", "Null", "NULL", "none", "None", "~")
        and text not in fields.choices(annotation)
    ):
        return None
    item = fields.list_item(annotation)
    try:
        if item is not None:
            if text.lstrip().startswith("["):
                return parse_flow(text)
            return [text if fields.takes_text(item) else parse_flow(text)]
        return text if fields.takes_text(annotation) else parse_flow(text)
    except UserError as error:
        raise UserError(f"{error}: {brief(text)}", where=flag) from None


def _merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    """``new`` over ``into``, mapping by mapping; lists and values are replaced."""
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, dict) else value
