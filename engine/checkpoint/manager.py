"""Saving, resuming and retention: what a driver hands to the training loop."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist

from engine import disk
from engine.checkpoint import adapters, layout, rng, sharded
from engine.checkpoint.adapters import Base
from engine.config import Config, dump_yaml, load_yaml
from engine.data.tokenizer import TOKENIZER_FILES
from engine.errors import UserError
from engine.parallel.topology import Groups

_VERSION = 2  # of state.json and the optimizer's state; 1 had Megatron's forms of it
# The fields that the names and shapes of the weights follow from.
_SHAPE = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "head_dim", "ffn_hidden_size",
          "tie_embeddings", "qk_norm", "attention_bias", "linear_bias", "attention_sinks", "moe")


@contextlib.contextmanager
def _disk_errors(groups: Groups, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        file = f" ({error.filename})" if error.filename else ""
        raise UserError(f"rank {groups.rank}: {error.strerror or error}{file}", where=what,
                        fix="Free some space or mend the permissions; earlier checkpoints are intact") from error


def agree(groups: Groups, work: Callable[[], object], what: str) -> list:
    """Runs ``work`` on every rank and gathers the results; a failure on one rank is raised on all, naming it.

    ``work`` raises after its last collective call, if it has any: the other ranks would wait in it for this one.
    """
    outcome, failure = None, None
    try:
        with _disk_errors(groups, what):
            outcome = work()
    except UserError as error:
        failure = str(error)
    gathered: list = [None] * groups.world_size
    dist.all_gather_object(gathered, (outcome, failure))
    for _, problem in gathered:
        if problem is not None:
            raise UserError(problem)
    return [result for result, _ in gathered]


def _own_files(temporary: Path, rank: int) -> list[Path]:
    """The files that this rank wrote: it alone hashes them, so that hashing scales with the ranks."""
    files = [p for p in temporary.rglob("*") if p.is_file()]
    shard_of = {p: p.name.split("_")[2] for p in files if p.suffix == ".distcp"}  # __<rank>_<n>.distcp
    own = [p for p, owner in shard_of.items() if owner == str(rank)]
    own.append(rng.path(temporary, rank))
    if rank == 0:
        own += [p for p in files if p not in shard_of and p.parent.name != "rng"]
    return own


def _flush_and_hash(path: Path) -> str:
    disk.sync(path)  # Megatron flushes its shards, but not its common.pt and metadata.json
    return disk.sha256(path)


def check_model(path: Path, cfg: Config) -> None:
    """Refuses a checkpoint of a model of other shape, in the words of the configuration."""
    saved, wanted = load_yaml(path / "config.yaml").get("model") or {}, cfg.model.model_dump(mode="json")
    other = [name for name in _SHAPE if name in saved and saved[name] != wanted[name]]
    if other:
        differences = ", ".join(f"model.{name} {saved[name]} (here {wanted[name]})" for name in other)
        raise UserError(f"is a checkpoint of another model: {differences}", where=str(path),
                        fix="Set these as they were, or choose another --output_dir for the new model")


def _no_tokenizer_files(_folder: str, names: list[str]) -> list[str]:
    """What lies beside a tokenizer in a model's directory and does not belong to it."""
    return [name for name in names if name not in TOKENIZER_FILES]


