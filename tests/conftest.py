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
