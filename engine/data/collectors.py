"""Sources of the user's own: a class of a few lines that yields documents, `--input python:my_module:MyCollector`.

    class Tickets(Collector):
        name = "tickets"

        def documents(self):
            for page in range(100):
                yield from json.load(urlopen(f"https://example.org/tickets?page={page}"))

An item is the text itself, or a dict whose ``--text_field`` is the text. The class is made without arguments, in every
process that reads from it, and found by its module's name (the current folder counts, as with `python -m`) or by the
path of its .py file.

What a kill costs: a source is read part by part, `parts` says which there are, and a finished part is kept. Without
`parts` the whole source is one, and is collected again from its beginning. Once everything is prepared, the same
command collects nothing: the result is used as it is while `identity` is the same (the class's file, name, version and
parts), so change ``version`` where the source has news. Two runs give the same bytes only if the source gives the same
documents in the same order.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from engine.errors import Interrupted, UserError

_EXAMPLE = "Give python:MODULE:CLASS or python:FILE.py:CLASS."


class Collector:
    """Derive from it and write `documents`, or `parts` and `documents_of`.

    An OSError of theirs (a network that fails) ends the run with one line; anything else is a fault of the class's own,
    and is shown as one.
    """

    name = ""  # stands in places, such as tickets:17; the class's own name where it is empty
    version = ""  # change it to have everything collected again

    def documents(self) -> Iterator[dict | str]:
        """All items, in the same order each time."""
        for part in self.parts():
            yield from self.documents_of(part)

    def parts(self) -> Sequence[str]:
        """Names of pieces that can be read apart, by several processes and after a kill; the same each time."""
        return ("",)

    def documents_of(self, part: str) -> Iterator[dict | str]:
        """The items of one part, in the same order each time."""
        yield from self.documents()

    def identity(self) -> str:
        """SHA-256 of what the class is: its file, name, version and parts; not of what it collects."""
        file = Path(inspect.getfile(type(self))).read_bytes()
        names = repr((type(self).__qualname__, self.name, self.version, *parts_of(self)))
        return hashlib.sha256(file + names.encode()).hexdigest()


def load(where: Path) -> Collector:
    """The collector that an input names, as in ``python:my_module:MyCollector``.

    Raises:
        UserError: no such module or class, or it is no Collector with documents.
    """
    module_name, _, class_name = str(where).removeprefix("python:").rpartition(":")
    if not module_name or not class_name.isidentifier():
        raise UserError("names no class", where=str(where), fix=_EXAMPLE)
    module = _module(module_name, str(where))
    found = getattr(module, class_name, None)
    if not (inspect.isclass(found) and issubclass(found, Collector)):
        there = [name for name, value in vars(module).items() if inspect.isclass(value) and value is not Collector
                 and issubclass(value, Collector)]  # fmt: skip
        problem = f"no Collector {class_name!r} (there are {', '.join(there) or 'none'})"
        raise UserError(problem, where=str(where), fix="Derive it from engine.data.collectors.Collector.")
    if found.documents is Collector.documents and found.documents_of is Collector.documents_of:
        raise UserError(f"{class_name} has neither documents() nor documents_of()", where=str(where),
                        fix="Write one of them; see engine/data/collectors.py.")  # fmt: skip
    collector = found()
    collector.name = collector.name or class_name
    return collector


def _module(name: str, where: str) -> ModuleType:
    path = Path(name)
    try:
        if path.suffix == ".py":
            # Under a name of its own: a file called json.py must not become everybody's json.
            alias = "collector_" + hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:16]
            if alias in sys.modules:
                return sys.modules[alias]
            spec = importlib.util.spec_from_file_location(alias, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            sys.modules[alias] = module
            return module
        with _current_folder():
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"no module {error.name!r}", where=where, fix=_EXAMPLE) from None
    except (OSError, SyntaxError) as error:
        raise UserError(f"cannot be loaded ({error})", where=where, fix="Mend it, or check --input.") from None


@contextmanager
def _current_folder() -> Iterator[None]:
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path.remove("")


def parts_of(collector: Collector) -> Sequence[str]:
    """Its parts. Interrupted where it must ask for them and gets no answer."""
    try:
        return list(collector.parts())
    except OSError as error:
        raise _failed(collector, error, "cannot tell its parts") from error


def _place(collector: Collector, part: str) -> str:
    return f"{collector.name}/{part}" if part else collector.name


def place_of(where: Path, part: int) -> str:
    """How places of this part begin: the collector's name, and that of the part, if it has one."""
    collector = load(where)
    return _place(collector, parts_of(collector)[part])


def _failed(collector: Collector, error: OSError, what: str) -> Interrupted:
    problem = f"{what} ({error.strerror or error})"
    return Interrupted(problem, where=collector.name, fix="Run it again; finished parts are kept.")


def items(collector: Collector, first: int, end: int | None) -> Iterator[tuple[str, int, dict | str]]:
    """(`place_of` the part, number in it from 1, item) of the parts from ``first`` to ``end``.

    Raises:
        Interrupted: the source cannot be reached.
    """
    number = 0
    try:
        for part in parts_of(collector)[first:end]:
            place = _place(collector, part)
            for number, item in enumerate(collector.documents_of(part), 1):
                yield place, number, item
    except OSError as error:
        raise _failed(collector, error, f"stopped after {number:,} documents") from error
