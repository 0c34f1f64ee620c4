"""Mixture of experts: the router, its balance and z losses, and their statistics over a global batch.

``engine_kernels.moe_routing`` has the formulas of the choice and its weights. Megatron's ``MoELayer`` does the rest: it
carries tokens to the experts' ranks and back (``engine/model/dispatchers.py``).

s sequence, b batch, h hidden, e experts, k chosen experts of a token, t tokens of a micro-batch (s and b flattened),
l MoE layers. Under sequence and context parallelism s is this rank's share.

The objective is the mean cross-entropy over the global batch's supervised tokens, plus, summed over layers,

    aux_loss_coeff * mean over sequences of  E * sum_e f_e P_e     (1 when tokens are spread evenly)
    z_loss_coeff   * mean over tokens of     logsumexp(logits)^2

with f the share of a sequence's choices that went to an expert and P the expert's mean share of the scores (Fedus et
al., 2021, arXiv:2101.03961; by sequence as in DeepSeek-V3, arXiv:2412.19437, eq. 17; Zoph et al., 2022,
arXiv:2202.08906). A sequence is never split over micro-batches or data-parallel ranks, so neither those nor any other
layout changes the objective.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer

from engine.model.config import ModelSettings
from engine.parallel.topology import Groups
from engine.parallel.wrap import unwrap
from engine_kernels.linear import matmul_nn, matmul_nt, matmul_tn
from engine_kernels.moe_routing import Routing, route


@dataclass(frozen=True)
class RouterStats:
    """Over a global batch, the same on every rank; a row for each MoE layer, the first first. On the CPU.

    ``tokens_per_expert_le``: int64. ``aux_loss_l`` (1 is even) and ``z_loss_l``: fp64, before their coefficients.
    """

    tokens_per_expert_le: torch.Tensor
    aux_loss_l: torch.Tensor
    z_loss_l: torch.Tensor

    @property
    def expert_load_max(self) -> float:
        """The busiest expert's tokens over those of an even spread, in the worst layer: from 1 to the experts."""
        counts_le = self.tokens_per_expert_le.double()
        return (counts_le.amax(1) / counts_le.mean(1)).max().item()


class _Logits(torch.autograd.Function):
    """x wᵀ + bias in fp32 for parameters and inputs of any dtype, which are what is kept for the backward pass."""

    @staticmethod
    def forward(ctx, x_th, weight_eh, bias_e):
        ctx.save_for_backward(x_th, weight_eh)
        ctx.bias_dtype = None if bias_e is None else bias_e.dtype
        return matmul_nt(x_th.float(), weight_eh.float(), None if bias_e is None else bias_e.float())

    @staticmethod
    def backward(ctx, grad_te):
        x_th, weight_eh = ctx.saved_tensors
        grad_x = matmul_nn(grad_te, weight_eh.float()).to(x_th.dtype)
        grad_weight = matmul_tn(grad_te, x_th.float()).to(weight_eh.dtype)
        return grad_x, grad_weight, None if ctx.bias_dtype is None else grad_te.sum(0).to(ctx.bias_dtype)


class _WithLosses(torch.autograd.Function):
    """The routing weights as they are; in the backward pass the losses get their gradients and are counted.

    So they are counted once, whatever is recomputed, and only where there is a backward pass.
    """

    @staticmethod
    def forward(ctx, probs_te, aux_loss, z_loss, counts_e, router):
        ctx.router, ctx.dtype = router, aux_loss.dtype
        ctx.save_for_backward(counts_e, aux_loss, z_loss)
        return probs_te.view_as(probs_te)

    @staticmethod
    def backward(ctx, grad_te):
        aux_scale, z_scale = ctx.router.count(*ctx.saved_tensors)
        return grad_te, aux_scale, z_scale, None, None


