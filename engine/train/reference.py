"""Log-probabilities of a reference model: computed once with the model that is then trained, and kept in a file.

n pairs; [n, 2] are the summed log-probabilities (nats, fp64) of each pair's chosen and rejected answer. So training
needs no second model in memory, and a run that is resumed, repeated with other settings or on other ranks reads the
file.

The file is named by a hash of its key: of the model's files, of all tokens of the pairs (which data, template and
tokenizer go into), and of the precision. Neither the layout nor the rows that pairs were packed into are part of it:
they change the last digits, as they do those of any loss.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine import disk
from engine.data.loader import uncounted
from engine.errors import UserError
from engine.model import forward
from engine.model.preference import Scoring
from engine.parallel.topology import Groups

_VERSION = 1
Key = Mapping[str, Any]


def file_of(folder: Path, key: Key) -> Path:
    """Where log-probabilities with this key are kept."""
    return folder / f"{hashlib.sha256(_text(key).encode()).hexdigest()[:24]}.safetensors"


def _text(key: Key) -> str:
    return json.dumps({"version": _VERSION, **key}, sort_keys=True)


def read(path: Path, key: Key, pairs: int) -> torch.Tensor | None:
    """fp64 [n, 2], or None where there is no such file, or one that is damaged or of another key."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about, found_n2 = file.metadata() or {}, file.get_tensor("log_probs")
    except (OSError, SafetensorError):
        return None
    whole = found_n2.shape == (pairs, 2) and found_n2.dtype == torch.float64
    return found_n2 if whole and about == _about(key, found_n2) else None


def write(path: Path, key: Key, log_probs_n2: torch.Tensor) -> None:
    """All or nothing. Raises ``OSError``."""
    from safetensors.torch import save

    data = save({"log_probs": log_probs_n2.contiguous()}, _about(key, log_probs_n2))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        disk.sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _about(key: Key, log_probs_n2: torch.Tensor) -> dict[str, str]:
    """One entry: the format writes several in any order, and the same content should be the same file."""
    sha256 = hashlib.sha256(log_probs_n2.contiguous().numpy().tobytes()).hexdigest()
    return {"about": json.dumps({"key": _text(key), "sha256": sha256})}


@torch.no_grad()
def score(chunks: list[Any], loader: Any, groups: Groups, *, micro_batch_size: int, seq_length: int) -> torch.Tensor:
    """The model's summed log-probabilities of every pair of the loader, fp64 [n, 2] on every rank. Collective.

    In evaluation mode, under any layout. Raises ``UserError`` on all ranks where one is not finite.
    """
    training, objective = chunks[0].training, Scoring(loader.num_examples)
    for chunk in chunks:
        chunk.eval()
    batches, stages = loader.evaluation_batches(micro_batch_size, seq_length), groups.pg.pp.size()
    for some in iter(lambda: list(itertools.islice(batches, 2 * stages)), []):
        while len(chunks) > 1 and len(some) % stages:  # interleaving needs whole rounds
            some.append(uncounted(some[-1]))
        forward.run(chunks, some, groups, num_micro_batches=len(some), micro_batch_size=micro_batch_size,
                    seq_length=seq_length, forward_only=True, objective=objective)
    for chunk in chunks:
        chunk.train(training)
    whole_n3 = torch.cat([objective.sums_n2, objective.times_n[:, None].double()], 1).to(groups.device)
    if groups.world_size > 1:
        dist.all_reduce(whole_n3)  # one rank has each pair, the others zero
    log_probs_n2, times_n = whole_n3[:, :2].cpu().contiguous(), whole_n3[:, 2]
    assert bool((times_n == 1).all()), "evaluation gives each pair once"
    if not log_probs_n2.isfinite().all():
        bad = int((~log_probs_n2.isfinite()).any(1).nonzero()[0])
        raise UserError(f"the reference model's log-probability of pair {bad} is {log_probs_n2[bad].tolist()}",
                        where="dpo.reference", fix="Use other weights, or train.precision bf16 in place of fp16")
    return log_probs_n2


def provide(
    loaders: list[Any],
    chunks: list[Any],
    groups: Groups,
    *,
    key: Callable[[Any], Key],
    folder: Path,
    load: Callable[[], None],
    micro_batch_size: int,
    seq_length: int,
) -> list[str]:
    """Gives each loader of pairs its reference log-probabilities, from the file of ``key(loader)`` or scored now.

    ``load`` fills the chunks with the reference's weights; it is called where anything has to be scored. Only the first
    rank reads and writes the files. Collective. -> lines for people. Raises ``UserError`` on all ranks.
    """
    said = []
    loaded = False
    for loader in loaders:
        if not loader.num_examples:
            continue
        own = key(loader)
        path = file_of(folder, own)
        found_n2 = _of_first_rank(groups, lambda path=path, own=own, n=loader.num_examples: read(path, own, n))
        if found_n2 is None:
            if not loaded:
                load()
                loaded = True
            start = time.perf_counter()
            found_n2 = score(chunks, loader, groups, micro_batch_size=micro_batch_size, seq_length=seq_length)
            _of_first_rank(groups, lambda path=path, own=own, scored=found_n2: write(path, own, scored))
            said.append(f"reference log-probabilities of {len(found_n2):,} pairs computed in "
                        f"{time.perf_counter() - start:.1f} s -> {path}")
        else:
            said.append(f"reference log-probabilities of {len(found_n2):,} pairs from {path}")
        loader.set_reference(found_n2)
    return said


def _of_first_rank(groups: Groups, work: Callable[[], Any]) -> Any:
    """``work`` done by rank 0, its result on every rank; where the disk fails it, ``UserError`` on every rank."""
    outcome: list[Any] = [None, None]
    if groups.is_main:
        try:
            outcome[0] = work()
        except OSError as error:
            outcome[1] = f"{error.strerror or error} ({error.filename})"
    if groups.world_size > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise UserError(f"reference log-probabilities cannot be kept: {outcome[1]}", where="dpo.cache_dir",
                        fix="Free some space there, or name a folder that can be written")
    return outcome[0]
