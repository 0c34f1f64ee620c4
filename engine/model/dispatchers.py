"""Megatron's token dispatchers, with the engine's kernels sorting tokens by expert.

Communication, its order and its groups are Megatron's. What changes where Triton kernels run (elsewhere Megatron's own
methods do all of it):

- Tokens are sorted, copied and summed by ``engine_kernels.moe_sort`` and ``moe_permute``, which take the router's mask
  as it is; Megatron's plain path selects by mask, which waits for the GPU to learn how many there are, and sums with
  atomic additions in the activations' precision.
- tokens_per_expert stays on the device, as the experts' grouped matrix products want it.
- The host waits only where it must know a size: before the all-to-all for its splits (one copy, which the GPU makes
  before it permutes, so that it has work meanwhile), and in the gathering dispatcher with expert parallelism for the
  number of rows that are this rank's. With all experts on one rank nothing waits.
- With a single sender, chunks already lie in the experts' order: they are not sorted again, nor back.

s sender (a rank of the expert and tensor groups), l local expert, e expert, t token, h hidden, k experts of a token,
p rows.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher, MoEAlltoAllTokenDispatcher

from engine_kernels import dispatch
from engine_kernels.moe_permute import permute, unpermute
from engine_kernels.moe_sort import sort_mask, transpose_chunks


class _Announced:
    """Integers on their way to the host: what is launched after this need not be waited for."""

    def __init__(self, numbers: torch.Tensor):
        self._host = numbers.to("cpu", non_blocking=True)
        self._event = None
        if numbers.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> list[int]:
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()


def _impl(config: Any) -> str:
    return "auto" if config.kernel_impl == "cpu" else config.kernel_impl  # there is no C++ kernel of these


def _by_kernels(impl: str, tokens: torch.Tensor) -> bool:
    return dispatch.choose(impl, "permute", {"x_th": tokens}, kernels=("triton",)) == "triton"


class AllGatherDispatcher(MoEAllGatherTokenDispatcher):
    """Every rank of the expert and tensor groups has all tokens, and takes those of its experts."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.impl = _impl(self.config)

    def dispatch_postprocess(self, hidden_states, probs):
        self.fused = _by_kernels(self.impl, hidden_states)
        if not self.fused:
            return super().dispatch_postprocess(hidden_states, probs)
        assert self.routing_map is not None
        mine = slice(self.local_expert_indices[0], self.local_expert_indices[-1] + 1)
        counts_l, self.place_tk, expert_tk = sort_mask(self.routing_map[:, mine], self.router_topk, impl=self.impl)
        rows = hidden_states.shape[0] * self.router_topk  # every choice, if all experts are here
        if self.ep_size > 1:
            rows = int(counts_l.sum())
        tokens_ph, self.local_probs = permute(hidden_states, self.place_tk, rows, probs[:, mine], expert_tk,
                                              impl=self.impl)
        self.routing_map = None
        return tokens_ph, counts_l, self.local_probs

    def combine_preprocess(self, hidden_states):
        if not self.fused:
            return super().combine_preprocess(hidden_states)
        return unpermute(hidden_states, self.place_tk, impl=self.impl)


