"""From a Python file to its documented functions, each cut into signature, docstring and body, in the author's words.

Comments and layout stay as they were written: a model that learns from these examples shall write code like people,
not like ``ast.unparse``. What cannot be cut out without changing its meaning is left, and counted with the reason.
"""

from __future__ import annotations

import ast
import copy
import inspect
import itertools
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

Definition = ast.FunctionDef | ast.AsyncFunctionDef
_INDENT = "    "


class NotPython(Exception):
    """A file that this Python does not parse; ``line`` counts from 1, where it is known."""

    def __init__(self, detail: str, line: int | None):
        super().__init__(detail)
        self.line = line


@dataclass(frozen=True)
class Function:
    """``header``: decorators and signature; ``code``: header and body without the docstring. Both are dedented."""

    name: str
    owner: str  # the class around it; empty for a function of the module
    line: int
    header: str
    docstring: str
    code: str


@dataclass(frozen=True)
class Passed:
    """A documented function that makes no example, and why."""

    name: str
    line: int
    reason: str


def parse(text: str) -> ast.Module:
    """The tree of a file. Raises NotPython."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            return ast.parse(text)
    except SyntaxError as error:
        raise NotPython(f"not Python ({error.msg})", error.lineno) from None
    except ValueError as error:
        raise NotPython(f"not Python ({error})", None) from None
    except (RecursionError, MemoryError):
        raise NotPython("nested too deeply to parse", None) from None


def functions(text: str, *, max_docstring: int) -> Iterator[Function | Passed]:
    """Documented functions and methods in the order of the file; those inside of other functions belong to these.

    ``max_docstring`` in characters: of a longer one, the leading paragraphs that fit. Raises NotPython.
    """
    lines = text.split("\n")  # not splitlines: a form feed ends no line for the parser
    for node, owner in _definitions(parse(text), ""):
        if ast.get_docstring(node) is None:
            continue
        found = _cut(node, owner, lines, max_docstring)
        yield Passed(node.name, node.lineno, found) if isinstance(found, str) else found


def shape(code: str) -> str:
    """What two functions that differ in name, comments and layout alone have in common."""
    node = parse(code).body[0]
    assert isinstance(node, Definition)
    return ast.dump(node.args) + "".join(map(ast.dump, node.body))


def _definitions(node: ast.AST, owner: str) -> Iterator[tuple[Definition, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            yield child, owner
        elif isinstance(child, ast.ClassDef):
            yield from _definitions(child, child.name)
        elif isinstance(child, (ast.If, ast.Try, ast.With, ast.ExceptHandler)):  # definitions that depend on something
            yield from _definitions(child, owner)


def _cut(node: Definition, owner: str, lines: list[str], max_docstring: int) -> Function | str:
    """The function, or the reason why not."""
    doc, body = node.body[0], node.body[1:]
    if _is_stub(body):
        return "no_body"
    assert doc.end_lineno
    assert node.end_lineno
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    if lines[doc.lineno - 1][: doc.col_offset].strip() or doc.end_lineno == body[0].lineno:
        return "on_one_line"
    if (docstring := _shortened(ast.get_docstring(node) or "", max_docstring)) is None:
        return "long_docstring"
    header = lines[start : doc.lineno - 1]
    rest = lines[doc.end_lineno : node.end_lineno]
    while rest and not rest[0].strip():
        rest.pop(0)
    code = textwrap.dedent("\n".join(header + rest))
    header_text = "\n".join(code.split("\n")[: len(header)]).rstrip()
    if not _same(code, node):
        return "not_dedentable"  # a string of several lines that would lose its indentation, a statement after `;`
    return Function(node.name, owner, node.lineno, header_text, docstring, code.rstrip() + "\n")


def _is_stub(body: list[ast.stmt]) -> bool:
    if len(body) > 1:
        return False
    match body:
        case [] | [ast.Pass()] | [ast.Expr(value=ast.Constant())]:
            return True
        case [ast.Raise(exc=ast.Name(id="NotImplementedError"))]:
            return True
        case [ast.Raise(exc=ast.Call(func=ast.Name(id="NotImplementedError")))]:
            return True
    return False


def _same(code: str, node: Definition) -> bool:
    """Is ``code`` this very definition without its docstring?"""
    try:
        tree = parse(code)
    except NotPython:
        return False
    without = copy.copy(node)
    without.body = node.body[1:]
    return ast.dump(tree) == ast.dump(ast.Module(body=[without], type_ignores=[]))


def _shortened(docstring: str, limit: int) -> str | None:
    text = inspect.cleandoc(docstring).strip()
    while len(text) > limit:
        text, paragraph, _ = text.rpartition("\n\n")
        if not paragraph:
            return None
        text = text.rstrip()
    return text


def quoted(docstring: str) -> str | None:
    """The docstring as an indented literal; None where no quotes hold it."""
    prefix = "r" if "\\" in docstring else ""
    # Text that is indented from its second line on keeps that only where it begins on a line of its own.
    for start, quotes in itertools.product(("", "\n"), ('"""', "'''")):
        end = f"\n{quotes}" if "\n" in docstring or docstring.endswith((quotes[0], "\\")) else quotes
        literal = textwrap.indent(f"{prefix}{quotes}{start}{docstring}{end}", _INDENT)
        try:
            function = parse(f"def f():\n{literal}\n").body[0]
        except NotPython:
            continue
        if isinstance(function, Definition) and (ast.get_docstring(function) or "").strip() == docstring:
            return literal
    return None
