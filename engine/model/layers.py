"""The modules that the engine plugs into Megatron's transformer layer: norm, activation, residual, linear layers.

s sequence, b batch, h hidden, f feed-forward width; every width is this tensor rank's share where it is parallel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear as MegatronColumnParallelLinear
from megatron.core.tensor_parallel import RowParallelLinear as MegatronRowParallelLinear
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import _gather_along_first_dim
from megatron.core.transformer.module import MegatronModule

from engine.model import fp8_tensor, lora_experts, quantized
from engine.model.config import ModelSettings
from engine_kernels.linear import add_matmul_tn_, matmul_nn, matmul_nt, matmul_tn
from engine_kernels.rms_norm import add_rms_norm, rms_norm
from engine_kernels.swiglu import ACTIVATIONS


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight over the last dimension, statistics in fp32."""

    fp8_output: Any = None  # the scaling of the fp8 layer that alone reads the output (engine/model/fp8.py)

    def __init__(self, config: ModelSettings, hidden_size: int, eps: float = 1e-5, **_ignored):
        super().__init__()
        self.eps = eps
        self.impl = config.kernel_impl
        weight: Any = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Under sequence parallelism each rank sees a part of the tokens: Megatron sums marked gradients over ranks.
        weight.sequence_parallel = config.sequence_parallel
        self.weight = weight

    def forward(self, x_sbh: torch.Tensor, residual_sbh: torch.Tensor | None = None) -> Any:
        """-> the normalised x; with a residual the normalised sum of both, and the sum."""
        if fp8_tensor.fuses(self.fp8_output, x_sbh):
            return fp8_tensor.rms_norm(x_sbh, residual_sbh, self.weight, eps=self.eps, scaling=self.fp8_output)
        if residual_sbh is None:
            return rms_norm(x_sbh, self.weight, eps=self.eps, impl=self.impl)
        return add_rms_norm(x_sbh, residual_sbh, self.weight, eps=self.eps, impl=self.impl)


class SwiGLU(MegatronModule):
    """The configured gated activation (by default silu(gate) * up) of [gate | up] in the last dimension.

    A MegatronModule so that checkpoints can walk it.
    """

    config: ModelSettings
    fp8_output: Any = None  # as RMSNorm's

    def forward(self, x_sb2f: torch.Tensor) -> torch.Tensor:
        if fp8_tensor.fuses(self.fp8_output, x_sb2f):
            return fp8_tensor.activation(x_sb2f, self.config.activation, scaling=self.fp8_output)
        return ACTIVATIONS[self.config.activation](x_sb2f, impl=self.config.kernel_impl)


def residual_add(training: bool, fused: bool):
    """Megatron's "bias, dropout, add" slot without its cost when there is no dropout."""

    def add(x_with_bias, residual_sbh, dropout: float):
        x_sbh, bias_h = x_with_bias
        if bias_h is not None:
            x_sbh = x_sbh + bias_h
        if dropout > 0.0 and training:
            x_sbh = torch.nn.functional.dropout(x_sbh, p=dropout)
        return residual_sbh + x_sbh

    return add


def sums_itself(weight: Any) -> bool:
    """Whether a backward pass adds the weight's gradient to ``main_grad``, as Megatron's hook would: where DDP wrapped
    the weight, and nobody hung a hook of his own on it, who gets the gradient as ever."""
    marked = getattr(weight, "sums_own_gradient", False) or getattr(weight, "sums_before_hook", False)
    return marked and not weight._backward_hooks


def summed(weight: Any) -> torch.Tensor | None:
    """What that backward pass returns once it has added: Megatron's hook then has nothing to add.

    Where the hook starts the reduction (overlapped), it must be handed a tensor all the same, which it throws away
    (Megatron's protocol).
    """
    weight.grad_added_to_main_grad = True  # until DDP's zero_grad_buffer
    if getattr(weight, "sums_own_gradient", False):
        return None
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)