class Router(MegatronModule):
    """Logits, choice and weights in fp32; -> weights [t, e], zero where not chosen, and the choice as a mask [t, e].

    ``expert_bias`` (an fp32 buffer, where the configuration has it) moves each step towards the experts that had too
    few tokens: ``update_expert_bias``.
    """

    config: ModelSettings
    expert_bias: torch.Tensor | None

    def __init__(self, *, config: ModelSettings, pg_collection: Any = None):
        super().__init__(config)
        experts = config.num_moe_experts
        assert experts is not None
        self.impl = "auto" if config.kernel_impl == "cpu" else config.kernel_impl  # there is no C++ kernel of this
        self.tp_group = pg_collection.tp
        self.sequence_group = pg_collection.tp_cp  # the ranks that share a sequence
        self.weight = torch.nn.Parameter(torch.empty(experts, config.hidden_size, dtype=config.params_dtype))
        bias: Any = torch.nn.Parameter(torch.zeros(experts, dtype=config.params_dtype))
        self.bias = bias if config.add_bias_linear else None
        for parameter in self.parameters():
            # As the norms': each tensor rank routes its own tokens, so Megatron sums these gradients over them.
            parameter.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]
        self.register_buffer("expert_bias", torch.zeros(experts) if config.expert_bias else None)
        self.reset(0.0, 0.0)

    def _apply(self, fn, recurse=True):
        """Half precision is not for the bias: its steps of 0.001 would be rounded away."""
        bias_e = self.expert_bias
        super()._apply(fn, recurse)
        if bias_e is not None and self.expert_bias is not None:
            self.expert_bias = bias_e.to(self.expert_bias.device)
        return self

    def set_layer_number(self, layer_number: int) -> None:
        """Called by Megatron's layer, which counts from 1."""
        self.layer_number = layer_number

    def reset(self, aux_weight: float, z_weight: float) -> None:
        """Before a global batch: nothing counted; what the sums of both losses weigh in the sum of the batch's loss."""
        self.aux_weight, self.z_weight = aux_weight, z_weight
        self.counted_e = torch.zeros(self.weight.shape[0], dtype=torch.int64, device=self.weight.device)
        self.losses = torch.zeros(2, dtype=torch.float64, device=self.weight.device)

    def count(self, counts_e, aux_loss, z_loss) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds a micro-batch's; returns the gradients of its two losses."""
        self.counted_e += counts_e
        self.losses += torch.stack([aux_loss, z_loss])
        scale = torch.ones_like(aux_loss)
        if self.config.grad_scale_func is not None:  # fp16
            scale = self.config.grad_scale_func(scale).to(scale.dtype)
        return scale * self.aux_weight, scale * self.z_weight

    def _losses(self, found: Routing, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's part of the sums over its sequences and tokens: the parts of all ranks add up to the whole.

        ``length``: a sequence's tokens on this rank. f has no gradient, so P's is local, and the only communication is
        that of b * e counts, of the scores' own choices: the losses are about the scores, the bias about the choice.
        """
        counts_be = found.balanced_be.float()
        if self.sequence_group.size() > 1:
            dist.all_reduce(counts_be, group=self.sequence_group)
        tokens, experts = length * self.sequence_group.size(), counts_be.shape[1]
        f_be = counts_be / (tokens * self.config.moe_router_topk)
        return experts * (f_be * found.share_be / tokens).sum(), found.squares_b.sum()

    def forward(self, x_sbh: torch.Tensor, padding_mask: None = None) -> tuple[torch.Tensor, torch.Tensor]:
        assert padding_mask is None
        config, (length, batch, _) = self.config, x_sbh.shape
        counting = self.training and torch.is_grad_enabled()
        logits_te: Any = _Logits.apply(x_sbh.flatten(0, 1), self.weight, self.bias)
        found = route(logits_te, router=config.router, top_k=config.moe_router_topk, expert_bias_e=self.expert_bias,
                      scaling_factor=config.moe_router_topk_scaling_factor or 1.0,
                      sequences=batch if counting else 0, dense=True, impl=self.impl)
        if not counting:
            return found.weights, found.chosen
        probs_te: Any = _WithLosses.apply(found.weights, *self._losses(found, length), found.counts_be.sum(0), self)
        return probs_te, found.chosen


def routers(chunks: list[Any]) -> Iterator[tuple[int, Router]]:
    """This rank's routers, each with its place among the whole model's MoE layers."""
    for chunk in chunks:
        bare = unwrap(chunk)
        for layer in bare.decoder.layers:
            if isinstance(layer.mlp, MoELayer):
                router: Any = layer.mlp.router
                yield layer.layer_number - 1 - bare.config.num_dense_layers, router


def prepare(chunks: list[Any], *, supervised: int, sequences: int, tokens: int) -> None:
    """Before a global batch of so many sequences and tokens, of which ``supervised`` count in the loss.

    Gradients are divided by ``supervised`` in the end, and the losses here are means over sequences and tokens.
    """
    settings = chunks[0].config
    aux_weight = settings.moe_aux_loss_coeff * supervised / sequences
    z_weight = (settings.moe_z_loss_coeff or 0.0) * supervised / tokens
    for _, router in routers(chunks):
        router.reset(aux_weight, z_weight)


def collect(chunks: list[Any], groups: Groups, *, sequences: int, tokens: int) -> RouterStats:
    """After a global batch: what all routers counted, over all ranks. Collective."""
    settings = chunks[0].config
    layers, experts = settings.num_layers - settings.num_dense_layers, settings.num_moe_experts
    sums = torch.zeros(layers, experts + 2, dtype=torch.float64, device=groups.device)
    for i, router in routers(chunks):
        sums[i, :experts], sums[i, experts:] = router.counted_e.double(), router.losses
    if groups.world_size > 1:  # each token is routed on one rank: tensor ranks hold different ones
        dist.all_reduce(sums)
    sums = sums.cpu()
    return RouterStats(sums[:, :experts].long(), sums[:, experts] / sequences, sums[:, experts + 1] / tokens)


@torch.no_grad()
def update_expert_bias(chunks: list[Any], stats: RouterStats) -> None:
    """Each expert's bias up or down by the rate, as it had fewer or more tokens than the mean (arXiv:2408.15664)."""
    for i, router in routers(chunks):
        if router.expert_bias is not None:
            counts_e = stats.tokens_per_expert_le[i].double()
            step_e = (counts_e.mean() - counts_e).sign().to(router.expert_bias)
            router.expert_bias += router.config.moe_router_bias_update_rate * step_e
