"""Every layout that is proven: the cases behind docs/layouts.md and tests/verification/test_table.py.

Models are tiny (four layers of 32 features, a vocabulary that needs padding, twice as many query heads as groups), so
that all of them take minutes on two cores; what a layout can break does not depend on size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from engine.config import Config
from engine.config.verify import TOLERANCES
from engine.verification.jobs import Case, case, fit

Changes = dict[str, Any]

DENSE: Changes = {
    "model.num_layers": 4, "model.hidden_size": 32, "model.num_attention_heads": 4, "model.num_query_groups": 2,
    "model.head_dim": 8, "model.ffn_hidden_size": 48, "model.seq_length": 16, "model.vocab_size": 250,
    "model.vocab_multiple": 16, "model.init_std": 0.15, "train.global_batch_size": 8, "train.micro_batch_size": 1,
    "train.lr": 5e-3, "train.clip_grad": 0.5,
}
UNTIED: Changes = {"model.tie_embeddings": False}
MOE: Changes = {
    **UNTIED, "model.moe.num_experts": 8, "model.moe.top_k": 2, "model.moe.ffn_hidden_size": 24,
    "model.moe.shared_ffn_hidden_size": 40, "model.moe.num_dense_layers": 1, "model.moe.aux_loss_coeff": 0.05,
    "model.moe.z_loss_coeff": 0.01,
}
SIGMOID: Changes = {**MOE, "model.moe.router": "sigmoid", "model.moe.expert_bias": True}
# GPT-OSS's shape: windows in every second layer, sinks, biases everywhere, YaRN, the clamped gate.
GPT_OSS: Changes = {
    **MOE, "model.moe.shared_ffn_hidden_size": None, "model.moe.num_dense_layers": 0, "model.linear_bias": True,
    "model.activation": "clamped_swiglu", "model.window_size": 6, "model.full_attention_every": 2,
    "model.attention_sinks": True, "model.yarn.factor": 4.0, "model.yarn.original_seq_length": 8,
}
MUON: Changes = {"train.optimizer": "muon"}
RAMP: Changes = {
    "train.global_batch_size": 16, "train.batch_size_schedule": {"kind": "doubling", "start": 4, "every_steps": 1},
    "train.seq_length_schedule": [{"step": 0, "seq_length": 8}, {"step": 2, "seq_length": 16}],
}


def _parallel(**sizes: Any) -> Changes:
    return {f"parallel.{name}": size for name, size in sizes.items()}


TP2 = _parallel(tensor=2)
TP2_SP = _parallel(tensor=2, sequence_parallel=True)
PP2 = _parallel(pipeline=2)
CP2 = _parallel(context=2)
EP2 = _parallel(expert=2)
DISTRIBUTED = _parallel(distributed_optimizer=True)

DENSE_LAYOUTS: dict[str, tuple[int, Changes]] = {
    "TP2": (2, TP2),
    "TP2+SP": (2, TP2_SP),
    "TP4+SP": (4, _parallel(tensor=4, sequence_parallel=True)),
    "PP2": (2, PP2),
    "PP4": (4, _parallel(pipeline=4)),
    "PP2, 2 chunks a rank": (2, _parallel(pipeline=2, virtual_pipeline=2)),
    "CP2": (2, CP2),
    "CP4": (4, _parallel(context=4)),
    "DP2": (2, {}),
    "DP4, distributed optimizer": (4, DISTRIBUTED),
}
PRODUCTS: dict[str, tuple[int, Changes]] = {
    "TP2 x PP2": (4, TP2 | PP2),
    "TP2+SP x CP2": (4, TP2_SP | CP2),
    "CP2 x PP2": (4, CP2 | PP2),
    "DP2 x TP2": (4, TP2),
    "DP2 x PP2, distributed optimizer": (4, PP2 | DISTRIBUTED),
}
# Experts are shared by data-parallel ranks, and by tensor ranks where expert_tensor is below tensor.
EXPERT_LAYOUTS: dict[str, tuple[int, Changes]] = {
    "EP2": (2, EP2),
    "EP4": (4, _parallel(expert=4)),
    "EP2 x TP2+SP, experts whole": (4, EP2 | TP2_SP | _parallel(expert_tensor=1)),
    "EP2 x TP2+SP, expert TP2": (4, EP2 | TP2_SP),
    "EP2, expert TP2, TP1": (4, EP2 | _parallel(expert_tensor=2)),
    "EP2 x PP2": (4, EP2 | PP2),
}
MUON_LAYOUTS: dict[str, tuple[int, Changes, tuple[str, ...]]] = {
    "TP2": (2, TP2, ("dense",)),  # a mixture of experts needs sequence parallelism
    "TP2+SP": (2, TP2_SP, ("dense", "MoE")),
    "PP2": (2, PP2, ("dense", "MoE")),
    "DP2": (2, {}, ("dense", "MoE")),
    "DP2, distributed optimizer": (2, DISTRIBUTED, ("dense", "MoE")),
    "EP2": (2, EP2, ("MoE",)),
}
VARIANTS: dict[str, tuple[int, Changes, Changes, str]] = {  # ranks, layout, model and training, words
    "overlapped reductions": (2, DISTRIBUTED | _parallel(overlap_grad_reduce=True), {}, "DP2, distributed optimizer"),
    "one group": (2, TP2_SP, {"model.num_query_groups": 1}, "TP2+SP, fewer groups than ranks"),
    "biases": (2, TP2_SP, {"model.attention_bias": True}, "TP2+SP"),
    "biases ": (2, PP2, {"model.attention_bias": True}, "PP2"),
    "norms of heads": (2, TP2, {"model.qk_norm": True, **UNTIED, "train.clip_grad": 0.0}, "TP2"),
    "norms of heads ": (2, TP2_SP, {"model.qk_norm": True, "train.clip_grad": 0.0}, "TP2+SP"),
    "curriculum and ramp": (2, TP2_SP, RAMP, "TP2+SP"),
    "curriculum and ramp ": (4, PP2 | DISTRIBUTED, RAMP, "DP2 x PP2, distributed optimizer"),
    "curriculum and ramp  ": (2, CP2, RAMP, "CP2"),
    "recompute full": (2, TP2_SP, {"train.recompute": "full"}, "TP2+SP"),
    "recompute full ": (2, PP2, {"train.recompute": "full"}, "PP2"),
    "recompute full, MoE": (2, EP2, {**MOE, "train.recompute": "full"}, "EP2"),
    "recompute selective": (2, TP2_SP, {"train.recompute": "selective"}, "TP2+SP"),
    "recompute selective ": (2, CP2, {"train.recompute": "selective"}, "CP2"),
    "sigmoid router with bias": (2, EP2, SIGMOID, "EP2"),
    "sigmoid router with bias ": (2, PP2, SIGMOID, "PP2"),
    "GPT-OSS shape": (2, EP2, GPT_OSS, "EP2"),
    "GPT-OSS shape ": (2, CP2, GPT_OSS, "CP2"),
    "GPT-OSS shape  ": (2, TP2_SP | _parallel(expert_tensor=1), GPT_OSS, "TP2+SP, experts whole"),
}


@dataclass(frozen=True)
class Row:
    """A line of the table: one layout of one model. ``reference``: in what one rank differs beside the layout."""

    section: str
    layout: str
    model: str
    ranks: int
    changes: Changes
    reference: Changes = field(default_factory=dict)
    precision: str = "fp32"
    loss_tolerance: float | None = None
    packed: bool = False

    @property
    def name(self) -> str:
        return f"{self.section}: {self.layout.strip()}, {self.model.strip()}"

    def case(self, *, short: bool = False) -> Case:
        """The row as a case; ``short`` for tests, with half the batch. Raises ``UserError`` for a layout that cannot
        run."""
        half = {"train.global_batch_size": 4} if short and self.section != "Batch split" else {}
        cfg = Config().with_values(DENSE | half | self.changes)
        settled, ranks = fit(cfg, precision=self.precision, ranks=self.ranks)
        return case(self.name, settled, ranks, tolerance=TOLERANCES[self.precision], reference=self.reference,
                    loss_tolerance=self.loss_tolerance, packed=self.packed)


def rows() -> Iterator[Row]:
    """Every row, section by section."""
    for kind, model in (("tied", {}), ("untied", UNTIED)):
        for name, (ranks, changes) in DENSE_LAYOUTS.items():
            yield Row("Dense", name, kind, ranks, changes | model)
    for name, (ranks, changes) in PRODUCTS.items():
        yield Row("Products", name, "tied", ranks, changes)
    for dispatcher in ("alltoall", "allgather"):
        for name, (ranks, changes) in EXPERT_LAYOUTS.items():
            yield Row("Experts", name, dispatcher, ranks, MOE | changes | {"model.moe.dispatcher": dispatcher})
    for name, (ranks, changes, kinds) in MUON_LAYOUTS.items():
        for kind in kinds:
            yield Row("Muon", name, kind, ranks, MUON | changes | (MOE if kind == "MoE" else {}))
    yield from _variants()
    yield from _splits()


def _variants() -> Iterator[Row]:
    for what, (ranks, changes, model, layout) in VARIANTS.items():
        plain = {"train.recompute": "none"} if "train.recompute" in model else {}
        yield Row("Variants", layout, what, ranks, model | changes, plain)
    for layout, (ranks, changes) in {"CP2": (2, CP2), "TP2+SP x CP2": (4, TP2_SP | CP2), "DP2": (2, {})}.items():
        yield Row("Variants", layout, "packed sequences", ranks, changes, packed=True)
    for layout in ("TP2+SP", "PP2", "CP2", "DP4, distributed optimizer"):
        ranks, changes = DENSE_LAYOUTS[layout]
        yield Row("bf16", layout, "tied", ranks, changes, precision="bf16")
    yield Row("bf16", "EP2", "MoE", 2, MOE | EP2, precision="bf16")


def _splits() -> Iterator[Row]:
    """One global batch of 8 sequences, split in every way; one rank takes them one by one."""
    one_by_one = {"train.micro_batch_size": 1}
    for kind, model in (("dense", {}), ("MoE", MOE)):
        for ranks in (1, 2, 4):
            for micro in (1, 2, 4, 8):
                if micro * ranks <= 8 and micro * ranks > 1:
                    split = f"micro-batch {micro} x accumulation {8 // (micro * ranks)} x DP{ranks}"
                    yield Row("Batch split", split, kind, ranks, model | {"train.micro_batch_size": micro}, one_by_one,
                              loss_tolerance=1e-6)
