"""The engine's model as a Hugging Face directory: streamed tensor by tensor, from any layout, all or nothing.

Rank 0 writes. Headers are known beforehand, so a file is never held in memory: at most what shares a stored tensor is
(one fused projection, or GPT-OSS's experts of one layer).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist

from engine import disk
from engine.checkpoint.manager import agree
from engine.config import Config
from engine.errors import UserError
from engine.export import families, names, tokenizer_files
from engine.export.chat import Chat
from engine.export.files import INDEX, SINGLE
from engine.export.names import HEAD, Entry
from engine.model.whole import Split, global_names, join, quantised_names, split_of
from engine.parallel.topology import Groups
from engine.parallel.wrap import gather_parameters, unwrap

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_STORED = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_GB = 10**9


def save(chunks: list[Any], cfg: Config, groups: Groups, tokenizer: Path | str, directory: Path | str, *,
         dtype: str = "bf16", max_shard_gb: float = 5.0, architecture: str = "auto", seq_length: int | None = None,
         chat: Chat | None = None, check: Callable[[Path], object] | None = None) -> Path:
    """Writes ``directory``, which must not exist: weights in ``dtype``, config, generation config, tokenizer, template.

    Collective. ``check(folder)`` is called on every rank before the folder gets its name. ``seq_length``: the context
    that config.json states. ``chat``: a template other than the tokenizer's own. Quantised weights are written as what
    they stand for; adapters must be merged before.
    Raises ``UserError`` on all ranks, and leaves nothing behind.
    """
    final, kind = Path(directory).absolute(), families.family_of(cfg.model, architecture)
    temporary = final.with_name(final.name + ".tmp")
    vocab_size = chunks[0].config.vocab_size
    entries = names.entries(cfg.model, vocab_size, kind.experts[0] if kind.experts else None)
    what = f"exporting {final}"
    agree(groups, lambda: groups.is_main and _begin(temporary, final), what)
    try:
        agree(groups, lambda: _weights(temporary, entries, chunks, cfg, groups, DTYPES[dtype], max_shard_gb), what)

        def rest() -> None:
            if groups.is_main:
                tokens = tokenizer_files.write(Path(tokenizer), temporary, seq_length or cfg.model.seq_length, chat)
                stated = families.config_of(kind, cfg.model, vocab_size, dtype=str(DTYPES[dtype]).split(".")[1],
                                            tokens=tokens, seq_length=seq_length)
                _write_json(temporary / "config.json", stated)

        agree(groups, rest, what)
        if check is not None:
            check(temporary)
        agree(groups, lambda: groups.is_main and _publish(temporary, final), what)
    except UserError:
        if groups.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _begin(temporary: Path, final: Path) -> None:
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise UserError("exists and is not replaced", where=str(final), fix="Choose another --output, or remove it")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _publish(temporary: Path, final: Path) -> None:
    for path in [*temporary.rglob("*"), temporary]:
        disk.sync(path)
    if final.exists():
        final.rmdir()  # empty
    temporary.rename(final)
    disk.sync(final.parent)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class _Failures:
    """The first thing that went wrong on this rank; the sends and receives of the others go on after it."""

    def __init__(self):
        self.first: Exception | None = None

    def guard(self, work: Callable, *args: Any) -> None:
        if self.first is None:
            try:
                work(*args)
            except (OSError, UserError) as error:
                self.first = error

    def raise_first(self) -> None:
        if self.first is not None:
            raise self.first


def _own_parts(chunks: list[Any], cfg: Config) -> dict[str, tuple[Split, Any]]:
    """This rank's parameters (quantised weights among them) and where they belong."""
    gather_parameters(chunks)
    found = {}
    for chunk in chunks:
        pg = unwrap(chunk).pg_collection
        for name, parameter in (global_names(chunk) | quantised_names(chunk)).items():
            if name != HEAD or not cfg.model.tie_embeddings:
                found[name] = (split_of(name, parameter, pg), parameter)
    return found


def _weights(temporary: Path, entries: list[Entry], chunks: list[Any], cfg: Config, groups: Groups,
             dtype: torch.dtype, max_shard_gb: float) -> None:
    own = _own_parts(chunks, cfg)
    held: list = [None] * groups.world_size
    dist.all_gather_object(held, {name: (split, tuple(part.shape)) for name, (split, part) in own.items()})
    _check_names({name for rank in held for name in rank}, {entry.name for entry in entries}, cfg)
    failures = _Failures()
    shards = _Shards(temporary, names.stored(entries), dtype, int(max_shard_gb * _GB)) if groups.is_main else None
    for unit in names.units(entries):
        whole = {entry.name: _gather(entry.name, own, held, groups, dtype, failures) for entry in unit}
        if shards is not None:
            failures.guard(shards.write, _take_apart(unit, whole, dtype))
    if shards is not None:
        failures.guard(shards.close)
    failures.raise_first()


