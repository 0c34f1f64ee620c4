"""YAML in and out: safe, with line numbers, and the same values again after writing and reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from engine.config import scalars
from engine.config.fields import Loc
from engine.errors import UserError

PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "map", "seq")} | {"!"}
MAX_NODES = 100_000  # aliases of aliases can make a small file expand to anything


class _Loader(yaml.SafeLoader):
    """SafeLoader that leaves the reading of plain words to ``scalars``."""


_Loader.yaml_implicit_resolvers = {}


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which our reader, or a YAML 1.1 reader, would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", scalars.FLOAT, list("-+0123456789."))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", scalars.INT, list("-+0123456789"))


class YamlFile:
    """A YAML mapping as plain dictionaries, and the line that each value came from."""

    def __init__(self, path: Path):
        self.path = path
        self.lines: dict[Loc, int] = {}
        self._nodes = 0
        try:
            root = yaml.compose(path.read_text(encoding="utf-8"), Loader=_Loader)
            if root is None:
                raise UserError("the file is empty; expected a mapping of fields", where=str(path))
            if not isinstance(root, yaml.MappingNode):
                raise UserError(
                    "expected a mapping of fields",
                    where=f"{path}:{root.start_mark.line + 1}",
                    fix="Write `train:` and under it `  lr: 3e-4`",
                )
            self.data: dict[str, Any] = self._value(root, ())
        except OSError as error:
            raise UserError(f"cannot read the file: {error.strerror}", where=str(path), fix="Check its name") from None
        except UnicodeDecodeError:
            raise UserError("the file is not UTF-8 text", where=str(path)) from None
        except ValueError:
            raise UserError("not the name of a file", where=ascii(str(path))) from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be read"
            raise UserError(
                f"not valid YAML: {problem}", where=f"{path}:{mark.line + 1}" if mark else str(path)
            ) from None
        except RecursionError:
            raise UserError("nested too deeply", where=str(path)) from None

    def locate(self, loc: Loc) -> str | None:
        """``file:line`` of the value at ``loc``, or of the nearest mapping around it that the file has."""
        for end in range(len(loc), 0, -1):
            if loc[:end] in self.lines:
                return f"{self.path}:{self.lines[loc[:end]]}"
        return None

    def _value(self, node: yaml.Node, loc: Loc) -> Any:
        self._nodes += 1
        where = f"{self.path}:{node.start_mark.line + 1}"
        if self._nodes > MAX_NODES:
            raise UserError(f"more than {MAX_NODES:,} values", where=where)
        if node.tag not in PLAIN_TAGS:
            raise UserError(f"the tag {node.tag} is not allowed", where=where, fix="Write the value without a tag")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, loc)
        if isinstance(node, yaml.SequenceNode):
            items = []
            for i, item in enumerate(node.value):
                self.lines[(*loc, i)] = item.start_mark.line + 1
                items.append(self._value(item, (*loc, i)))
            return items
        return _word(node)

    def _mapping(self, node: yaml.MappingNode, loc: Loc) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError("a field's name must be a word", where=f"{self.path}:{line}")
            key = key_node.value
            if key in data:
                raise UserError(
                    f"{'.'.join(map(str, (*loc, key)))} is set twice, first on line {self.lines[(*loc, key)]}",
                    where=f"{self.path}:{line}",
                    fix="Keep one",
                )
            self.lines[(*loc, key)] = line
            data[key] = self._value(value_node, (*loc, key))
        return data


def parse_flow(text: str) -> Any:
    """A command-line value as YAML: ``[1, 2]``, ``{kind: ramp}``, or a single word. Raises UserError if it is not."""
    try:
        node = yaml.compose(text, Loader=_Loader)
        return None if node is None else _plain(node)
    except (yaml.YAMLError, RecursionError):
        raise UserError("not a valid YAML value") from None


def _plain(node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return {key.value if isinstance(key, yaml.ScalarNode) else "?": _plain(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item) for item in node.value]
    return _word(node)


def _word(node: yaml.Node) -> Any:
    quoted = isinstance(node, yaml.ScalarNode) and node.style is not None
    return node.value if quoted else scalars.parse_scalar(node.value)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, unchecked against any schema.

    Raises:
        UserError: unreadable, not YAML, not a mapping, or a field set twice; names the file and the line.
    """
    return YamlFile(Path(path)).data


def dump_yaml(model: BaseModel) -> str:
    """Every field of a configuration as YAML, which reads back as an equal configuration: but of a model whose shape
    comes with its weights (``Config.awaits_model``) only those that were set."""
    data = model.model_dump(mode="json")
    if getattr(model, "awaits_model", bool)():
        data["model"] = model.model_dump(mode="json", include={"model"}, exclude_unset=True).get("model", {})
    return yaml.dump(
        data,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=False,
        width=10**6,
    )
