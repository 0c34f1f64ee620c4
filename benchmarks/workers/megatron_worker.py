"""Stock megatron-core's side of bench_train: its own model, layers, schedule and optimizer, none of the engine's code.

Transformer Engine's layers where it is installed, else Megatron's own (``get_gpt_layer_local_spec``): attention that
writes its scores, softmax in bf16, torch's AdamW, which is what megatron-core is with pip alone. Its fusions that need
no other package are on. On a GPU its own attention is recomputed in the backward pass, as its examples do: the scores
of all layers would not fit. On a CPU it runs through the engine's adaptor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.workers.engine_worker import ArrayLoader, load_llama_weights
from benchmarks.workers.protocol import Step, serve

if TYPE_CHECKING:
    import torch


def build(config: dict) -> tuple[Step, dict]:
    """``config``: see bench_train.worker_config; precision fp32, bf16, or fp8 (Transformer Engine's)."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(config["threads"])
    device = torch.device(config["device"])
    if device.type == "cuda":
        torch.cuda.set_device(0)
    else:
        _adapt()
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1,
                            store=dist.HashStore())  # pyright: ignore[reportPrivateImportUsage]
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.transformer.module import Float16Module

    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    tensor_parallel.model_parallel_cuda_manual_seed(config["seed"])
    settings, spec, layers = _settings(config)
    refuse_what_cannot_fit(config, device)
    model = _model(config, settings, spec).to(device)
    if config["load_weights"]:
        load_llama_weights(model, config["load_weights"])
    inner: Any = Float16Module(settings, model) if settings.bf16 else model
    wrapped = DistributedDataParallel(
        config=settings, module=inner, ddp_config=DistributedDataParallelConfig(grad_reduce_in_fp32=True))
    optimizer = _optimizer(config, settings, wrapped)
    settings.finalize_model_grads_func = finalize_model_grads
    settings.grad_scale_func = optimizer.scale_loss
    _adapt()  # to modules imported since
    return _step(config, wrapped, optimizer, device), {
        "parameters": sum(p.numel() for p in model.parameters()), "note": layers}


def _adapt() -> None:
    """Does nothing where there is a GPU."""
    from engine.parallel import cpu

    cpu.install()


def _settings(config: dict) -> tuple[Any, Any, str]:
    """-> TransformerConfig, layer spec, whose layers they are."""
    import torch
    from megatron.core.models.gpt import gpt_layer_specs as specs
    from megatron.core.transformer import TransformerConfig

    te, shape = specs.HAVE_TE, config["shape"]
    dtype = torch.float32 if config["precision"] == "fp32" else torch.bfloat16
    if config["precision"] == "fp8" and not te:
        raise RuntimeError("stock megatron-core does FP8 through Transformer Engine, which is not installed")
    cuda = config["device"] == "cuda"
    settings = TransformerConfig(
        num_layers=shape["num_layers"], hidden_size=shape["hidden_size"], kv_channels=shape["head_dim"],
        num_attention_heads=shape["num_attention_heads"], num_query_groups=shape["num_query_groups"],
        ffn_hidden_size=shape["ffn_hidden_size"], normalization="RMSNorm", layernorm_epsilon=1e-5,
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False,
        hidden_dropout=0.0, attention_dropout=0.0, params_dtype=dtype, pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16, fp8="hybrid" if config["precision"] == "fp8" else None,
        bias_activation_fusion=cuda, bias_dropout_fusion=cuda, apply_rope_fusion=te, cross_entropy_loss_fusion=cuda,
        attention_softmax_in_fp32=dtype == torch.float32, gradient_accumulation_fusion=False,
        recompute_granularity="selective" if cuda and not te else None)
    if te:
        return settings, specs.get_gpt_layer_with_transformer_engine_spec(), "Transformer Engine's layers"
    recomputed = ", attention recomputed" if settings.recompute_granularity else ""
    return settings, specs.get_gpt_layer_local_spec(normalization="RMSNorm"), f"its own layers{recomputed}"


def _model(config: dict, settings: Any, spec: Any) -> Any:
    from megatron.core.models.gpt import GPTModel

    shape = config["shape"]
    return GPTModel(config=settings, transformer_layer_spec=spec, vocab_size=shape["vocab_size"],
                    max_sequence_length=config["seq_length"], position_embedding_type="rope",
                    rotary_base=int(shape["rotary_base"]),
                    share_embeddings_and_output_weights=shape["tie_embeddings"])


def refuse_what_cannot_fit(config: dict, device: torch.device) -> None:
    """Raises MemoryError before minutes are spent: bf16 weights, and fp32 gradients, weights and two moments."""
    import torch

    if device.type != "cuda":
        return
    need, memory = 18 * config["parameters"], torch.cuda.get_device_properties(device).total_memory
    if need > 0.9 * memory:  # activations need the rest
        raise MemoryError(f"its weights, gradients and optimizer take {need / 1e9:.0f} GB of the GPU's "
                          f"{memory / 1e9:.0f} GB (bf16 moments need Transformer Engine)")


def _optimizer(config: dict, settings: Any, wrapped: Any) -> Any:
    import contextlib

    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from engine.parallel import cpu

    options = OptimizerConfig(
        optimizer="adam", lr=config["lr"], min_lr=config["lr"], weight_decay=config["weight_decay"], adam_beta1=0.9,
        adam_beta2=0.95, adam_eps=1e-8, bf16=settings.bf16, params_dtype=settings.params_dtype,
        clip_grad=config["clip_grad"])
    with cpu.cuda_type_names() if config["device"] == "cpu" else contextlib.nullcontext():
        return get_megatron_optimizer(options, [wrapped], use_gloo_process_groups=False)


def _step(config: dict, wrapped: Any, optimizer: Any, device: torch.device) -> Step:
    """A global batch through Megatron's schedule, as its examples' training loop."""
    import torch
    from megatron.core.pipeline_parallel import get_forward_backward_func

    data, length = ArrayLoader(config["tokens"]), config["seq_length"]
    batch_size, micro = config["global_batch_size"], config["micro_batch_size"]
    forward_backward = get_forward_backward_func()

    def loss_of(losses_bs: torch.Tensor) -> tuple[torch.Tensor, dict]:
        loss = losses_bs.float().mean()
        return loss, {"loss": loss.detach().clone()}  # the schedule divides the other in place

    def forward(batches, model):
        batch = next(batches)
        tokens, labels, positions = (t.to(device) for t in (batch.tokens_bs, batch.labels_bs, batch.position_ids_bs))
        return model(tokens, positions, None, labels=labels), loss_of

    def step(index: int) -> torch.Tensor:
        for group in optimizer.param_groups:  # Megatron leaves it to its scheduler
            group["lr"] = config["lr"]
            group["weight_decay"] = config["weight_decay"] * group.get("wd_mult", 1.0)
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        batches = data.micro_batches(index * batch_size * length, global_batch_size=batch_size,
                                     micro_batch_size=micro, seq_length=length)
        found = forward_backward(forward_step_func=forward, data_iterator=batches, model=wrapped,
                                 num_microbatches=batch_size // micro, seq_length=length, micro_batch_size=micro,
                                 forward_only=False)
        stepped, _, _ = optimizer.step()
        assert stepped
        return torch.stack([entry["loss"] for entry in found]).mean()

    return step


if __name__ == "__main__":
    serve(build)
