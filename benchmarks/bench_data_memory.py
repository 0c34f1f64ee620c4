"""`mainspring prepare` of a corpus that is many times what its processes may hold.

``ulimit -v`` (RLIMIT_AS) limits the address space of the command and of each of its workers; the corpus is
``--times`` as large. MALLOC_ARENA_MAX=1 keeps malloc from reserving what it does not use. The row gives the largest
resident memory of one process, and of all of them together.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from benchmarks.data import _corpus
from benchmarks.harness import ROOT, Row

_INTERVAL = 0.1  # seconds


def add_options(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--limit-mb", type=int, default=1000, help="address space of a process")
    parser.add_argument("--times", type=float, default=5.0, help="size of the corpus in limits")
    parser.add_argument("--near", action="store_true", help="with near-duplicates")


def run(options: argparse.Namespace) -> Iterator[Row]:
    """One row; it fails when the command does, or when the corpus is smaller than it should be."""
    with tempfile.TemporaryDirectory(prefix="bench_data_memory_") as name:
        folder = Path(name)
        size = _corpus.write_jsonl(folder / "corpus.jsonl", int(options.limit_mb * options.times * 1e6))
        command = [sys.executable, "-m", "engine.cli", "prepare", "--input", str(folder / "corpus.jsonl"),
                   "--output", str(folder / "out"), "--vocab_size", "32768"]
        command += ["--near_dedup.threshold", "0.8"] if options.near else []
        limit = options.limit_mb * 10**6
        started = time.perf_counter()
        # Each of malloc's arenas reserves 64 MB of address space, used or not.
        environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                                   env=environment,
                                   preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))
        one, together = _watch(process)
        seconds, errors = time.perf_counter() - started, process.stderr.read() if process.stderr else ""
        failed = " | ".join(errors.strip().splitlines()[-3:]) if process.returncode else ""
        kept = 0 if failed else json.loads((folder / "out/manifest.json").read_text())["documents"]["kept"]
        yield Row(f"prepare {size / 1e6:,.0f} MB, ulimit -v {options.limit_mb:,} MB",
                  {"seconds": seconds, "MB/s": size / 1e6 / seconds, "largest process MB": one / 1e6,
                   "all processes MB": together / 1e6, "documents": kept}, compare="MB/s", failed=failed)


def _watch(process: subprocess.Popen) -> tuple[int, int]:
    """Highest resident bytes of one process, and of the tree, until the command ends."""
    one = together = 0
    root = psutil.Process(process.pid)
    while process.poll() is None:
        sizes = []
        with contextlib.suppress(psutil.Error):
            for each in [root, *root.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    sizes.append(each.memory_info().rss)
        one, together = max([one, *sizes]), max(together, sum(sizes))
        time.sleep(_INTERVAL)
    return one, together
