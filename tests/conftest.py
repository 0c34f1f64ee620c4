"""Fixtures of the tests that build models: a tiny prepared corpus once a session, and configurations on it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# Read when kernels are imported: without a GPU they run in Triton's interpreter, on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

sys.path.insert(0, str(Path(__file__).parent / "helpers"))


def pytest_configure() -> None:
    """`make sanitize` means the extensions that it built, and no others."""
    if folder := os.environ.get("MAINSPRING_SANITIZED"):
        from engine import _dedup, _index, _text, _tokenize

        for module in (_dedup, _index, _text, _tokenize):
            file = Path(str(module.__file__)).resolve()
            assert file.is_relative_to(Path(folder).resolve()), f"{file} is not the one under the sanitizers"
            assert b"__asan_init" in file.read_bytes(), f"{file} was built without the sanitizers"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share a module's fixture come first in each half of the list.

    `-n 2 --dist worksteal` gives each worker one half, and steals from its end: a fixture that takes a minute would be
    made by both workers.
    """
    shared = {item.path for item in items if _shares_a_fixture(item)}
    together, alone = [i for i in items if i.path in shared], [i for i in items if i.path not in shared]
    paths = list(dict.fromkeys(item.path for item in together))
    first = [item for item in together if paths.index(item.path) % 2 == 0]
    second = [item for item in together if paths.index(item.path) % 2]
    border = max(0, (len(items) + 1) // 2 - len(first))
    items[:] = [*first, *alone[:border], *second, *alone[border:]]


def _shares_a_fixture(item: pytest.Item) -> bool:
    known = getattr(item, "_fixtureinfo", None)
    return known is not None and any(definition.scope == "module" for definitions in known.name2fixturedefs.values()
                                     for definition in definitions)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared directory of 300 tokens' vocabulary."""
    import tiny

    return tiny.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> Callable:
    """``config(train__lr=0.1)``: a tiny configuration on that corpus, writing into the test's own folder."""
    import tiny

    return lambda **changes: tiny.config(corpus, changes.pop("output_dir", tmp_path / "run"), **changes)
