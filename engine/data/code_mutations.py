"""Breaking a function in one place: the rejected answers of preference pairs.

A corruption is a change of the text at the places the syntax tree gives, so that comments and layout stay: the two
answers of a pair differ in what they do and in nothing else. It is taken only if the result compiles, and to other
byte code. Which one is drawn from the seed and the function's text alone.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import random
import re
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

Edit = tuple[int, int, str]  # [start, end) in bytes of the UTF-8 text, and what stands there instead
Change = list[Edit]

_COMPARISONS: dict[type[ast.cmpop], tuple[str, tuple[str, ...]]] = {
    ast.Lt: ("<", ("<=", ">")), ast.LtE: ("<=", ("<", ">")), ast.Gt: (">", (">=", "<")), ast.GtE: (">=", (">", "<")),
    ast.Eq: ("==", ("!=",)), ast.NotEq: ("!=", ("==",)), ast.In: ("in", ("not in",)), ast.NotIn: ("not in", ("in",)),
    ast.Is: ("is", ("is not",)), ast.IsNot: ("is not", ("is",)),
}  # fmt: skip
_OPERATORS: dict[type[ast.operator], tuple[str, tuple[str, ...]]] = {
    ast.Add: ("+", ("-",)), ast.Sub: ("-", ("+",)), ast.Mult: ("*", ("+", "//")), ast.Div: ("/", ("*", "//")),
    ast.FloorDiv: ("//", ("/", "*")), ast.Mod: ("%", ("//",)), ast.LShift: ("<<", (">>",)), ast.RShift: (">>", ("<<",)),
    ast.BitAnd: ("&", ("|",)), ast.BitOr: ("|", ("&",)), ast.Pow: ("**", ("*",)),
}  # fmt: skip
# Names called in one another's place by mistake. Every one stands for the others of its group.
_CONFUSED = [
    ("append", "extend", "insert"), ("lower", "upper"), ("startswith", "endswith"), ("min", "max"), ("any", "all"),
    ("add", "discard"), ("lstrip", "rstrip", "strip"), ("find", "rfind"), ("index", "rindex"), ("keys", "values"),
    ("read", "readline"), ("split", "rsplit"), ("partition", "rpartition"), ("isfile", "isdir"), ("encode", "decode"),
    ("dirname", "basename"), ("acquire", "release"), ("sorted", "list"), ("isinstance", "issubclass"),
    ("int", "float"), ("union", "intersection"), ("update", "setdefault"), ("open", "close"), ("pop", "remove"),
    ("getattr", "hasattr"), ("set", "clear"), ("push", "pop"), ("get", "pop"), ("dumps", "loads"), ("load", "dump"),
]  # fmt: skip
_INSTEAD: dict[str, list[str]] = {}
for _group in _CONFUSED:
    for _name in _group:
        _INSTEAD.setdefault(_name, []).extend(other for other in _group if other != _name)
# As plain names these are other things than the methods.
_METHODS_ONLY = {"set", "get", "open", "load", "find", "index", "pop", "add"}


@dataclass(frozen=True)
class Corrupted:
    """``kind`` is a name of `KINDS`."""

    kind: str
    code: str


class _Source:
    """One function's text in bytes, with its tree; the parser counts columns in bytes too."""

    def __init__(self, code: str):
        self.raw = code.encode()
        self.function = _definition(ast.parse(code))
        self.starts = [0]
        for line in self.raw.split(b"\n"):
            self.starts.append(self.starts[-1] + len(line) + 1)
        self.nodes = [node for statement in self.function.body for node in _nodes(statement)]

    def span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset

    def text(self, node: ast.expr | ast.stmt) -> str:
        start, end = self.span(node)
        return self.raw[start:end].decode()

    def between(self, left: ast.expr, right: ast.expr, old: str, new: str) -> Iterator[Change]:
        """Another operator between two operands, unless a comment there makes it doubtful which text it is."""
        start, end = self.span(left)[1], self.span(right)[0]
        gap = self.raw[start:end].decode()
        pattern = rf"(?<![\w<>=!*/]){re.escape(old)}(?![\w<>=*/])".replace(r"\ ", r"\s+")
        found = list(re.finditer(pattern, gap))
        if len(found) == 1 and "#" not in gap:  # so all of it is ASCII
            first, last = found[0].span()
            yield [(start + first, start + last, new)]

    def apply(self, change: Change) -> str:
        raw = self.raw
        for start, end, text in sorted(change, reverse=True):
            raw = raw[:start] + text.encode() + raw[end:]
        return raw.decode()

    def lines(self, first: ast.stmt, last: ast.stmt) -> tuple[int, int] | None:
        """[start, end) of whole lines that hold these statements and nothing else; None where others share them."""
        start, end = self.span(first)[0], self.span(last)[1]
        begin = self.starts[first.lineno - 1]
        stop = self.raw.find(b"\n", end)
        stop = len(self.raw) if stop < 0 else stop + 1
        rest = self.raw[end:stop].strip()
        return (begin, stop) if not self.raw[begin:start].strip() and (not rest or rest.startswith(b"#")) else None


