"""A tiny prepared corpus, tiny models on it, and processes that run them together: what the engine's tests share.

Imported by tests and by the workers they start (tests/conftest.py puts this folder on sys.path).
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.config import Config
from engine.config.prepare import PrepareConfig

warnings.filterwarnings("ignore", module=r"megatron\.")

VOCAB, SEQ = 300, 16
HERE = Path(__file__).parent
_WORDS = ("the", "spring", "stores", "what", "the", "hand", "gives", "and", "the", "train", "of", "wheels", "spends")


def write_corpus(folder: Path, vocab_size: int = VOCAB) -> Path:
    """A prepared directory of 120 short, repetitive documents; a tenth of them held out."""
    from engine.data.prepare import prepare

    raw = folder / "raw"
    raw.mkdir(parents=True)
    for i in range(120):
        words = [_WORDS[(i * k + k * k // 3) % len(_WORDS)] for k in range(1, 40 + i % 13)]
        (raw / f"{i}.txt").write_text(" ".join(words) + f". Number {i}.\n", encoding="utf-8")
    prepare(PrepareConfig(input=[raw], output=folder / "data", vocab_size=vocab_size, validation_fraction=0.1))
    return folder / "data"


def config(data: Path, output: Path, **changes: Any) -> Config:
    """Two layers of 32 features in fp32; ``changes`` by dotted path with ``__`` for the dot: ``train__lr=0.1``."""
    base = {
        "output_dir": output,
        "device": "cpu",
        "data": {"path": data, "num_workers": 0},
        "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2,
                  "ffn_hidden_size": 64, "seq_length": SEQ, "init_std": 0.08},
        "train": {"max_steps": 8, "global_batch_size": 4, "micro_batch_size": 1, "lr": 5e-3, "precision": "fp32",
                  "schedule": "constant"},
        "checkpoint": {"save_steps": 0},
        "evaluation": {"eval_steps": 0},
        "logging": {"logging_steps": 1, "tensorboard": False, "progress": "off"},
    }
    cfg = Config(**base)
    return cfg.with_values({name.replace("__", "."): value for name, value in changes.items()}) if changes else cfg


def from_json(text: str) -> Config:
    return Config(**json.loads(text))


def to_json(cfg: Config) -> str:
    return json.dumps(cfg.model_dump(mode="json", exclude_unset=True))


class MaskedLoader:
    """A loader whose loss masks leave out other tokens of every sequence, as its own tokens say."""

    def __init__(self, inner):
        self.inner = inner

    def micro_batches(self, *args, **kwargs):
        for batch in self.inner.micro_batches(*args, **kwargs):
            batch = copy.copy(batch)
            place_s = torch.arange(batch.tokens_bs.shape[1])
            keep_bs = (batch.tokens_bs.sum(1, keepdim=True) + place_s) % 3 != 0
            batch.loss_mask_bs = (keep_bs & (place_s >= batch.tokens_bs[:, :1] % 12)).float()
            yield batch


@dataclass
class Run:
    """A wrapped model with everything that trains it, built as the drivers do."""

    cfg: Config
    groups: Any
    data: Any
    chunks: list[Any]
    optimizer: Any
    state: Any

    def step(self):
        from engine.train import step

        return step.run(self.cfg, self.chunks, self.optimizer, self.data, self.groups, self.state)

    def checkpointer(self, **changes):
        from engine.checkpoint.manager import Checkpointer

        folder = self.cfg.data.path / "tokenizer"
        identity = {"tokenizer": folder, "tokenizer_sha256": "the tokenizer", "vocab_size": VOCAB}
        return Checkpointer(self.cfg, self.groups, **identity | changes)

    def save(self) -> Path:
        return self.checkpointer().save(self.chunks, self.optimizer, self.state.to_dict())

    def load(self, path: Path) -> None:
        from engine.train.state import TrainState

        self.state = TrainState.from_dict(self.checkpointer().load(path, self.chunks, self.optimizer))


def start(cfg: Config, *, masked: bool = False) -> Run:
    """Groups, model, optimizer and data of a run, before its first step."""
    from engine.data import loader
    from engine.model import build
    from engine.parallel import topology, wrap
    from engine.train import optimizer, step
    from engine.train.state import TrainState

    groups = topology.build(cfg)
    data = loader.build(cfg, "train", dp_rank=groups.data_parallel_rank, dp_size=groups.data_parallel_size)
    chunks = wrap.apply(build.model(cfg, groups, VOCAB), cfg, groups)
    update = optimizer.build(chunks, cfg, groups)
    step.prepare(chunks, cfg, groups)
    return Run(cfg, groups, MaskedLoader(data) if masked else data, chunks, update, TrainState())


def whole_weights(run: Run, value: Any = lambda p: p) -> dict[str, torch.Tensor]:
    """The unsplit model (or ``value(parameter)`` of it), on every rank; a tied copy is checked and left out."""
    import torch.distributed as dist

    from engine.model import whole
    from engine.parallel.wrap import gather_parameters

    gather_parameters(run.chunks)
    gathered: list = [None] * run.groups.world_size
    dist.all_gather_object(gathered, whole.parts(run.chunks, value))
    found = whole.assemble(gathered, VOCAB)
    if run.cfg.model.tie_embeddings and "output_layer.weight" in found:
        copy_vh = found.pop("output_layer.weight")
        assert torch.equal(copy_vh, found["embedding.word_embeddings.weight"]), "the tied copies differ"
    return found


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(script: Path, world: int, *args: object, timeout: float = 240) -> list[tuple[int, str]]:
    """Runs ``script`` as ``world`` ranks as torchrun would. -> (exit code, output) of each; none outlives the call.

    One interpreter imports what ranks need and forks them (fork_ranks.py): imports are 4 s of processor time a rank.
    """
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1",
                                "WORLD_SIZE": str(world), "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    with tempfile.TemporaryDirectory() as outputs:
        command = [sys.executable, str(HERE / "fork_ranks.py"), outputs, str(script), *map(str, args)]
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        try:
            process.wait(timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return [(int((Path(outputs) / f"{r}.code").read_text()), (Path(outputs) / f"{r}.out").read_text())
                for r in range(world)]


def forget_layout() -> None:
    """Destroys Megatron's groups, so that the same processes can build another layout."""
    from engine.parallel import topology

    topology.forget()


