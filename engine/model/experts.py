"""The routed experts of a layer: all their products in few launches, whatever number of tokens each of them got.

p rows (tokens of this rank's experts, one expert after the other), h hidden, f feed-forward width, e this rank's
experts; widths are this rank's share under expert tensor parallelism. tokens_per_expert_e may stay on the GPU: nothing
here waits for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.moe.experts import SequentialMLP

from engine.model import layers, lora_experts, quantized
from engine.model.config import ModelSettings
from engine.model.layers import ColumnParallelLinear, RowParallelLinear, SwiGLU, weight_gradient
from engine_kernels.grouped_gemm import choose, grouped_nn, grouped_nt, grouped_tn, rows_of
from engine_kernels.grouped_linear import bias_gradients
from engine_kernels.swiglu import ACTIVATIONS

_DDP = DistributedDataParallel.__module__


def _weight_gradients(weights: Sequence[Any], needed: Sequence[bool], dy_pm, x_pk, tokens_e, impl: str) -> list[Any]:
    """What a backward pass returns for each expert's weight: ``layers.weight_gradient``, for all in one launch."""
    if not any(needed):
        return [None] * len(weights)
    if impl == "torch" or not all(needed) or any(w._backward_hooks for w in weights):
        rows = zip(rows_of(dy_pm, tokens_e)[0], rows_of(x_pk, tokens_e)[0], strict=True)
        return [weight_gradient(w, dy, x) if need else None
                for w, need, (dy, x) in zip(weights, needed, rows, strict=True)]
    if not all(map(layers.sums_itself, weights)):
        return list(grouped_tn(dy_pm, x_pk, tokens_e, impl=impl))
    # Zero before a step's first micro-batch, which overwrites them.
    add = any(w.grad_added_to_main_grad for w in weights)
    grouped_tn(dy_pm, x_pk, tokens_e, into=[w.main_grad for w in weights], add=add, impl=impl)
    return [layers.summed(w) for w in weights]


class _GroupedLinear(torch.autograd.Function):
    """Every row through its expert's layer: y_p = x_p W_e^T + s_p b_e. Communication is the dispatcher's.

    ``parameters``: all experts' weights, then their biases if they have them; ``scale_p`` (s) may be None. Quantised
    weights are no tensors, and are dequantised for each pass anew; of frozen ones' layer no input is kept.
    """

    @staticmethod
    def forward(ctx, x_pk, tokens_e, scale_p, impl, *parameters):
        ctx.impl, ctx.experts = impl, tokens_e.numel()
        weights, biases = parameters[:ctx.experts], parameters[ctx.experts:]
        ctx.quantised = weights if isinstance(weights[0], quantized.Weight) else None
        kept = x_pk if any(ctx.needs_input_grad[4:][:ctx.experts]) else None
        ctx.save_for_backward(kept, tokens_e, scale_p, *(parameters if ctx.quantised is None else biases))
        dense = quantized.dense_experts(weights, impl)
        if isinstance(dense, torch.Tensor) and biases:
            biases = torch.stack(biases)  # as the weights are
        return grouped_nt(x_pk, dense, tokens_e, biases if len(biases) else None, scale_p, impl=impl)

    @staticmethod
    def backward(ctx, dy_pm):
        x_pk, tokens_e, scale_p, *parameters = ctx.saved_tensors
        weights = ctx.quantised or parameters[:ctx.experts]
        biases = parameters[0 if ctx.quantised else ctx.experts:]
        needs_x, _, needs_scale, _, *needed = ctx.needs_input_grad
        dy_pm = dy_pm.contiguous()
        dx_pk = None
        if needs_x:
            dx_pk = grouped_nn(dy_pm, quantized.dense_experts(weights, ctx.impl), tokens_e, impl=ctx.impl)
        dweights = _weight_gradients(weights, needed[:ctx.experts], dy_pm, x_pk, tokens_e, ctx.impl)
        dbiases, dscale_p = [None] * len(biases), None
        if biases and (needs_scale or any(needed[ctx.experts:])):
            dbiases, dscale_p = bias_gradients(dy_pm, biases, scale_p, tokens_e, impl=ctx.impl)
        return dx_pk, None, dscale_p, None, *dweights, *dbiases


def _hooks(module: torch.nn.Module) -> Iterator[Any]:
    """What would run if the module were called, but for DDP's: those wait for the module's own parameters."""
    yield from module._forward_hooks.values()
    yield from module._backward_hooks.values()
    yield from module._backward_pre_hooks.values()
    yield from (hook for hook in module._forward_pre_hooks.values() if hook.__module__ != _DDP)


def _plain(layer: Any, kind: type) -> bool:
    """Whether the layer is the engine's own, and computes what this file does in its stead."""
    return type(layer) is kind and layer._forward_impl is layers._forward_impl and not any(_hooks(layer))


def _parameters(linears: list[Any]) -> list[torch.Tensor]:
    """Their weights, then their biases; complete, where DDP still gathers them."""
    for linear in linears:
        for wait in linear._forward_pre_hooks.values():
            wait(linear, ())
    names = ("weight",) if linears[0].bias is None else ("weight", "bias")
    return [getattr(linear, name) for name in names for linear in linears]


class Experts(SequentialMLP):
    """Megatron's experts one by one, their parameters and checkpoints, but not its loop over them.

    An expert whose layers are not the engine's (8-bit ones, adapters around them) or carry hooks is called as ever, and
    all the others of the layer with it.
    """

    config: ModelSettings

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name in ("linear_fc1", "linear_fc2"):
            quantized.stack([getattr(expert, name).weight for expert in self.local_experts])

    def _grouped(self) -> bool:
        if self.config.moe_apply_probs_on_input:
            return False
        return all(_plain(expert.linear_fc1, ColumnParallelLinear) and _plain(expert.linear_fc2, RowParallelLinear)
                   and type(expert.activation_func) is SwiGLU and not any(_hooks(expert))
                   for expert in self.local_experts)

    def forward(self, permuted_local_hidden_states: torch.Tensor, tokens_per_expert: torch.Tensor,
                permuted_probs: torch.Tensor):
        """[p, h], [e], [p] -> ([p, h], None). The signature is Megatron's; biases are in the result."""
        if not self._grouped():
            return super().forward(permuted_local_hidden_states, tokens_per_expert, permuted_probs)
        x_ph, experts = permuted_local_hidden_states, list(self.local_experts)
        fc1 = _parameters([expert.linear_fc1 for expert in experts])
        fc2 = _parameters([expert.linear_fc2 for expert in experts])
        on_device = tokens_per_expert.to(x_ph.device, non_blocking=True)
        impl = choose(self.config.kernel_impl, "experts", x_ph, {"weights": fc1[0]}, on_device)
        tokens_e = on_device if impl == "triton" else tokens_per_expert.cpu()
        gate_up_p2f: Any = _GroupedLinear.apply(x_ph, tokens_e, None, impl, *fc1)
        gate_up_p2f = lora_experts.add(gate_up_p2f, x_ph, [expert.linear_fc1 for expert in experts], tokens_e, impl)
        activated_pf = ACTIVATIONS[self.config.activation](gate_up_p2f, weights_n=permuted_probs,
                                                           impl=self.config.kernel_impl)
        scale_p = permuted_probs if len(fc2) > len(experts) else None
        down_ph: Any = _GroupedLinear.apply(activated_pf, tokens_e, scale_p, impl, *fc2)
        return lora_experts.add(down_ph, activated_pf, [expert.linear_fc2 for expert in experts], tokens_e, impl), None