def _definition(tree: ast.Module) -> ast.FunctionDef | ast.AsyncFunctionDef:
    node = tree.body[0]
    assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    return node


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
    """In the order of the text; not inside f-strings, whose positions are wrong before Python 3.12."""
    yield node
    if not isinstance(node, ast.JoinedStr):
        for child in ast.iter_child_nodes(node):
            yield from _nodes(child)


def _comparison(source: _Source) -> Iterator[Change]:
    for node in source.nodes:
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
            for left, operator, right in zip(operands, node.ops, operands[1:], strict=False):
                old, others = _COMPARISONS[type(operator)]
                for new in others:
                    yield from source.between(left, right, old, new)


def _arithmetic(source: _Source) -> Iterator[Change]:
    for node in source.nodes:
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            if isinstance(node.op, ast.Mod) and isinstance(node.left, (ast.Constant, ast.JoinedStr)):
                continue  # formatting
            old, others = _OPERATORS[type(node.op)]
            for new in others:
                yield from source.between(node.left, node.right, old, new)
        elif isinstance(node, ast.AugAssign) and isinstance(node.op, (ast.Add, ast.Sub)):
            old, new = ("+=", "-=") if isinstance(node.op, ast.Add) else ("-=", "+=")
            start, end = source.span(node.target)[1], source.span(node.value)[0]
            at = source.raw.find(old.encode(), start, end)
            yield [(at, at + 2, new)]


def _boolean(source: _Source) -> Iterator[Change]:
    for node in source.nodes:
        if isinstance(node, ast.BoolOp):
            old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
            for left, right in itertools.pairwise(node.values):
                yield from source.between(left, right, old, new)


def _condition(source: _Source) -> Iterator[Change]:
    """The test of an `if`, a `while` or a conditional expression, the other way round."""
    for node in source.nodes:
        if isinstance(node, (ast.If, ast.While, ast.IfExp)):
            start, end = source.span(node.test)
            if isinstance(node.test, ast.UnaryOp) and isinstance(node.test.op, ast.Not):
                yield [(start, source.span(node.test.operand)[0], "")]
            elif isinstance(node.test, (ast.Name, ast.Call, ast.Attribute, ast.Subscript)):
                yield [(start, start, "not ")]
            elif not isinstance(node.test, (ast.Constant, ast.NamedExpr)):
                yield [(start, start, "not ("), (end, end, ")")]


def _constant(source: _Source) -> Iterator[Change]:
    for node in source.nodes:
        if not isinstance(node, ast.Constant):
            continue
        start, end = source.span(node)
        if isinstance(node.value, bool):
            yield [(start, end, str(not node.value))]
        elif isinstance(node.value, int) and source.text(node).isdigit():
            for new in (node.value + 1, *([node.value - 1] if node.value else [])):
                yield [(start, end, str(new))]


def _variable(source: _Source) -> Iterator[Change]:
    """A local name where another was meant."""
    arguments = source.function.args
    names = [argument.arg for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]]
    names += [node.id for node in source.nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    known = [name for name in dict.fromkeys(names) if name not in ("self", "cls", "_")]
    called = {id(node.func) for node in source.nodes if isinstance(node, ast.Call)}
    for node in source.nodes:
        if not isinstance(node, ast.Name) or not isinstance(node.ctx, ast.Load) or id(node) in called:
            continue
        if node.id in known:
            yield from ([(*source.span(node), other)] for other in known if other != node.id)


def _arguments(source: _Source) -> Iterator[Change]:
    """Two neighbouring arguments of a call in each other's place."""
    for node in source.nodes:
        if isinstance(node, ast.Call) and not any(isinstance(argument, ast.Starred) for argument in node.args):
            for left, right in itertools.pairwise(node.args):
                if not isinstance(left, ast.GeneratorExp) and ast.dump(left) != ast.dump(right):
                    yield [(*source.span(left), source.text(right)), (*source.span(right), source.text(left))]


def _call(source: _Source) -> Iterator[Change]:
    for node in source.nodes:
        if not isinstance(node, ast.Call):
            continue
        end = source.span(node.func)[1]
        if isinstance(node.func, (ast.Name, ast.Attribute)):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if isinstance(node.func, ast.Name) and name in _METHODS_ONLY:
                continue
            yield from ([(end - len(name.encode()), end, other)] for other in _INSTEAD.get(name, ()))


def _returned(source: _Source) -> Iterator[Change]:
    for node in source.nodes:
        if isinstance(node, ast.Return) and node.value is not None and not isinstance(node.value, ast.Constant):
            yield [(*source.span(node.value), "None")]


def _blocks(source: _Source) -> Iterator[list[ast.stmt]]:
    for node in [source.function, *source.nodes]:
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list) and len(block) > 1:
                yield block