def weight_gradient(weight: Any, grad_y: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
    """What a backward pass returns for ``weight`` [m, k]: grad_y [..., m]ᵀ x [..., k], or what ``summed`` says."""
    if not sums_itself(weight):
        return matmul_tn(grad_y, x)
    # Zero before a step's first micro-batch, which overwrites it: the zeros need not be read.
    add_matmul_tn_(weight.main_grad, grad_y, x, first=not weight.grad_added_to_main_grad)
    return summed(weight)


class _ParallelLinear(torch.autograd.Function):
    """y = x wᵀ with Megatron's tensor- and sequence-parallel communication, products through ``engine_kernels``.

    The communication is Megatron's ``LinearWithGradAccumulationAndAsyncCommunication``; the products are ours, since
    torch's fp32 product on AMD processors runs at half of what oneDNN reaches. A quantised ``weight`` is dequantised
    for each pass anew; of a frozen weight's layer no input is kept.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, allreduce_dgrad, sequence_parallel, tp_group):
        ctx.quantised = weight if isinstance(weight, quantized.Weight) else None
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.quantised is None else None)
        ctx.tp_group = tp_group
        ctx.allreduce_dgrad, ctx.sequence_parallel = allreduce_dgrad, sequence_parallel
        total = _gather_along_first_dim(x, tp_group) if sequence_parallel else x
        return matmul_nt(total, quantized.dense(weight), bias)

    @staticmethod
    def backward(ctx, grad_y):
        """What communicates runs beside a product: the gather of x beside grad_x, grad_x's sum beside grad_weight."""
        x, weight = ctx.saved_tensors
        weight = weight if ctx.quantised is None else ctx.quantised.dense()
        grad_y, total, gathering, summing = grad_y.contiguous(), x, None, None
        if ctx.sequence_parallel and ctx.needs_input_grad[1]:
            total = x.new_empty(x.shape[0] * ctx.tp_group.size(), *x.shape[1:])
            gathering = dist.all_gather_into_tensor(total, x.contiguous(), group=ctx.tp_group, async_op=True)
        grad_total = grad_x = matmul_nn(grad_y, weight)
        if gathering is not None:
            gathering.wait()
        if ctx.allreduce_dgrad:
            summing = dist.all_reduce(grad_x, group=ctx.tp_group, async_op=True)
        elif ctx.sequence_parallel:
            grad_x = grad_total.new_empty(grad_total.shape[0] // ctx.tp_group.size(), *grad_total.shape[1:])
            summing = dist.reduce_scatter_tensor(grad_x, grad_total, group=ctx.tp_group, async_op=True)
        grad_weight = weight_gradient(weight, grad_y, total) if ctx.needs_input_grad[1] else None
        grad_bias = grad_y.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        if summing is not None:
            summing.wait()
        return grad_x, grad_weight, grad_bias, None, None, None


def _mark_expert(layer: Any) -> None:
    """An expert's parameters are reduced over the ranks that hold it, and counted by every rank that holds others.

    Megatron marks them only with expert parallelism, but those ranks are not the data-parallel ones either where
    experts have a tensor size of their own. A bias is of this expert alone (Megatron does not split experts with
    biases), while its own marks would sum it over tensor ranks and leave it out of the norm on all but the first.
    """
    # The dispatcher communicates. On one rank Megatron's reduction would return a view, to which no bias can be added.
    layer.explicit_expert_comm = True
    for parameter in layer.parameters(recurse=False):
        parameter.allreduce = False
        if parameter.dim() == 1:
            parameter.sequence_parallel = False
            if not getattr(parameter, "tensor_model_parallel", False):
                set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)


def _forward_impl(input, weight, bias, allreduce_dgrad, sequence_parallel, tp_group, **_ignored):
    return _ParallelLinear.apply(input, weight, bias, allreduce_dgrad, sequence_parallel, tp_group)


class _Adapted:
    """A layer beside which an adapter may be (engine/model/lora.py)."""

    adapter: Any

    def _with_adapter(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self.adapter is None:
            return y
        return lora_experts.add_to_one(y, x, self) if self.adapter.expert else self.adapter(x, y)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> Any:
        adapter, self.adapter = self.adapter, None  # Megatron would take its tensors for the layer's
        try:
            layer: Any = super()
            state = layer.sharded_state_dict(prefix, sharded_offsets, metadata)
        finally:
            self.adapter = adapter
        if adapter is not None:
            state |= adapter.sharded_state_dict(f"{prefix}adapter.", sharded_offsets, metadata)
        return state


class ColumnParallelLinear(_Adapted, MegatronColumnParallelLinear):
    """Megatron's layer, output features split over tensor ranks; the engine's products inside."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_module("adapter", None)
        self._forward_impl = _forward_impl
        # Alone, no gradient is reduced; Megatron would still pass through an autograd function that does nothing.
        self.disable_grad_reduce = self.disable_grad_reduce or self.output_size_per_partition == self.output_size
        if self.is_expert:
            _mark_expert(self)
        quantized.hold(self)

    def forward(self, input_, weight=None, runtime_gather_output=None):
        output, bias = super().forward(input_, weight, runtime_gather_output)
        return self._with_adapter(input_, output), bias


class RowParallelLinear(_Adapted, MegatronRowParallelLinear):
    """Megatron's layer, input features split over tensor ranks; the engine's products inside."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_module("adapter", None)
        self._forward_impl = _forward_impl
        if self.input_size_per_partition == self.input_size and self.skip_bias_add:
            self.explicit_expert_comm = True  # no output is reduced: as above
        if self.is_expert:
            _mark_expert(self)
        quantized.hold(self)

    def forward(self, input_):
        output, bias = super().forward(input_)
        return self._with_adapter(input_, output), bias
