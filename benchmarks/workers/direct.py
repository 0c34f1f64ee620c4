"""The engine's layers called directly: plain PyTorch around the same kernels, without Megatron.

One side of bench_layers: what the step would cost if nothing stood between the loop and the kernels. Weights go
by the engine's names, so that both sides can be compared tensor by tensor.

s sequence, b batch, h hidden, n tokens of a micro-batch (s·b).
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.workers.engine_worker import ArrayLoader
from engine.losses.next_token import next_token_loss
from engine_kernels.attention import causal_attention
from engine_kernels.linear import matmul_nn, matmul_nt, matmul_tn
from engine_kernels.qkv_rotary import split_qkv_rotary
from engine_kernels.rms_norm import add_rms_norm, rms_norm
from engine_kernels.swiglu import swiglu

EPS, BETAS, ADAM_EPS = 1e-5, (0.9, 0.95), 1e-8  # the engine's defaults
Weights = dict[str, torch.Tensor]


class _Linear(torch.autograd.Function):
    """y = x wᵀ through ``engine_kernels``: ``engine.model.layers`` without its communication."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return matmul_nt(x, weight)

    @staticmethod
    def backward(ctx, grad_y):
        x, weight = ctx.saved_tensors
        return matmul_nn(grad_y, weight), matmul_tn(grad_y, x)


def loss_sum(w: Weights, shape: dict, cos_sr: torch.Tensor, sin_sr: torch.Tensor, batch: Any) -> torch.Tensor:
    """Summed cross-entropy of a micro-batch: one function, no modules."""
    groups, heads = shape["num_query_groups"], shape["num_attention_heads"]
    embedding_vh = w["embedding.word_embeddings.weight"]
    # Sequences first after the look-up, as Megatron: in bf16 the rows' gradients are summed in the order of the tokens.
    x_sbh = torch.nn.functional.embedding(batch.tokens_bs, embedding_vh).transpose(0, 1).contiguous()
    for i in range(shape["num_layers"]):
        name = f"decoder.layers.{i}."
        normed = rms_norm(x_sbh, w[name + "input_layernorm.weight"], eps=EPS)
        mixed = _Linear.apply(normed, w[name + "self_attention.linear_qkv.weight"])
        q_bhsd, k_bgsd, v_bgsd = split_qkv_rotary(mixed, cos_sr, sin_sr, num_groups=groups,
                                                  queries_per_group=heads // groups, head_dim=shape["head_dim"])
        out_bhsd = causal_attention(q_bhsd, k_bgsd, v_bgsd, scale=shape["head_dim"] ** -0.5)
        joined = out_bhsd.permute(2, 0, 1, 3).flatten(2)
        attended = _Linear.apply(joined, w[name + "self_attention.linear_proj.weight"])
        normed, x_sbh = add_rms_norm(attended, x_sbh, w[name + "pre_mlp_layernorm.weight"], eps=EPS)
        gated = swiglu(_Linear.apply(normed, w[name + "mlp.linear_fc1.weight"]))
        x_sbh = x_sbh + _Linear.apply(gated, w[name + "mlp.linear_fc2.weight"])
    x_nh = rms_norm(x_sbh, w["decoder.final_layernorm.weight"], eps=EPS).flatten(0, 1)
    head_vh = embedding_vh if shape["tie_embeddings"] else w["output_layer.weight"]
    return next_token_loss(x_nh, head_vh, batch.labels_bs.t().reshape(-1), batch.loss_mask_bs.t().reshape(-1),
                           vocab_size=shape["vocab_size"])[0]


class Trainer:
    """The plain loop: gradients summed in fp32, divided by the tokens, clipped; fused AdamW on fp32 weights."""

    def __init__(self, config: dict, weights: Weights):
        half = config["precision"] == "bf16"
        self.config, self.data = config, ArrayLoader(config["tokens"])
        self.main = {name: value.float().clone().requires_grad_(not half) for name, value in weights.items()}
        self.weights = {n: p.detach().bfloat16().requires_grad_() for n, p in self.main.items()} if half else self.main
        self.sums = {name: torch.zeros_like(p) for name, p in self.main.items()} if half else None
        decayed, rest = ([p for p in self.main.values() if (p.dim() > 1) == matrix] for matrix in (True, False))
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config["weight_decay"]}, {"params": rest, "weight_decay": 0.0}],
            lr=config["lr"], betas=BETAS, eps=ADAM_EPS, fused=True)
        d, s = config["shape"]["head_dim"], config["seq_length"]
        angles_sr = torch.outer(torch.arange(s, dtype=torch.float64), config["shape"]["rotary_base"] ** (
            -torch.arange(0, d, 2, dtype=torch.float64) / d))
        self.cos_sr, self.sin_sr = angles_sr.cos().float(), angles_sr.sin().float()

    def step(self, index: int) -> float:
        """One global batch and one update. -> the loss before it, nats a token."""
        c = self.config
        batch_size, length = c["global_batch_size"], c["seq_length"]
        total, tokens = 0.0, 0
        batches = self.data.micro_batches(index * batch_size * length, global_batch_size=batch_size,
                                          micro_batch_size=c["micro_batch_size"], seq_length=length)
        for number, batch in enumerate(batches):
            loss = loss_sum(self.weights, c["shape"], self.cos_sr, self.sin_sr, batch)
            loss.backward()
            total += loss.item()
            tokens += int(batch.loss_mask_bs.sum())
            for name, total_gradient in (self.sums or {}).items():
                weight = self.weights[name]
                assert weight.grad is not None
                _ = total_gradient.add_(weight.grad) if number else total_gradient.copy_(weight.grad)
                weight.grad = None
        gradients = self.sums or {name: p.grad for name, p in self.main.items() if p.grad is not None}
        self._update(gradients, tokens)
        return total / tokens

    @torch.no_grad()
    def _update(self, gradients: Weights, tokens: int) -> None:
        for g in gradients.values():
            g.mul_(1.0 / tokens)
        # In fp64, as the engine's: a sum of a million squares in fp32 is off in the fifth digit here.
        norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients.values()]
        norm = torch.stack(norms).norm().item()
        if norm > self.config["clip_grad"]:
            for g in gradients.values():
                g.mul_(self.config["clip_grad"] / (norm + 1e-6))
        for name, p in self.main.items():
            p.grad = gradients[name]
        self.optimizer.step()
        for name, p in self.main.items():
            p.grad = None
            if self.sums is not None:
                self.weights[name].copy_(p)
        self.gradients = gradients  # for the comparison, before the next step
