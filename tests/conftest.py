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
