"""FP8 in the decoder's linear layers: products of 8-bit numbers in forward and backward passes, without a CUDA build.

n tokens (sequence and batch), k input features, m output features, m and k this tensor rank's share.

``install`` gives it to the layers' ``ColumnParallelLinear`` and ``RowParallelLinear``; embedding, output head, routers
and routed experts stay as they are. Of an input only its transpose in fp8 is kept for the backward pass. Under sequence
parallelism fp8 travels, not bf16 (rowwise it does in the backward pass only: columns' scales are of all tokens).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.mlp import MLP

from engine.config.fp8 import Fp8Config
from engine.model import layers
from engine.model.fp8_scaling import GRAD, INPUT, LayerScaling, Scaling, transposed
from engine.model.fp8_tensor import Fp8Tensor
from engine.parallel.topology import Groups
from engine.parallel.wrap import unwrap
from engine_kernels import fp8_linear
from engine_kernels.fp8 import Quantised, aligned

CHECKPOINT_PREFIX = "fp8.amax_history."


def _gathered(q: torch.Tensor, group: Any) -> torch.Tensor:
    """The ranks' parts one after the other, [ranks, ...]. 8-bit floats travel as bytes."""
    parts = q.new_empty(group.size(), *q.shape)
    dist.all_gather_into_tensor(parts.view(torch.uint8).flatten(), q.contiguous().view(torch.uint8).flatten(),
                                group=group)
    return parts