class Checkpointer:
    """Saves into and resumes from ``<output_dir>/checkpoints``. Every method is collective over all ranks."""

    def __init__(self, cfg: Config, groups: Groups, *, tokenizer: Path | None, tokenizer_sha256: str | None,
                 vocab_size: int, base: Base | None = None):
        self.cfg, self.groups, self.tokenizer = cfg, groups, tokenizer
        self.identity = {"tokenizer_sha256": tokenizer_sha256, "vocab_size": vocab_size}
        self.base = base  # the frozen model beside which adapters are trained
        self.checkpoints = layout.root(cfg.output_dir)

    def save(self, chunks, optimizer, state: dict) -> Path:
        """Saves a checkpoint of ``state["step"]`` and prunes old ones. Refuses to replace an existing one.

        ``optimizer`` None: weights alone, from which a stage can start (``init_from``) but no run go on.
        """
        final = layout.folder(self.checkpoints, state["step"])
        temporary = final.with_name(final.name + ".tmp")

        def begin() -> None:
            if self.groups.is_main:
                if final.exists():
                    raise UserError("this checkpoint exists and is not replaced", where=str(final),
                                    fix="Choose another --output_dir, or move it away")
                self.checkpoints.mkdir(parents=True, exist_ok=True)
                layout.clean_temporary(self.checkpoints)
                (temporary / "sharded").mkdir(parents=True)
                (temporary / "rng").mkdir()

        what = f"saving {final}"
        agree(self.groups, begin, what)
        agree(self.groups, lambda: sharded.save(temporary / "sharded", chunks, optimizer, self.groups), what)
        agree(self.groups, lambda: self._save_rest(temporary, state, optimizer is not None), what)
        hashes = agree(self.groups, lambda: {str(p.relative_to(temporary)): _flush_and_hash(p)
                                              for p in _own_files(temporary, self.groups.rank)}, what)

        def end() -> None:
            if self.groups.is_main:
                layout.forget_best(self.checkpoints)
                layout.publish(temporary, final, {k: v for part in hashes for k, v in part.items()})
                best = {state["best_step"]} if self.cfg.checkpoint.keep_best and state.get("best_step") else set()
                layout.prune(self.checkpoints, keep_last=self.cfg.checkpoint.keep_last, keep=best)

        agree(self.groups, end, what)
        return final

    def _save_rest(self, temporary: Path, state: dict, trains: bool) -> None:
        rng.save(temporary, self.groups.rank)
        if not self.groups.is_main:
            return
        record = {"version": _VERSION, "train": state, "parallel": self._layout(),
                  "optimizer": self.cfg.train.optimizer if trains else None, **self.identity}
        if self.base is not None:
            record["base"] = self.base.record(self.cfg.output_dir)
        layout.write_text(temporary / "state.json", json.dumps(record, indent=1))
        layout.write_text(temporary / "config.yaml", dump_yaml(self.cfg))
        if self.tokenizer is not None:
            shutil.copytree(self.tokenizer, temporary / "tokenizer", ignore=_no_tokenizer_files)

    def end_with_best(self, chunks, state: dict) -> Path | None:
        """After a run's end, has it end with its best checkpoint: loads those weights, and later stages find them.

        -> that checkpoint, None where no step was both evaluated and saved.
        """
        best = state.get("best_step")
        if best is None:
            return None
        path = layout.folder(self.checkpoints, best)
        if best != state["step"]:
            agree(self.groups, lambda: self.groups.is_main and layout.verify(path), f"loading {path}")
            sharded.load(path / "sharded", chunks, None, self.groups)
        agree(self.groups, lambda: self.groups.is_main and layout.mark_best(self.checkpoints, best), f"marking {path}")
        return path

    def _layout(self) -> dict:
        """What decides which rank draws which random numbers."""
        p = self.cfg.parallel
        return {"world_size": self.groups.world_size, "tensor": p.tensor, "pipeline": p.pipeline,
                "virtual_pipeline": p.virtual_pipeline, "context": p.context, "expert": p.expert,
                "expert_tensor": p.expert_tensor or p.tensor, "sequence_parallel": p.sequence_parallel}

    def find_resume(self) -> Path | None:
        """The checkpoint that ``resume_from_checkpoint`` means, None for a fresh start.

        Raises ``UserError`` on all ranks when they see different ones: their ``output_dir`` is not one shared folder.
        """
        found: list[Path | None] = agree(self.groups, self._find_resume, "resuming")
        for rank, path in enumerate(found):
            if path != found[0]:
                raise UserError(f"rank {rank} finds {path or 'no checkpoint'}, rank 0 {found[0] or 'none'}",
                                where=str(self.checkpoints), fix="Put output_dir on a file system that all ranks share")
        return found[0]

    def _find_resume(self) -> Path | None:
        wanted = self.cfg.resume_from_checkpoint
        if wanted == "none":
            if layout.existing(self.checkpoints):
                raise UserError("holds checkpoints of an earlier run, which a fresh one would mix with its own",
                                where=str(self.checkpoints), fix="Choose another --output_dir, or resume")
            return None
        found = layout.latest(self.checkpoints) if wanted == "auto" else layout.find(wanted, newest=True)
        newer = [p for p in layout.existing(self.checkpoints) if found and layout.step_of(p) > layout.step_of(found)]
        if newer:  # the run would come to a step that exists, and its save be refused after the work is done
            raise UserError(f"is newer than {found}, from which the run would go on", where=str(newer[-1]),
                            fix="Resume from the newest, or move the newer ones away")
        return found

    def load(self, path: Path, chunks, optimizer) -> dict:
        """Restores weights, optimizer and random state from ``path``. -> the saved train state.

        The layout may be another than at saving; under the same one, random state too goes on where it was. Raises
        ``UserError`` for a damaged checkpoint, another model, tokenizer or ``train.optimizer``.
        """
        what = f"loading {path}"
        agree(self.groups, lambda: self.groups.is_main and layout.verify(path), what)
        check_model(path, self.cfg)
        record = read_state(path)
        adapters.check(path, record, self.cfg, self.base)
        for name, value in self.identity.items():
            if record.get(name) not in (None, value):
                raise UserError(f"is a checkpoint of another vocabulary: {name} {record[name]} (here {value})",
                                where=str(path), fix="Use data that was prepared with its tokenizer, "
                                f"{path / 'tokenizer'}, or choose another --output_dir for the new model")
        if record["version"] != _VERSION:
            raise UserError("was saved by another version of the engine, whose optimizer state this one cannot read",
                            where=str(path), fix="Resume it with the version that saved it; its weights load here")
        if record["optimizer"] is None:
            raise UserError("holds weights alone, without the optimizer's state of a run to go on with",
                            where=str(path), fix=f"Start from it with --init_from {path}, in another --output_dir")
        if record["optimizer"] != self.cfg.train.optimizer:
            raise UserError(f"was saved with train.optimizer {record['optimizer']} (here {self.cfg.train.optimizer}), "
                            "which keeps other state", where=str(path), fix="Set it as it was")
        sharded.load(path / "sharded", chunks, optimizer, self.groups)
        if all(record["parallel"].get(name) == size for name, size in self._layout().items()):
            rng.load(path, self.groups.rank)
        return record["train"]


def read_state(path: Path) -> dict:
    """The checkpoint's ``state.json``."""
    try:
        return json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read ({error})", where=str(path / "state.json"),
                        fix="Use another checkpoint") from error
