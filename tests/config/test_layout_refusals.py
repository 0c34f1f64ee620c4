"""Any layout: accepted, and then Megatron builds it; or one line with two fields and a layout that is accepted."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config import Config, fields
from engine.errors import UserError

PATHS = {leaf.path for leaf in fields.walk(Config)}
SIZES = (1, 1, 1, 2, 2, 3, 4, 5, 6, 8)


def sections(rng: random.Random) -> dict[str, Any]:
    """A model, batches and a layout; mistakes only between the layout and the rest."""
    heads, some = rng.choice((2, 4, 6, 8, 12)), rng.random
    model: dict[str, Any] = {
        "num_layers": rng.choice((2, 4, 6, 8, 12)), "num_attention_heads": heads, "hidden_size": 8 * heads,
        "num_query_groups": rng.choice([d for d in range(1, heads + 1) if heads % d == 0]),
        "ffn_hidden_size": rng.choice((32, 36, 48, 63, 64)), "seq_length": rng.choice((16, 24, 32, 48, 62)),
        "linear_bias": some() < 0.1, "vocab_size": 64, "vocab_multiple": 8,
    }
    if some() < 0.5:
        model["moe"] = {"num_experts": rng.choice((2, 4, 6, 8)), "ffn_hidden_size": rng.choice((16, 24, 30)),
                        "shared_ffn_hidden_size": rng.choice((None, 32, 20)) if not model["linear_bias"] else None,
                        "dispatcher": rng.choice(("alltoall", "allgather"))}
    micro = rng.choice((1, 2, 3))
    train: dict[str, Any] = {"micro_batch_size": micro, "global_batch_size": micro * rng.choice((1, 4, 6, 8, 24)),
                             "optimizer": rng.choice(("adamw", "muon")), "precision": rng.choice(("fp32", "bf16")),
                             "recompute": rng.choice(("none", "selective", "full"))}
    if some() < 0.2 and train["global_batch_size"] % (2 * micro) == 0:
        train["batch_size_schedule"] = {"start": train["global_batch_size"] // 2, "every_steps": 2}
    if some() < 0.2:
        train["seq_length_schedule"] = [{"step": 0, "seq_length": rng.choice((8, 12, 16))}]
    names = ("tensor", "pipeline", "context", "virtual_pipeline")
    parallel: dict[str, Any] = {name: rng.choice(SIZES) for name in names}
    parallel |= {"sequence_parallel": some() < 0.5, "distributed_optimizer": some() < 0.5}
    if model.get("moe") or some() < 0.05:
        parallel |= {"expert": rng.choice(SIZES), "expert_tensor": rng.choice((None, None, 1, 2, 3))}
    return {"device": "cpu", "model": model, "train": train, "parallel": parallel}


def suggested(line: str) -> dict[str, Any]:
    """The layout in the line's way out."""
    words = {"true": True, "false": False, "null": None}
    found = re.findall(r"([a-z_]+\.[a-z_]+) (\d+|true|false|null)", line.partition("The nearest layout that works:")[2])
    return {name: words[value] if value in words else int(value) for name, value in found}


def named(line: str) -> set[str]:
    """The fields that are said to be in conflict."""
    found = re.findall(r"[a-z_]+(?:\.[a-z0-9_]+)+", line.partition("The nearest")[0])
    return {path for path in found if path in PATHS or path.startswith("train.seq_length_schedule.")}


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 10**9))
def test_accepted_or_refused_with_two_fields_and_a_way_out(seed):
    accepted(mended(sections(random.Random(seed))))


def mended(data: dict[str, Any]) -> Config:
    """The configuration, or where it is refused, the one that the refusal proposes."""
    try:
        return Config(**data)
    except UserError as error:
        line = str(error)
    assert line.isprintable()
    assert len(named(line)) >= 2, line
    changes = suggested(line)
    assert changes, line
    for path, value in changes.items():
        section, name = path.split(".")
        assert data[section].get(name, "default") != value, line
        data[section][name] = value
    return Config(**data)


def accepted(cfg: Config) -> None:
    """The layout divides what Megatron divides, and there are worlds for it; others are refused with one that fits."""
    from engine.model.config import build

    settings_ = build(cfg, 64, torch.float32)  # Megatron's own __post_init__
    assert settings_.pipeline_model_parallel_size == cfg.parallel.pipeline
    smallest = cfg.smallest_world()
    for world in (smallest, 7, 3 * smallest):
        try:
            cfg.data_parallel_size(world)
        except UserError as error:
            line = str(error)
            starts = re.search(r"[Ss]tart (\d+)(?: or (\d+))? ranks", line)
            assert starts, line
            for ranks in filter(None, starts.groups()):
                cfg.data_parallel_size(int(ranks))
            for path, value in re.findall(r"use ((?:parallel|train)\.[a-z_]+) (\d+|true|false|null)", line):
                if line.startswith("parallel: "):
                    cfg.with_values(_all_of(line)).data_parallel_size(world)
                else:
                    cfg.with_values({path: int(value)}).data_parallel_size(world)


def _all_of(line: str) -> dict[str, Any]:
    return suggested("The nearest layout that works:" + line.partition("or use")[2])


@pytest.fixture
def fake_world(monkeypatch):
    """``fake_world(n)``: this process as rank n - 1 of n, whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from engine.parallel import topology

    def start(world: int) -> None:
        topology.shutdown()
        monkeypatch.setenv("WORLD_SIZE", str(world))
        dist.init_process_group("fake", rank=world - 1, world_size=world, store=FakeStore())

    yield start
    topology.shutdown()


def test_accepted_layouts_build(fake_world, monkeypatch):
    """Groups, model, wrappers and optimizer of the last of many ranks, as a driver builds them."""
    from engine.model import build
    from engine.parallel import topology, wrap
    from engine.train import optimizer

    monkeypatch.setattr("engine.launch.adopt", lambda: None)
    built = set()
    for seed in range(400):
        cfg = mended(sections(random.Random(seed)))
        sizes = tuple(min(getattr(cfg.parallel, name), 2) for name in ("tensor", "context", "pipeline", "expert"))
        layout = (*sizes, cfg.model.moe is not None, cfg.train.optimizer)
        if layout in built or len(built) == 24:
            continue
        built.add(layout)
        fake_world(cfg.smallest_world())
        groups = topology.build(cfg)
        chunks = wrap.apply(build.model(cfg, groups, 64), cfg, groups)
        assert len(chunks) == cfg.parallel.virtual_pipeline
        assert optimizer.build(chunks, cfg, groups).param_groups is not None
    assert len(built) == 24
    assert {True, False} == {layout[4] for layout in built}
    assert all({1, 2} == {layout[i] for layout in built} for i in range(4))
