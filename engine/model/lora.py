"""LoRA: low-rank adapters beside frozen linear layers, under every layout (Hu et al., 2021, arXiv:2106.09685).

    y = W x + scale * B A x,    scale = alpha / rank, or alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732)

Every matrix that Hugging Face knows has factors of its own, A [r, in] and B [out, r]: queries, keys and values apart
although Megatron fuses them, gate and up apart. The parts of a fused layer are applied together: their A above one
another, their B in the blocks of a matrix [out, parts * r] that is zero elsewhere.

How tensor parallelism splits them (``Adapter.__init__``), so that only [s, b, r] travels:

    column-parallel   A whole, B by rows. The gradient of A x is summed over ranks; under sequence parallelism A x is
                      gathered, and Megatron sums A's gradient, each rank having seen its own tokens.
    row-parallel      A by columns, B whole. A x is summed; under sequence parallelism scattered as well, and Megatron
                      sums B's gradient.
    experts           the dispatcher communicates inputs and outputs, so every factor is split: engine/model/
                      lora_experts.py.

s sequence, b batch, r rank, R parts * r; widths are this rank's share where they are parallel.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from engine.config import Config
from engine.config.stages import LoraConfig
from engine.errors import UserError
from engine.model.init import generator
from engine.model.whole import global_names, is_expert, split_of
from engine.parallel.topology import Groups
from engine.parallel.wrap import unwrap

_FACTOR = re.compile(r"^(.*)\.adapter\.(\w+)_([ab])$")


def is_adapter(name: str) -> bool:
    """Whether a parameter's or a checkpoint's key is an adapter's."""
    return ".adapter." in name


def factor(name: str) -> tuple[str, str, str]:
    """An adapter's parameter -> (the linear layer, Hugging Face's name of the module, "a" or "b")."""
    match = _FACTOR.match(name)
    assert match, name
    layer, module, which = match.groups()
    return layer, f"experts.{module}" if is_expert(name) else module, which


def scale_of(lora: LoraConfig) -> float:
    return lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)


