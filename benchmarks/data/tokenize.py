"""A real corpus to ids with a BPE of 32k: `encode_packed` beside `tokenizers`' batch, both on all cores of the process.

The corpus is what this machine has of source code and documentation. Both sides get the same documents, as str, in the
same batches; the time is that of encoding alone, and the ids of the whole corpus are compared by their hash.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data import _corpus

UNIT = "bytes"
SIZE = 200_000_000
BAR = 4.0
VOCABULARY = 32_768
_TRAINED_ON = 20_000_000  # bytes
_BATCH = 4_000_000  # bytes of UTF-8: the library holds 200 bytes a token of a batch


def make(folder: Path, size: int) -> None:
    """The corpus, and a tokenizer trained on the beginning of it."""
    from engine.data.tokenizer import train_tokenizer

    lengths = []
    with open(folder / "corpus", "wb") as out:
        for text in _corpus.texts(size):
            raw = text.encode()
            lengths.append(len(raw))
            out.write(raw)
    np.save(folder / "lengths.npy", np.array(lengths, np.int64))
    sample = [text for batch in _batches(folder, _TRAINED_ON) for text in batch]
    train_tokenizer(sample, VOCABULARY).save(folder / "tokenizer")


def _batches(folder: Path, at_most: int | None = None) -> list[list[str]]:
    batches: list[list[str]] = [[]]
    held = total = 0
    with open(folder / "corpus", "rb") as stream:
        for length in np.load(folder / "lengths.npy").tolist():
            if at_most is not None and total > at_most:
                break
            batches[-1].append(stream.read(length).decode())
            held, total = held + length, total + length
            if held >= _BATCH:
                batches.append([])
                held = 0
    return batches


def _timed(encode: Callable[[list[str]], Any], ids_of: Callable[[Any], np.ndarray], folder: Path) -> Callable:
    batches = _batches(folder)

    def work() -> dict:
        seconds, tokens, found = 0.0, 0, hashlib.sha256()
        for batch in batches:
            started = time.perf_counter()
            encoded = encode(batch)
            seconds += time.perf_counter() - started
            ids = ids_of(encoded)
            tokens += len(ids)
            found.update(ids.astype("<i4").tobytes())
        return {"seconds": seconds, "tokens": tokens, "sha256": found.hexdigest()}

    return work


def engine(folder: Path, size: int, threads: int = 0) -> Callable[[], dict]:
    """Ours, on all cores (``threads`` 0)."""
    from engine.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder / "tokenizer")
    assert tokenizer.fast, tokenizer.slow
    return _timed(lambda batch: tokenizer.encode_packed(batch, threads), lambda found: found[0], folder)


def one_core(folder: Path, size: int) -> Callable[[], dict]:
    """Ours, on one core."""
    return engine(folder, size, threads=1)


def library(folder: Path, size: int) -> Callable[[], dict]:
    """Hugging Face's, in the form that is for ids alone; what turns its result into an array is not timed."""
    import tokenizers

    model = tokenizers.Tokenizer.from_file(str(folder / "tokenizer/tokenizer.json"))
    model.encode_special_tokens = True

    def ids_of(encoded: list[tokenizers.Encoding]) -> np.ndarray:
        return np.concatenate([np.array(one.ids, np.int32) for one in encoded])

    return _timed(lambda batch: model.encode_batch_fast(batch, add_special_tokens=False), ids_of, folder)


SIDES = {"engine": engine, "tokenizers": library, "engine, one core": one_core}


def compare(engine: dict, other: dict) -> str:
    """The ids of the whole corpus."""
    names = [name for name in ("tokens", "sha256") if engine[name] != other[name]]
    return f"other ids ({', '.join(names)})" if names else ""
