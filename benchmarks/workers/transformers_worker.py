"""Hugging Face Transformers' side of bench_train: LlamaForCausalLM trained as its Trainer trains, less its overhead.

SDPA attention, fused AdamW without decay on vectors, gradient clipping, the loss normalised over the global batch
(num_items_in_batch), eager or under torch.compile's default mode, with Liger's kernels or without. Precision: fp32;
"autocast" (fp32 weights, bf16 autocast: Trainer's bf16=True); "pure" (bf16 weights and optimizer state).
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from benchmarks.workers.protocol import Step, serve

if TYPE_CHECKING:
    import torch


def build(config: dict) -> tuple[Step, dict]:
    """``config``: see bench_train.worker_config."""
    import numpy as np
    import torch

    torch.set_num_threads(config["threads"])
    torch.manual_seed(config["seed"])
    device = torch.device(config["device"])
    if config["liger"]:
        from liger_kernel.transformers import apply_liger_kernel_to_llama  # pyright: ignore[reportMissingImports]

        apply_liger_kernel_to_llama()  # its default: rope, norm, swiglu, and the loss fused with the head
    # Weights of its own are made where they will be; those that others share come from the CPU's random numbers.
    with device if config["weights"] == "own" else contextlib.nullcontext():
        model = _model(config["shape"], config["seq_length"])
    if config["save_weights"]:
        from safetensors.torch import save_file

        # named_parameters, not state_dict, where a tied output head is the embedding under a second name.
        save_file({name: p.detach() for name, p in model.named_parameters()}, config["save_weights"])
    dtype = torch.bfloat16 if config["precision"] == "pure" else torch.float32
    model = model.to(device=device, dtype=dtype).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": config["weight_decay"]},
         {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0}],
        lr=config["lr"], betas=(0.9, 0.95), eps=1e-8, fused=True)
    forward = torch.compile(model) if config["compile"] else model
    tokens_nbs = np.load(config["tokens"], mmap_mode="r")
    micro = config["micro_batch_size"]

    def step(index: int) -> torch.Tensor:
        batch_bs = torch.from_numpy(tokens_nbs[index].astype(np.int64))
        predictions = batch_bs.shape[0] * (batch_bs.shape[1] - 1)
        total = torch.zeros((), device=device)
        for micro_bs in batch_bs.split(micro):
            inputs_bs, labels_bs = micro_bs[:, :-1].to(device), micro_bs[:, 1:].contiguous().to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=config["precision"] == "autocast"):
                # shift_labels: every position has its next token, as on the engine's side.
                loss = forward(input_ids=inputs_bs, labels=labels_bs, shift_labels=labels_bs, use_cache=False,
                               num_items_in_batch=predictions).loss
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, config["clip_grad"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step, {"parameters": sum(p.numel() for p in parameters)}


def _model(shape: dict, seq_length: int) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM._from_config(LlamaConfig(
        vocab_size=shape["vocab_size"], hidden_size=shape["hidden_size"], intermediate_size=shape["ffn_hidden_size"],
        num_hidden_layers=shape["num_layers"], num_attention_heads=shape["num_attention_heads"],
        num_key_value_heads=shape["num_query_groups"], head_dim=shape["head_dim"], max_position_embeddings=seq_length,
        initializer_range=0.02, rms_norm_eps=1e-5, tie_word_embeddings=shape["tie_embeddings"], use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": shape["rotary_base"]}, attention_dropout=0.0,
    ), attn_implementation="sdpa")


if __name__ == "__main__":
    serve(build)
