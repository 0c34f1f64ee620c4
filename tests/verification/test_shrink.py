"""--shrink keeps what makes a model what it is, and still divides as the layout wants."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from engine.config import Config, load_config, parameter_count
from engine.errors import UserError
from engine.verification import jobs
from engine.verification.layouts import GPT_OSS, MOE, RAMP

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs" / "pretrain").glob("*.yaml"))
LAYOUTS = [dict(zip(("tensor", "pipeline", "virtual_pipeline", "context", "sequence_parallel"), sizes, strict=True))
           for sizes in itertools.product((1, 2, 4), (1, 2), (1, 2), (1, 2), (False, True))
           if not (sizes[4] and sizes[0] == 1) and not (sizes[2] > 1 and sizes[1] == 1)]
MODELS = {
    "one group": {"model.num_attention_heads": 64, "model.num_query_groups": 1, "model.head_dim": 64},
    "a quarter rotates": {"model.rotary_percent": 0.1, "model.head_dim": 128},
    "experts": {**MOE, "model.num_layers": 8, "model.moe.num_experts": 128, "model.moe.top_k": 8},
    "GPT-OSS": {**GPT_OSS, "model.num_layers": 8, "model.moe.num_experts": 32, "model.moe.top_k": 4,
                "model.yarn.original_seq_length": 128},
    "curriculum": {**RAMP, "train.global_batch_size": 64},
    "ramp": {"train.global_batch_size": 96, "train.batch_size_schedule": {"kind": "ramp", "start": 32, "increment": 32,
                                                                          "every_steps": 100}},
}


def configurations() -> list[tuple[str, Config]]:
    found = [(path.stem, load_config(path)) for path in CONFIGS]
    base = {"model.num_layers": 8, "model.hidden_size": 512, "model.num_attention_heads": 16,
            "model.num_query_groups": 8, "model.seq_length": 512, "model.vocab_size": 50304,
            "train.global_batch_size": 64}
    return found + [(name, Config().with_values(base | changes)) for name, changes in MODELS.items()]


@pytest.mark.parametrize(("name", "cfg"), configurations(), ids=[name for name, _ in configurations()])
def test_a_shrunk_model_is_of_the_same_kind_under_every_layout(name, cfg):
    ran = 0
    for layout, double in itertools.product(LAYOUTS, (1, 2)):
        try:
            whole = {"parallel.expert_tensor": 1} if cfg.model.linear_bias else {}  # experts with biases
            wanted = cfg.with_values({"parallel.expert": 1, "parallel.distributed_optimizer": False} | whole | {
                f"parallel.{field}": size for field, size in layout.items()})
        except UserError:
            continue  # the model itself cannot be split so
        small, ranks = jobs.fit(wanted, shrink=True, ranks=double * jobs.fewest_ranks(wanted))
        assert_alike(small, wanted)
        jobs.case("layout", small, ranks, tolerance=1e-5)
        ran += 1
    assert ran >= 20


def assert_alike(small: Config, cfg: Config) -> None:
    a, b = small.model, cfg.model
    assert small.parallel == cfg.parallel
    assert parameter_count(a) < 1_000_000
    assert a.num_layers <= 16
    for field in ("tie_embeddings", "qk_norm", "attention_bias", "linear_bias", "attention_sinks", "activation",
                  "rotary_base", "rotary_percent", "norm_eps", "yarn", "llama3_rope"):
        assert getattr(a, field) == getattr(b, field), field
    tensor, groups = cfg.parallel.tensor, b.num_query_groups or 0
    assert (a.num_attention_heads == a.num_query_groups) == (b.num_attention_heads == groups)
    assert ((a.num_query_groups or 0) < tensor) == (groups < tensor)
    if b.num_attention_heads // groups <= 8:
        assert a.num_attention_heads * groups == b.num_attention_heads * (a.num_query_groups or 0)
    assert (a.window_size is None) == (b.window_size is None)
    assert a.window_size is None or a.window_size < a.seq_length
    assert (a.full_attention_every is None) == (b.full_attention_every is None)
    assert a.full_attention_every is None or a.full_attention_every <= a.num_layers
    assert (a.moe is None) == (b.moe is None)
    if a.moe is not None and b.moe is not None:
        assert a.moe.top_k < a.moe.num_experts
        assert (a.moe.num_dense_layers > 0) == (b.moe.num_dense_layers > 0)
        assert (a.moe.shared_ffn_hidden_size is None) == (b.moe.shared_ffn_hidden_size is None)
        for field in ("router", "expert_bias", "aux_loss_coeff", "z_loss_coeff", "dispatcher"):
            assert getattr(a.moe, field) == getattr(b.moe, field)
    t = small.train
    if cfg.train.batch_size_schedule:
        assert len({t.batch_size_at(step) for step in range(jobs.STEPS)}) == jobs.STEPS
    if len(cfg.train.seq_length_schedule) > 1:
        lengths = {t.seq_length_at(step, a.seq_length) for step in range(jobs.STEPS)}
        assert len(lengths) == min(jobs.STEPS, len(cfg.train.seq_length_schedule))


@pytest.mark.parametrize(
    ("changes", "ranks"),
    [
        ({}, 2),
        ({"parallel.tensor": 2}, 2),
        ({"parallel.tensor": 2, "parallel.distributed_optimizer": True}, 4),
        ({"parallel.distributed_optimizer": True}, 2),
        ({"parallel.pipeline": 2, "parallel.context": 2}, 4),
        ({**MOE, "parallel.expert": 4}, 4),
        ({**MOE, "parallel.expert": 2, "parallel.tensor": 2, "parallel.sequence_parallel": True}, 4),
        ({**MOE, "parallel.expert": 2, "parallel.tensor": 2, "parallel.sequence_parallel": True,
          "parallel.expert_tensor": 1}, 2),
        ({**MOE, "parallel.expert": 2, "parallel.distributed_optimizer": True}, 2),
    ],
)
def test_the_fewest_ranks_that_use_the_layout(changes, ranks):
    assert jobs.fewest_ranks(Config().with_values(changes)) == ranks


def test_what_would_differ_for_a_reason_is_off_on_both_sides_and_said():
    cfg = Config().with_values({"model.dropout": 0.1, "train.precision": "bf16", "train.schedule": "cosine",
                                "train.warmup_steps": 10, "train.lr": 0.01, "model.vocab_size": None})
    small, ranks = jobs.fit(cfg)
    assert (small.model.dropout, small.train.precision, small.device, ranks) == (0.0, "fp32", "cpu", 2)
    assert (small.train.schedule, small.train.warmup_steps, small.train.eps) == ("constant", 0, jobs.LEAST_EPS)
    said = "\n".join(jobs.notes(small, cfg))
    for words in ("learning rate 0.01 throughout", "train.eps 1e-05 for 1e-08", "model.dropout 0 for 0.1",
                  "4096 words"):
        assert words in said