def _input(scaling: LayerScaling, x_nk: torch.Tensor, keep: bool, sequence_group: Any
           ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """-> x of all tokens in fp8 and its scale; to keep: the transpose of this rank's tokens and its scale."""
    if sequence_group is not None and scaling.rowwise:
        q = scaling.quantise(INPUT, _gathered(x_nk, sequence_group).flatten(0, 1),
                             transposed=keep)
        return q.q_nk, q.scale, _own_part(q, len(x_nk), sequence_group) if keep else None, q.scale_k
    if isinstance(x_nk, Fp8Tensor):
        q = Quantised(x_nk.q_nk, x_nk.scale)
        q = transposed(q) if keep else q
    else:
        q = scaling.quantise(INPUT, x_nk, transposed=keep)
    whole = q.q_nk if sequence_group is None else _gathered(q.q_nk, sequence_group).flatten(0, 1)
    return whole, q.scale, q.q_km, q.scale_k


def _own_part(q: Quantised, n: int, group: Any) -> torch.Tensor:
    assert q.q_km is not None
    return _pad(q.q_km[:, n * group.rank() : n * (group.rank() + 1)])


def _pad(q_kn: torch.Tensor) -> torch.Tensor:
    """With zeros up to a multiple of 16 columns."""
    k, n = q_kn.shape
    if n == aligned(n):
        return q_kn.contiguous()
    padded = torch.zeros(k, aligned(n), dtype=torch.uint8, device=q_kn.device)
    padded[:, :n] = q_kn.view(torch.uint8)
    return padded.view(q_kn.dtype)


def _all_tokens(q_km: torch.Tensor, n: int, group: Any) -> torch.Tensor:
    """The kept transposes [k, m] of n tokens each, of all ranks: [k, ranks * n], padded."""
    parts_rkn = _gathered(q_km, group).view(torch.uint8)[:, :, :n]
    return _pad(parts_rkn.permute(1, 0, 2).flatten(1)).view(q_km.dtype)


def _weight_gradient(weight: Any, product: Callable[..., torch.Tensor]) -> torch.Tensor | None:
    """``engine.model.layers.weight_gradient`` of a product that comes out in fp32, before it is added."""
    if not layers.sums_itself(weight):
        return product(out_dtype=weight.dtype)
    grad_mk = product(out_dtype=weight.main_grad.dtype)
    if weight.grad_added_to_main_grad:
        weight.main_grad.add_(grad_mk)
    else:
        weight.main_grad.copy_(grad_mk)
    return layers.summed(weight)


class _Linear(torch.autograd.Function):
    """``engine.model.layers._ParallelLinear`` with its products in fp8."""

    @staticmethod
    def forward(ctx, x, weight, scaling, keep, allreduce_dgrad, sequence_group, tp_group):
        x_nk = x if isinstance(x, Fp8Tensor) else x.reshape(-1, x.shape[-1])
        q_nk, scale, kept, kept_scale = _input(scaling, x_nk, keep and ctx.needs_input_grad[1], sequence_group)
        w = scaling.weight(weight, transposed=keep)
        ctx.save_for_backward(weight, kept, kept_scale, w.q_km, w.scale_k)
        ctx.scaling, ctx.shape, ctx.dtype = scaling, x.shape, x.dtype
        ctx.allreduce_dgrad, ctx.sequence_group, ctx.tp_group = allreduce_dgrad, sequence_group, tp_group
        y_nm = fp8_linear.product(q_nk, scale, w.q_nk, w.scale, out_dtype=x.dtype, fast=True)
        return y_nm.view(-1, *x.shape[1:-1], y_nm.shape[-1])

    @staticmethod
    def backward(ctx, grad_y):
        """What communicates runs beside a product: the sum of grad_x beside grad_weight."""
        weight, xt, xt_scale, wt, wt_scale = ctx.saved_tensors
        grad_nm, summing = grad_y.reshape(-1, grad_y.shape[-1]), None
        g = ctx.scaling.quantise(GRAD, grad_nm, transposed=ctx.needs_input_grad[1])
        grad_nk = fp8_linear.product(g.q_nk, g.scale, wt[:, : grad_nm.shape[1]], wt_scale, out_dtype=ctx.dtype)
        grad_total = grad_x = grad_nk.view(-1, *ctx.shape[1:])
        if ctx.allreduce_dgrad:
            summing = dist.all_reduce(grad_x, group=ctx.tp_group, async_op=True)
        elif ctx.sequence_group is not None:
            grad_x = grad_total.new_empty(ctx.shape)
            summing = dist.reduce_scatter_tensor(grad_x, grad_total, group=ctx.sequence_group, async_op=True)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            if ctx.sequence_group is not None:
                xt = _all_tokens(xt, ctx.shape[:-1].numel(), ctx.sequence_group)
            grad_weight = _weight_gradient(weight, partial(fp8_linear.product, g.q_km, g.scale_k, xt, xt_scale))
        if summing is not None:
            summing.wait()
        return grad_x, grad_weight, None, None, None, None, None


def _forward_impl(scaling: LayerScaling, *, input, weight, bias, allreduce_dgrad, sequence_parallel, tp_group,
                  **_ignored):
    y = _Linear.apply(input, weight, scaling, torch.is_grad_enabled(), allreduce_dgrad,
                      tp_group if sequence_parallel else None, tp_group)
    return y if bias is None else y + bias


def _sharers(linear: Any, groups: Groups) -> tuple[Any, Any, Any]:
    """The ranks that hold parts of a layer's input, weight and output gradient; None where that is this rank alone."""
    pg = groups.pg
    column = isinstance(linear, layers.ColumnParallelLinear)

    def group(split: bool, tokens: bool) -> Any:
        found = {(True, True): pg.tp_cp, (True, False): pg.tp, (False, True): pg.cp}.get((split, tokens))
        return found if found is not None and found.size() > 1 else None

    return (group(not column or linear.sequence_parallel, True), group(True, False), group(column, True))


def _linears(chunks: list[Any], recipe: Fp8Config) -> dict[str, Any]:
    """The layers that multiply in fp8, by their names in the unsplit model."""
    found = {}
    for chunk in chunks:
        last = chunk.config.num_layers - recipe.last_layers_bf16
        for layer in chunk.decoder.layers:
            if not recipe.first_layers_bf16 < layer.layer_number <= last:
                continue
            for name, module in layer.named_modules():
                plain = isinstance(module, (layers.ColumnParallelLinear, layers.RowParallelLinear))
                if plain and not module.is_expert:
                    found[f"decoder.layers.{layer.layer_number - 1}.{name}"] = module
    return found


def install(chunks: list[Any], groups: Groups) -> None:
    """Makes the chunks' linear layers multiply in fp8, if their settings ask for it (``fp8_linears``)."""
    settings = chunks[0].config
    if settings.fp8_linears is None:
        return
    fp8_linear.announce(groups.device)
    linears = _linears(chunks, settings.fp8_linears)
    impl = "auto" if settings.kernel_impl == "cpu" else settings.kernel_impl
    scaling = Scaling(settings.fp8_linears, list(linears), groups, impl)
    of_layer = {}
    for i, linear in enumerate(linears.values()):
        of_layer[linear] = LayerScaling(scaling, i, _sharers(linear, groups))
        linear._forward_impl = partial(_forward_impl, of_layer[linear])
    for chunk in chunks:
        chunk.fp8_scaling = scaling
        for layer in chunk.decoder.layers:
            _fuse(layer, of_layer)


def _fuse(layer: Any, of_layer: dict[Any, LayerScaling]) -> None:
    """Tells a layer's norms and activation which fp8 layer reads their output; experts and routers read bf16."""
    pairs = [(layer.input_layernorm, layer.self_attention.linear_qkv)]
    if isinstance(layer.mlp, MLP):
        pairs += [(layer.pre_mlp_layernorm, layer.mlp.linear_fc1), (layer.mlp.activation_func, layer.mlp.linear_fc2)]
    for module, linear in pairs:
        module.fp8_output = of_layer.get(linear)


def scaling_of(chunks: list[Any]) -> Scaling | None:
    return getattr(unwrap(chunks[0]), "fp8_scaling", None)


@contextlib.contextmanager
def global_batch(chunks: list[Any], *, training: bool) -> Iterator[None]:
    """Around the passes of a global batch: weights do not change within; delayed scales do behind it. Collective."""
    scaling = scaling_of(chunks)
    if scaling is None:
        yield
        return
    finished = False
    scaling.begin(training=training)
    try:
        yield
        finished = True
    finally:
        scaling.end(finished=finished)


def to_checkpoint(chunks: list[Any], stored: set[str] | None = None) -> dict[str, ShardedTensor]:
    """The history of delayed scaling, a tensor a layer, whatever the layout; of a checkpoint with the keys ``stored``
    what is there. Another ``history_length`` is another key: it begins anew, with a step of current scaling."""
    scaling = scaling_of(chunks)
    if scaling is None or not scaling.delayed:
        return {}
    pg, found = scaling.groups.pg, {}
    for name, history in zip(scaling.names, scaling.history, strict=True):
        key = f"{CHECKPOINT_PREFIX}{scaling.recipe.history_length}.{name}"
        if stored is None or key in stored:
            found[name] = ShardedTensor.from_rank_offsets(key, history.clone(),
                                                          replica_id=(0, pg.tp.rank(), pg.dp_cp.rank()))
    return found


def fill(chunks: list[Any], loaded: dict[str, torch.Tensor]) -> None:
    """Goes on from the history of a checkpoint, without one from none."""
    scaling = scaling_of(chunks)
    if scaling is None or not scaling.delayed:
        return
    scaling.history.zero_()
    for name, history in loaded.items():
        scaling.history[scaling.names.index(name)] = history
    scaling.known = False
    scaling.rescale()