class Adapter(torch.nn.Module):
    """The factors of one linear layer; called with its input and output, it returns the output with theirs added.

    ``rows``: what the layer's output holds of each part in each of ``groups`` groups (a fused QKV projection has the
    queries, keys and values of one key-value group after another); ``chosen``: the parts that have factors.
    """

    def __init__(self, linear: Any, rows: dict[str, int], chosen: list[str], groups: int, lora: LoraConfig, *,
                 column: bool, pg: Any):
        super().__init__()
        self.rows, self.chosen, self.groups, self.column, self.expert = rows, chosen, groups, column, linear.is_expert
        self.scale, self.dropout = scale_of(lora), lora.dropout
        self.tp_group = pg.expt_tp if linear.is_expert else pg.tp
        size = self.tp_group.size()
        self.sequence_parallel = not self.expert and size > 1 and linear.config.sequence_parallel
        # The rows of a rank that holds less than a group are of two parts, or of a piece of one: B is whole there.
        self.ragged = column and sum(rows.values()) * groups != linear.weight.shape[0]
        rank_here = lora.rank // size if self.expert else lora.rank
        m, k = linear.weight.shape
        for part in chosen:
            a = self._add(f"{part}_a", linear, rank_here if column else lora.rank, k)
            b = self._add(f"{part}_b", linear, rows[part] * groups if column else m, lora.rank if column else rank_here)
            if self.expert:
                # All are split, so that each is counted in the gradient's norm on the ranks that hold it.
                tensor_parallel.set_tensor_model_parallel_attributes(a, True, 0 if column else 1, 1)
                tensor_parallel.set_tensor_model_parallel_attributes(b, True, 0 if column else 1, 2 if column else 1)
                a.allreduce = b.allreduce = False
                continue
            split, whole = (b, a) if column else (a, b)
            tensor_parallel.set_tensor_model_parallel_attributes(split, not self.ragged, 0 if column else 1, 1)
            whole.sequence_parallel = self.sequence_parallel

    def _add(self, name: str, linear: Any, *shape: int) -> Any:
        parameter: Any = torch.nn.Parameter(
            torch.zeros(*shape, dtype=linear.config.params_dtype, device=linear.weight.device))
        self.register_parameter(name, parameter)
        return parameter

    def factors(self, part: str) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
        return self.get_parameter(f"{part}_a"), self.get_parameter(f"{part}_b")

    def all_a(self) -> torch.Tensor:
        """[R, in]: the parts' A above one another."""
        parts: list[torch.Tensor] = [self.factors(part)[0] for part in self.chosen]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def all_b(self) -> torch.Tensor:
        """[out, R]: the parts' B in the rows that are theirs, zero elsewhere."""
        if len(self.rows) == 1:
            return self.factors(self.chosen[0])[1]
        r, width, blocks = self.factors(self.chosen[0])[1].shape[1], 0, []
        for part, rows in self.rows.items():
            if part not in self.chosen:
                blank = self.factors(self.chosen[0])[1].new_zeros(self.groups, rows, r * len(self.chosen))
                blocks.append(blank)
                continue
            b = self.factors(part)[1]
            if self.ragged:  # each rank's rows give a part of the gradient
                b = copy_to_tensor_model_parallel_region(b, group=self.tp_group)
            after = r * (len(self.chosen) - 1) - width
            blocks.append(torch.nn.functional.pad(b.unflatten(0, (self.groups, rows)), (width, after)))
            width += r
        fused = torch.cat(blocks, dim=1).flatten(0, 1)
        return fused.chunk(self.tp_group.size())[self.tp_group.rank()] if self.ragged else fused

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        if self.dropout == 0.0 or not self.training:
            return x
        if self.column and not self.sequence_parallel:  # tensor ranks hold the same inputs: the same mask
            return torch.nn.functional.dropout(x, self.dropout)
        tracker: Any = tensor_parallel.get_cuda_rng_tracker()  # None only before the process groups exist
        with tracker.fork():
            return torch.nn.functional.dropout(x, self.dropout)

    def _shared(self, z_sbr: torch.Tensor) -> torch.Tensor:
        """A x of this rank -> that of the tokens that the output has, over all ranks' features."""
        if self.tp_group.size() == 1:
            return z_sbr
        if not self.column:
            reduce = (reduce_scatter_to_sequence_parallel_region if self.sequence_parallel
                      else reduce_from_tensor_model_parallel_region)
            return reduce(z_sbr, group=self.tp_group)
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(z_sbr, tensor_parallel_output_grad=True, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(z_sbr, group=self.tp_group)

    def forward(self, x_sbk: torch.Tensor, y_sbm: torch.Tensor) -> torch.Tensor:
        assert not self.expert, "experts' adapters: engine/model/lora_experts.py"
        z_sbr: Any = self._shared(torch.nn.functional.linear(self._dropped(x_sbk), self.all_a()) * self.scale)
        # One pass over the output, which nothing keeps for the backward pass.
        return torch.addmm(y_sbm.flatten(0, -2), z_sbr.flatten(0, -2), self.all_b().t()).view_as(y_sbm)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> Any:
        """Megatron's protocol: every factor with its place in the unsplit one."""
        own: dict[str, Any] = dict(self.named_parameters())
        axes = {name: p.partition_dim for name, p in own.items() if getattr(p, "tensor_model_parallel", False)}
        state = make_sharded_tensors_for_checkpoint(own, prefix, axes, sharded_offsets, tp_group=self.tp_group,
                                                    dp_cp_group=metadata["dp_cp_group"])
        for name, p in own.items():
            if getattr(p, "partition_stride", 1) == 2:  # [gate | up] of this rank
                state[prefix + name] = apply_swiglu_sharded_factory(
                    state[prefix + name], sharded_offsets, metadata.get("singleton_local_shards", False))
        return state


def linears(chunk: Any) -> Iterator[tuple[Any, tuple[str, ...], bool]]:
    """Every linear layer of the decoder: (layer, Hugging Face's names of its parts, whether it is column-parallel)."""
    for layer in unwrap(chunk).decoder.layers:
        yield layer.self_attention.linear_qkv, ("q_proj", "k_proj", "v_proj"), True
        yield layer.self_attention.linear_proj, ("o_proj",), False
        dense = [layer.mlp]
        if isinstance(layer.mlp, MoELayer):
            dense = [] if layer.mlp.shared_experts is None else [layer.mlp.shared_experts]
            experts: Any = layer.mlp.experts
            for expert in experts.local_experts:
                yield expert.linear_fc1, ("gate_up_proj",), True
                yield expert.linear_fc2, ("down_proj",), False
        for mlp in dense:
            yield mlp.linear_fc1, ("gate_proj", "up_proj"), True
            yield mlp.linear_fc2, ("down_proj",), False


def _rows(linear: Any, parts: tuple[str, ...], pg: Any) -> tuple[dict[str, int], int]:
    """The output rows of each part in a group, and the groups on this rank (all, where a rank holds less than one)."""
    config, m = linear.config, linear.weight.shape[0]
    if parts[0] != "q_proj":
        return {part: m // len(parts) for part in parts}, 1
    d, groups = config.kv_channels, config.num_query_groups
    rows = {"q_proj": config.num_attention_heads // groups * d, "k_proj": d, "v_proj": d}
    return rows, groups // pg.tp.size() if groups % pg.tp.size() == 0 else groups


def _refuse(cfg: Config) -> None:
    """What adapters are not made for. Raises ``UserError``."""
    lora = cfg.lora
    assert lora is not None
    for wrong, where, problem, fix in (
        (cfg.train.fp8, "train.fp8", "multiplies in 8 bits, which adapters are not made for", "Use precision bf16"),
        (lora.dropout > 0 and cfg.model.moe is not None and any("experts." in name for name in lora.targets()),
         "lora.dropout", f"is {lora.dropout}, but PEFT's adapters of experts have none",
         "Set it to 0, or leave the experts out of lora.target_modules"),
    ):
        if wrong:
            raise UserError(problem, where=where, fix=fix)
    experts_split = cfg.parallel.expert_tensor or cfg.parallel.tensor
    if cfg.model.moe is not None and lora.rank % experts_split:
        raise UserError(f"is {lora.rank}, which {experts_split} tensor ranks of an expert do not divide",
                        where="lora.rank", fix="Use a multiple of it, or parallel.expert_tensor 1")


@torch.no_grad()
def _initialise(chunk: Any, seed: int) -> None:
    """PEFT's: A uniform in ±1/sqrt(inputs) (Kaiming with a = sqrt(5)), B zero. By name: no layout changes them."""
    for name, p in global_names(chunk).items():
        if is_adapter(name) and factor(name)[2] == "a":
            split = split_of(name, p, unwrap(chunk).pg_collection)
            shape = split.whole_shape(p.shape)
            bound = 1.0 / math.sqrt(shape[1])
            p.copy_(split.take(torch.empty(shape).uniform_(-bound, bound, generator=generator(seed, name))))


def _start_graph(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
    """Nothing before the first adapter is trained, but recomputed layers send gradients only from outputs that come
    from something that wants one."""
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_()


def install(chunks: list[Any], cfg: Config, groups: Groups) -> None:
    """Freezes the bare chunks and puts the adapters of ``cfg.lora`` beside their layers. Raises ``UserError``.

    Targets that match nothing are found by ``lora_report.check``.
    """
    _refuse(cfg)
    lora = cfg.lora
    assert lora is not None
    wanted = set(lora.targets())
    for chunk in chunks:
        chunk.requires_grad_(False)
        chunk.config.moe_router_bias_update_rate = 0.0  # a router's bias is the frozen model's as well
        for linear, parts, column in linears(chunk):
            prefix = "experts." if linear.is_expert else ""
            chosen = [part for part in parts if prefix + part in wanted]
            if chosen:
                rows, in_groups = _rows(linear, parts, groups.pg)
                linear.adapter = Adapter(linear, rows, chosen, in_groups, lora, column=column, pg=groups.pg)
        if chunk.pre_process:
            chunk.embedding.register_forward_hook(_start_graph)
        _initialise(chunk, cfg.seed)


def adapters(chunks: list[Any]) -> Iterator[tuple[Any, Adapter]]:
    """(linear layer, its adapter), of all that have one."""
    for chunk in chunks:
        for linear, _, _ in linears(chunk):
            if linear.adapter is not None:
                yield linear, linear.adapter


@contextlib.contextmanager
def detached(chunks: list[Any]) -> Iterator[None]:
    """Within, the chunks are the base model: its forward pass, parameters and checkpoints, as if nothing was added."""
    taken = list(adapters(chunks))
    for linear, _ in taken:
        linear.adapter = None
    try:
        yield
    finally:
        for linear, adapter in taken:
            linear.adapter = adapter