class AllToAllDispatcher(MoEAlltoAllTokenDispatcher):
    """Tokens travel to the ranks of their experts, sorted by expert; there, rows of all senders are sorted again."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.impl = _impl(self.config)
        self.senders = self.ep_size * self.tp_size

    def _announce_sizes(self, counts_e: torch.Tensor) -> None:
        """From this rank's tokens of each expert: tokens of local experts by sender, and the splits on their way."""
        mine = slice(self.local_expert_indices[0], self.local_expert_indices[-1] + 1)
        counts_se = gather_from_sequence_parallel_region(counts_e, group=self.tp_ep_group)
        self.sizes_sl = counts_se.view(self.ep_size, self.tp_size, -1)[:, :, mine].transpose(0, 1).flatten(0, 1)
        rank_splits = self.sizes_sl.sum(1).view(self.tp_size, self.ep_size)  # from each tensor and expert rank
        self.announced = _Announced(torch.cat([
            counts_e.view(self.ep_size, -1).sum(1), rank_splits[self.tp_rank], rank_splits.sum(1)]))

    def dispatch_preprocess(self, hidden_states, routing_map, probs):
        self.fused = _by_kernels(self.impl, hidden_states)
        if not self.fused:
            return super().dispatch_preprocess(hidden_states, routing_map, probs)
        self.hidden_shape, self.probs = hidden_states.shape, probs
        tokens_th = hidden_states.view(-1, self.hidden_shape[-1])
        top_k = self.config.moe_router_topk
        self.tokens_per_expert, self.place_tk, expert_tk = sort_mask(routing_map, top_k, impl=self.impl)
        if self.senders > 1:
            self._announce_sizes(self.tokens_per_expert)
            self.tokens_per_expert = self.sizes_sl.sum(0)
        return permute(tokens_th, self.place_tk, tokens_th.shape[0] * top_k, probs, expert_tk, impl=self.impl)

    def _maybe_dtoh_and_synchronize(self, point, tokens_per_expert=None):
        if not self.fused:
            return super()._maybe_dtoh_and_synchronize(point, tokens_per_expert)
        if point == "before_ep_alltoall" and self.senders > 1:
            sizes, n = self.announced.wait(), self.ep_size
            self.input_splits, self.output_splits, self.output_splits_tp = sizes[:n], sizes[n : 2 * n], sizes[2 * n :]
        return tokens_per_expert

    def dispatch_postprocess(self, global_input_tokens, global_probs):
        if not self.fused:
            return super().dispatch_postprocess(global_input_tokens, global_probs)
        tokens_ph, probs_p = global_input_tokens, global_probs
        if self.tp_size > 1:
            tokens_ph, probs_p = (gather_from_sequence_parallel_region(
                x, group=self.tp_group, output_split_sizes=self.output_splits_tp) for x in (tokens_ph, probs_p))
        self.sorted_p1 = None
        if self.num_local_experts > 1 and self.senders > 1:
            rows = tokens_ph.shape[0]
            self.sorted_p1 = transpose_chunks(self.sizes_sl, rows, impl=self.impl)[:, None]
            tokens_ph, probs_p = permute(tokens_ph, self.sorted_p1, rows, probs_p[:, None], impl=self.impl)
        return tokens_ph, self.tokens_per_expert, probs_p

    def combine_preprocess(self, hidden_states):
        if not self.fused:
            return super().combine_preprocess(hidden_states)
        if self.sorted_p1 is not None:
            hidden_states = unpermute(hidden_states, self.sorted_p1, impl=self.impl)
        if self.tp_size > 1:
            hidden_states = reduce_scatter_to_sequence_parallel_region(
                hidden_states.to(self.probs.dtype), group=self.tp_group, input_split_sizes=self.output_splits_tp,
            ).to(hidden_states.dtype)
        return hidden_states

    def combine_postprocess(self, permutated_local_input_tokens):
        if not self.fused:
            return super().combine_postprocess(permutated_local_input_tokens)
        return unpermute(permutated_local_input_tokens, self.place_tk, impl=self.impl).view(self.hidden_shape)


_OURS = {MoEAllGatherTokenDispatcher: AllGatherDispatcher, MoEAlltoAllTokenDispatcher: AllToAllDispatcher}


def install(layer: MoELayer) -> None:
    """Gives a layer our dispatcher in place of Megatron's of the same kind, which its constructor cannot be told.

    A subclass of MoELayer could make its own, but Megatron's decoder layer hands process groups to MoELayer alone.
    """
    stock: Any = layer.token_dispatcher
    assert layer.config.moe_expert_capacity_factor is None, "drop-free only"
    assert not layer.config.moe_shared_expert_overlap
    groups: Any = SimpleNamespace(ep=stock.ep_group, expt_tp=stock.tp_group, tp_ep=stock.tp_ep_group)
    layer.token_dispatcher = _OURS[type(stock)](layer.num_local_experts, layer.local_expert_indices,
                                                config=layer.config, pg_collection=groups)