def _check_names(found: set[str], wanted: set[str], cfg: Config) -> None:
    for problem, missing in (("the model has no {}", wanted - found), ("there is no place for {}", found - wanted)):
        if missing:
            raise UserError(f"{problem.format(min(missing))} in the export (and {len(missing) - 1} more)",
                            where="model", fix="Export a plain model: merge adapters first (--merge), and use "
                            f"model.backend engine (here {cfg.model.backend})")


def _gather(name: str, own: dict, held: list[dict], groups: Groups, dtype: torch.dtype, failures: _Failures
            ) -> torch.Tensor | None:
    """The unsplit tensor on rank 0's CPU: each part from the first rank that holds it."""
    owners: dict[int, int] = {}
    for rank, parts in enumerate(held):
        if name in parts:
            owners.setdefault(parts[name][0].index, rank)
    pieces = []
    for _, owner in sorted(owners.items()):
        split, shape = held[owner][name]
        if owner == groups.rank:
            held_part = own[name][1].detach()
            part = held_part.to(dtype).contiguous()
            failures.guard(check_finite, name, held_part, part)
            if owner:
                dist.send(part, dst=0)
        elif groups.is_main:
            part = torch.empty(shape, dtype=dtype, device=groups.device)
            dist.recv(part, src=owner)
        else:
            continue
        pieces.append((split, part.cpu()))
    return join(pieces) if groups.is_main else None


def check_finite(name: str, before: torch.Tensor, after: torch.Tensor) -> None:
    """Raises ``UserError`` where fp16 does not hold what was finite."""
    if after.dtype == torch.float16 and not after.isfinite().all() and before.isfinite().all():
        raise UserError(f"{name} has values up to {float(before.abs().max()):.3g}, beyond fp16", where="dtype",
                        fix="Use --dtype bf16")


def _take_apart(unit: list[Entry], whole: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The stored tensors of entries that share them."""
    found = {name: torch.empty(stored.shape, dtype=dtype) for name, stored in names.stored(unit).items()}
    for entry in unit:
        offset = 0
        for piece in entry.pieces:
            rows = whole[entry.name][offset : offset + piece.rows]
            offset += piece.rows
            target = found[piece.name] if piece.expert is None else found[piece.name][piece.expert]
            target = target.t() if piece.transposed else target
            target[piece.start : piece.start + (piece.rows - 1) * piece.step + 1 : piece.step] = rows
    return found


class _Shards:
    """safetensors files whose headers are written first (https://github.com/huggingface/safetensors#format)."""

    def __init__(self, directory: Path, stored: dict[str, names.Stored], dtype: torch.dtype, max_bytes: int):
        self.directory, self.dtype = directory, dtype
        sizes = {name: dtype.itemsize * torch.Size(s.shape).numel() for name, s in stored.items()}
        self.shapes, self.total = {name: list(s.shape) for name, s in stored.items()}, sum(sizes.values())
        self.plan: list[dict[str, int]] = [{}]
        for name, size in sizes.items():
            if self.plan[-1] and sum(self.plan[-1].values()) + size > max_bytes:
                self.plan.append({})
            self.plan[-1][name] = size
        count = len(self.plan)
        self.files = [SINGLE] if count == 1 else [
            f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        self.place = {name: i for i, part in enumerate(self.plan) for name in part}
        self.current, self.file = -1, None
        self.waiting: list[str] = list(sizes)

    def write(self, tensors: dict[str, torch.Tensor]) -> None:
        """The next tensors, in the order of the plan."""
        for name, tensor in tensors.items():
            assert self.waiting[0] == name, (self.waiting[0], name)
            self.waiting.pop(0)
            if self.place[name] != self.current:
                self._begin(self.place[name])
            assert self.file is not None
            self.file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)

    def _begin(self, number: int) -> None:
        self._end()
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, size in self.plan[number].items():
            header[name] = {"dtype": _STORED[self.dtype], "shape": self.shapes[name],
                            "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.current, self.file = number, (self.directory / self.files[number]).open("wb")
        self.file.write(len(text).to_bytes(8, "little") + text)

    def _end(self) -> None:
        file: BinaryIO | None = self.file
        if file is not None:
            file.close()

    def close(self) -> None:
        self._end()
        assert not self.waiting, self.waiting[0]
        if len(self.files) > 1:
            _write_json(self.directory / INDEX, {"metadata": {"total_size": self.total}, "weight_map": {
                name: self.files[i] for name, i in self.place.items()}})