_SIMPLE = (ast.Assign, ast.AugAssign, ast.Expr, ast.Delete, ast.Raise)


def _missing(source: _Source) -> Iterator[Change]:
    """A statement left out where others stay."""
    for block in _blocks(source):
        for statement in block:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                continue  # a string that nobody reads
            if isinstance(statement, (*_SIMPLE, ast.If)) and (place := source.lines(statement, statement)):
                yield [(*place, "")]


def _order(source: _Source) -> Iterator[Change]:
    """Two statements the wrong way round, of which the second reads what the first one sets."""
    for block in _blocks(source):
        for first, second in itertools.pairwise(block):
            if not (isinstance(first, _SIMPLE) and isinstance(second, (*_SIMPLE, ast.Return))):
                continue
            here, there = source.lines(first, first), source.lines(second, second)
            if here and there and _touched(first, ast.Store) & _touched(second, ast.Load):
                texts = [source.raw[slice(*place)].decode().rstrip("\n") + "\n" for place in (here, there)]
                yield [(*here, texts[1]), (*there, texts[0])]


def _touched(statement: ast.stmt, context: type[ast.expr_context]) -> set[str]:
    return {ast.unparse(node) for node in ast.walk(statement)
            if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, context)}  # fmt: skip


def _truncated(source: _Source) -> Iterator[Change]:
    """The end is missing: an answer that stops too early."""
    body = source.function.body
    for statement in body[len(body) // 2 or 1 :]:
        if place := source.lines(statement, body[-1]):
            yield [(place[0], len(source.raw), "")]


KINDS: dict[str, Callable[[_Source], Iterator[Change]]] = {
    "comparison": _comparison, "arithmetic": _arithmetic, "boolean": _boolean, "condition": _condition,
    "constant": _constant, "variable": _variable, "arguments": _arguments, "call": _call, "returned": _returned,
    "missing": _missing, "order": _order, "truncated": _truncated,
}  # fmt: skip


def corrupt(code: str, *, seed: int, count: int = 1, kinds: list[str] | None = None) -> list[Corrupted]:
    """At most ``count`` different corruptions of one function, of as many kinds as it allows; fewer, or none, where
    nothing else can be broken. A function of the arguments alone."""
    digest = hashlib.sha256(f"{seed}:{code}".encode()).digest()
    draw, source = random.Random(digest), _Source(code)
    waiting = {kind: list(KINDS[kind](source)) for kind in sorted(kinds or KINDS)}
    original, found, seen = _compiled(code), [], {code}
    while len(found) < count and (left := [kind for kind, changes in waiting.items() if changes]):
        # Every kind once before any comes again, in an order of this function's own.
        used = [item.kind for item in found]
        fewest = min(used.count(kind) for kind in left)
        kind = draw.choice([kind for kind in left if used.count(kind) == fewest])
        changed = source.apply(waiting[kind].pop(draw.randrange(len(waiting[kind]))))
        if changed not in seen and _compiled(changed) not in (None, original):
            found.append(Corrupted(kind, changed.rstrip() + "\n"))
            seen.add(changed)
    return found


def _compiled(code: str) -> tuple | None:
    """What the interpreter would run, without names of files and numbers of lines; None if it does not compile."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _comparable(compile(code, "", "exec", dont_inherit=True))
    except (SyntaxError, ValueError, RecursionError):
        return None


def _comparable(code: types.CodeType) -> tuple:
    constants = tuple(map(_constant_key, code.co_consts))
    return code.co_name, code.co_code, constants, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars


def _constant_key(item: object) -> object:
    if isinstance(item, types.CodeType):
        return _comparable(item)
    return sorted(map(repr, item)) if isinstance(item, frozenset) else repr(item)  # 1, 1.0 and True are equal
