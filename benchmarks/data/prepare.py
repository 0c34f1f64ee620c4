"""JSON lines -> `.bin/.idx`: `mainspring prepare`, cleaning and exact dedup included, beside Megatron's way.

That is its tools/preprocess_data.py rebuilt: a pool of as many processes as there are cores, each with json.loads and
the Hugging Face tokenizer (called directly, without the wrapper classes), and one `IndexedDatasetBuilder` in the
parent. It neither cleans nor deduplicates. Starting the processes is in the time of both.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.data import _corpus
from engine.data.indexed import IndexedDataset
from engine.data.tokenizer import load_tokenizer, train_tokenizer

UNIT = "bytes"
SIZE = 100_000_000
BAR = 5.0
CURVE = (10**6, 10**7, 10**8, 10**9)
LARGEST = {"megatron": 10**7}
_VOCABULARY = 32_000
_TRAINED_BYTES = 16_000_000
_CHUNK = 32  # lines that a process of the pool takes at once, as in preprocess_data.py
_PARTS = 64  # of the documents one in so many is compared


def make(folder: Path, size: int) -> None:
    """Real text of this machine as JSON lines, and a BPE of 32k trained on its beginning."""
    _corpus.write_jsonl(folder / "input.jsonl", size)
    train_tokenizer(_corpus.texts(min(size, _TRAINED_BYTES)), _VOCABULARY).save(folder / "tokenizer")


def engine(folder: Path, size: int) -> Callable[[], dict]:
    from engine.config.prepare import PrepareConfig
    from engine.data.prepare import prepare

    config = PrepareConfig(
        input=[folder / "input.jsonl"], output=folder / "prepared", overwrite=True, validation_fraction=0,
        tokenizer=folder / "tokenizer", workers=cores(),
    )  # fmt: skip

    def work() -> dict:
        started = time.perf_counter()
        manifest = prepare(config)
        seconds = time.perf_counter() - started
        return facts(folder / "prepared/train", (folder / "input.jsonl").stat().st_size) | {
            "seconds": seconds, "read": manifest["documents"]["read"]
        }  # fmt: skip

    return work


def megatron(folder: Path, size: int) -> Callable[[], dict]:
    import multiprocessing

    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    vocabulary = load_tokenizer(folder / "tokenizer").vocab_size
    prefix = folder / "megatron"

    def work() -> dict:
        started = time.perf_counter()
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocabulary))
        read = 0
        with (
            open(folder / "input.jsonl", encoding="utf-8") as lines,
            multiprocessing.Pool(cores(), _start, (folder / "tokenizer/tokenizer.json",)) as pool,
        ):
            for ids in pool.imap(_encode, lines, _CHUNK):
                builder.add_document(torch.IntTensor(ids), [len(ids)])
                read += 1
        builder.finalize(f"{prefix}.idx")
        seconds = time.perf_counter() - started
        return facts(prefix, (folder / "input.jsonl").stat().st_size) | {"seconds": seconds, "read": read}

    return work


_encoder: Callable[[str], list[int]]


def _start(path: Path) -> None:
    import tokenizers

    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    model = tokenizers.Tokenizer.from_file(str(path))
    model.encode_special_tokens = True
    _encoder = lambda text: model.encode(text, add_special_tokens=False).ids  # noqa: E731


def _encode(line: str) -> list[int]:
    return [*_encoder(json.loads(line)["text"]), 0]  # 0 is the end of document of a tokenizer of ours


def cores() -> int:
    return len(os.sched_getaffinity(0))


def facts(prefix: Path, size: int) -> dict:
    """What is compared: of one document in so many, by its content, the hash of its tokens."""
    dataset = IndexedDataset(prefix)
    return {"amount": size, "documents": len(dataset), "tokens": dataset.num_tokens, "some": sorted(_hashes(dataset))}


def _hashes(dataset: IndexedDataset) -> set[str]:
    found = (hashlib.sha256(dataset[number].tobytes()).digest() for number in range(len(dataset)))
    return {digest.hex()[:16] for digest in found if digest[-1] % _PARTS == 0}


def compare(engine: dict, other: dict) -> str:
    """Every document that was kept has the very ids that Megatron's path gives the record, and none was lost unread."""
    if engine["read"] != other["documents"]:
        return f"{engine['read']} records were read, there are {other['documents']}"
    if not engine["some"]:
        return "too few documents to compare"
    # Cleaning mends some: those are other documents.
    known = set(other["some"])
    same = sum(item in known for item in engine["some"]) / len(engine["some"])
    return "" if same > 0.9 else f"of the documents that were kept only {same:.0%} have the same ids"


SIDES = {"engine": engine, "megatron": megatron}
