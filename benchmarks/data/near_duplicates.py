"""Near-duplicates of texts in memory: signatures of 128 permutations, 16 bands of 8, and who goes.

Documents are drawn from a vocabulary by Zipf's law; a fifth are copies of an earlier one with up to a fifth of the
words replaced. Likeness is that of the sets of words (shingles of one word: the others' way, and what costs them
least), so a copy's true likeness is known. rensa's `RMinHashDeduplicator` does what the engine does: candidates by
bands, compared by signature, the first stays. "rensa flags" is its fastest way over whole signatures, "rensa rho"
samples tokens; both only say which documents met another one in a band, originals too. datasketch is slow: it gets
the first 10,000, and its time is scaled.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

UNIT = "documents"
SIZE = 1_000_000
BAR = 2.0
CURVE = (10**4, 10**5, 10**6)

PERMUTATIONS, BANDS, THRESHOLD = 128, 16, 0.8
UNIT_DOCUMENTS = 50_000
_DATASKETCH_DOCUMENTS = 10_000
_AT_ONCE = 10_000

Work = Callable[[], dict]


def make(folder: Path, size: int) -> None:
    """texts: a document a line. truth.npy [size]: likeness of a copy and its original, 0 for no copy."""
    rng = np.random.default_rng(6)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    vocabulary = sorted({"".join(rng.choice(letters, rng.integers(2, 11))) for _ in range(60_000)})
    rng.shuffle(vocabulary)
    likeness = np.zeros(size)
    with open(folder / "texts", "w", encoding="utf-8") as out:
        for first in range(0, size, _AT_ONCE):
            count = min(_AT_ONCE, size - first)
            words = rng.zipf(1.15, (count, 300)) % len(vocabulary)
            lengths, copies = rng.integers(40, 200, count), rng.random(count) < 0.2
            changes, pick = rng.random(count) * 0.2, rng.random(count)
            rows: list[np.ndarray] = []
            for i in range(count):
                mine = words[i, : lengths[i]]
                if copies[i] and i:
                    original = rows[int(pick[i] * i)]
                    mine = np.where(rng.random(len(original)) < changes[i], words[i, : len(original)], original)
                    a, b = set(mine.tolist()), set(original.tolist())
                    likeness[first + i] = len(a & b) / len(a | b)
                rows.append(mine)
                out.write(" ".join(map(vocabulary.__getitem__, mine.tolist())) + "\n")
    np.save(folder / "truth.npy", likeness)


def _texts(folder: Path, size: int) -> list[str]:
    return (folder / "texts").read_text(encoding="utf-8").splitlines()[:size]


def _facts(folder: Path, gone: Iterable[int], size: int) -> dict:
    """How many of the copies that are well above the threshold went, and how many went that are well below it."""
    truth = np.load(folder / "truth.npy")[:size]
    dropped = np.zeros(size, bool)
    dropped[list(gone)] = True
    clear = truth >= 0.9
    recall = round(float((dropped & clear).sum() / max(1, clear.sum())), 4)
    wrong = round(float((dropped & (truth < 0.7)).sum() / max(1, dropped.sum())), 4)
    return {"gone": int(dropped.sum()), "recall": recall, "wrong": wrong,
            "columns": {"recall": recall, "wrongly dropped": wrong}}  # fmt: skip


def engine(folder: Path, size: int) -> Work:
    """Through files, as `prepare` does it: a unit of 50,000 documents at a time."""
    from engine.config.near_dedup import NearDedupConfig
    from engine.data.near_dedup import Signer, near_duplicates, write_signatures

    texts, threads = _texts(folder, size), len(os.sched_getaffinity(0))
    config = NearDedupConfig(threshold=THRESHOLD, permutations=PERMUTATIONS, bands=BANDS, rows=PERMUTATIONS // BANDS,
                             shingle_words=1)  # fmt: skip

    def work() -> dict:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            signer, files = Signer(config), []
            for first in range(0, size, UNIT_DOCUMENTS):
                files.append(Path(place) / str(first))
                signatures = signer.sign(texts[first : first + UNIT_DOCUMENTS], threads)
                write_signatures(files[-1], signatures, config, threads)
            found = near_duplicates(files, config, threads=threads, folder=Path(place))
        gone = found["unit"].astype(np.int64) * UNIT_DOCUMENTS + found["doc"].astype(np.int64)
        return _facts(folder, gone, size) | {"sha256": hashlib.sha256(found.tobytes()).hexdigest()}

    return work


def rensa(folder: Path, size: int) -> Work:
    """Its deduplicator over pairs (key, words): True for what stays."""
    library: Any = importlib.import_module("rensa")  # which has no types
    texts = _texts(folder, size)

    def work() -> dict:
        dedup = library.RMinHashDeduplicator(THRESHOLD, PERMUTATIONS, True, num_bands=BANDS)
        stays = dedup.add_pairs((str(i), text.split()) for i, text in enumerate(texts))
        return _facts(folder, np.flatnonzero(~np.array(stays)), size)

    return work


def _flags(folder: Path, size: int, method: str) -> Work:
    library: Any = importlib.import_module("rensa")
    texts = _texts(folder, size)

    def work() -> dict:
        matrix = getattr(library.RMinHash, method)((text.split() for text in texts), PERMUTATIONS, 42)
        index = library.RMinHashLSH(THRESHOLD, PERMUTATIONS, BANDS)
        flags = index.query_duplicate_flags_matrix_one_shot(matrix)
        return _facts(folder, np.flatnonzero(np.array(flags)), size)

    return work


def rensa_flags(folder: Path, size: int) -> Work:
    return _flags(folder, size, "digest_matrix_from_token_sets")


def rensa_rho(folder: Path, size: int) -> Work:
    return _flags(folder, size, "digest_matrix_from_token_sets_rho")


def datasketch(folder: Path, size: int) -> Work:
    """An index of what stays, asked for each; the first 10,000 documents, the time scaled to all."""
    from datasketch import MinHash, MinHashLSH

    count = min(size, _DATASKETCH_DOCUMENTS)
    texts = _texts(folder, count)

    def work() -> dict:
        started = time.perf_counter()
        index = MinHashLSH(num_perm=PERMUTATIONS, params=(BANDS, PERMUTATIONS // BANDS))
        words = ([word.encode() for word in text.split()] for text in texts)
        gone, stays = [], {}
        for i, mine in enumerate(MinHash.generator(words, num_perm=PERMUTATIONS)):
            if any(mine.jaccard(stays[key]) >= THRESHOLD for key in index.query(mine)):
                gone.append(i)
                continue
            index.insert(i, mine, check_duplication=False)
            stays[i] = mine
        seconds = (time.perf_counter() - started) * size / count
        facts = _facts(folder, gone, count)
        return facts | {"seconds": seconds, "columns": facts["columns"] | {"measured on": count}}

    return work


SIDES = {"engine": engine, "rensa": rensa, "rensa flags": rensa_flags, "rensa rho": rensa_rho, "datasketch": datasketch}


def compare(engine: dict, other: dict) -> str:
    """The engine finds as many clear copies, give or take the chance of a signature, and drops hardly any wrongly.

    Who flags whatever met another, originals too, does another job: only its time is beside ours.
    """
    if other["wrong"] < 0.1 and engine["recall"] < min(other["recall"], 0.999) - 0.005:
        return f"recall {engine['recall']} beside {other['recall']}"
    return f"{engine['wrong']} dropped wrongly" if engine["wrong"] > 0.001 else ""