def unwrapped(run: Run) -> Any:
    """The bare model of a run with a single chunk."""
    from engine.parallel.wrap import unwrap

    return unwrap(run.chunks[0])


def optimizer_state(run: Run) -> list[dict]:
    """Every inner optimizer's state, copied: moments, steps, and the fp32 weights that the optimizer holds."""
    found = []
    for inner in run.optimizer.chained_optimizers:
        state = inner.optimizer.state_dict()
        moments = {k: {name: torch.as_tensor(t).clone() for name, t in v.items()} for k, v in state["state"].items()}
        groups = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in state["param_groups"]]
        weights = [p.detach().clone() for group in inner.optimizer.param_groups for p in group["params"]]
        found.append({"moments": moments, "groups": groups, "weights": weights})
    return found


def assert_same_state(found: list[dict], expected: list[dict]) -> None:
    """Bit for bit."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one["groups"] == other["groups"]
        assert one["moments"].keys() == other["moments"].keys()
        assert one["moments"], "there is no state to compare"
        for key, moments in one["moments"].items():
            assert moments.keys() == other["moments"][key].keys()
            for name, value in moments.items():
                assert torch.equal(value, other["moments"][key][name]), (key, name)
        for a, b in zip(one["weights"], other["weights"], strict=True):
            assert torch.equal(a, b)


@contextlib.contextmanager
def full_disk(monkeypatch, name: str):
    """Within, opening a file of this name (with or without .tmp) for writing fails as on a full disk. -> those hit."""
    import builtins
    import errno
    import io
    import shutil

    hit: list[str] = []

    def check(file, mode: str) -> None:
        if not isinstance(file, (str, os.PathLike)):
            return
        if set(mode) & set("wax+") and Path(os.fspath(file)).name in (name, f"{name}.tmp"):
            hit.append(str(file))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))

    def failing_open(file, mode="r", *args, **kwargs):
        check(file, mode)
        return original(file, mode, *args, **kwargs)

    def failing_save(data, path, *args, **kwargs):
        check(path, "w")  # torch.save opens in C++, and reports RuntimeError
        return save(data, path, *args, **kwargs)

    def failing_copy(source, target, *args, **kwargs):
        check(target, "w")
        return copy_file(source, target, *args, **kwargs)

    original, save, copy_file = io.open, torch.save, shutil.copy2
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", failing_open)
        patch.setattr(io, "open", failing_open)
        from megatron.core.dist_checkpointing.strategies import common

        patch.setattr(common.torch, "save", _as_torch_fails(failing_save))  # Megatron's view of torch, on a CPU
        patch.setattr(shutil, "copytree", _copying_with(failing_copy, shutil.copytree))
        yield hit


def _as_torch_fails(save):
    def failing(*args, **kwargs):
        try:
            return save(*args, **kwargs)
        except OSError as error:
            raise RuntimeError(f"[enforce fail at inline_container.cc:672] . {error}") from None

    return failing


def _copying_with(copy_function, copytree):
    def failing(source, target, **kwargs):
        return copytree(source, target, copy_function=copy_function, **kwargs)

    return failing
