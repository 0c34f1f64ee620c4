"""Megatron's GPT with the engine's loss head: labels in, loss sum out, no logits in between."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from engine.losses.log_probs import token_log_probs
from engine.losses.next_token import next_token_loss
from engine.model.config import ModelSettings


class GPT(GPTModel):
    """A decoder-only language model.

    ``forward(tokens_bs, position_ids_bs, None, labels=…, loss_mask=…)`` returns on the last pipeline stage a tensor
    [1 + b s]: the loss sum, then for each token 1 if it counts and was predicted exactly, else 0; with a boolean mask
    the labels' log-probabilities [b, s] (fp32; 0 outside it); without labels the logits [b, s, v]; elsewhere the hidden
    states [s, b, h].
    """

    config: ModelSettings
    output_layer: Any

    def _postprocess(self, hidden_states, input_ids, position_ids, labels, *args, loss_mask: Any = None, **kwargs):
        if not self.post_process or labels is None:
            return super()._postprocess(hidden_states, input_ids, position_ids, labels, *args, **kwargs)
        weight_vh = self._head_weight()
        tp_group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden_sbh = gather_from_sequence_parallel_region(hidden_states, group=tp_group)
        else:
            hidden_sbh = copy_to_tensor_model_parallel_region(hidden_states, group=tp_group)
        if loss_mask.dtype == torch.bool:
            return self._log_probs(hidden_sbh, weight_vh, labels, loss_mask)
        scale = 1.0
        if self.training and self.config.grad_scale_func is not None:
            scale = self.config.grad_scale_func(torch.ones((), device=hidden_sbh.device))
        loss_sum, hits_n = next_token_loss(
            hidden_sbh.flatten(0, 1), weight_vh, labels.t().reshape(-1), loss_mask.t().reshape(-1),
            vocab_size=self.config.vocab_size, tp_group=tp_group, scale=scale,
            # An evaluation reports plain cross-entropy.
            label_smoothing=self.config.label_smoothing if self.training else 0.0,
            z_loss=self.config.z_loss if self.training else 0.0, impl=self.config.kernel_impl, per_token=True)
        hits_bs = hits_n.view(hidden_sbh.shape[:2]).t()
        return torch.cat([loss_sum[None], hits_bs.reshape(-1).to(loss_sum.dtype)])

    def _log_probs(self, hidden_sbh: torch.Tensor, weight_vh: Any, labels_bs: torch.Tensor, mask_bs: torch.Tensor
                   ) -> torch.Tensor:
        """Labels outside the mask are not computed as far as the kernels can leave them out; there 0, no gradient."""
        labels_sb = labels_bs.masked_fill(~mask_bs, -1).t()
        logps_n, _ = token_log_probs(hidden_sbh.flatten(0, 1), weight_vh, labels_sb.reshape(-1),
                                     vocab_size=self.config.vocab_size, tp_group=self.pg_collection.tp,
                                     impl=self.config.kernel_impl)
        return logps_n.view(labels_sb.shape).t()

    def _head_weight(self) -> Any:
        if self.share_embeddings_and_output_weights and self.pre_process:
            return self.embedding.word_embeddings.weight
        # The layer is not called, so what DDP hangs before its forward pass is: with overlapped parameter gathering it
        # waits for the weight, which would be the last step's on the ranks that did not update it.
        for hook in self.output_layer._forward_pre_hooks.values():
            hook(self.output_layer, ())
        return self.output_layer.weight
