"""Tiny models with experts, and what three steps of one leave behind: shared by tests and their ranks."""

from __future__ import annotations

from typing import Any

import tiny
import torch

from engine.config import Config

# What a layout could break besides: routers of every kind, their bias, shared experts, dense layers first, biases.
SHAPES: dict[str, dict[str, Any]] = {
    "mixtral": {"model__moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 48, "z_loss_coeff": 1e-2,
                               "aux_loss_coeff": 0.1}},
    "deepseek": {"model__moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 24, "shared_ffn_hidden_size": 40,
                                "num_dense_layers": 1, "router": "sigmoid", "expert_bias": True,
                                "expert_bias_update_rate": 0.05, "scaling_factor": 2.5, "aux_loss_coeff": 0.1}},
    "gpt_oss": {"model__moe": {"num_experts": 4, "top_k": 3, "ffn_hidden_size": 48, "aux_loss_coeff": 0.1},
                "model__linear_bias": True, "model__activation": "clamped_swiglu"},
    # Experts whose bias never moves from where ``three_steps`` sets it: none but the last two gets a token.
    "starved": {"model__moe": {"num_experts": 4, "top_k": 2, "router": "sigmoid", "expert_bias": True,
                               "expert_bias_update_rate": 0.0}},
    "switch": {"model__moe": {"num_experts": 4, "top_k": 1, "router": "softmax_before_topk", "z_loss_coeff": 1e-2}},
}


def _starve(run: tiny.Run) -> None:
    """See ``SHAPES``."""
    from engine.model import moe

    for _, router in moe.routers(run.chunks):
        if router.expert_bias is not None and router.config.moe_router_bias_update_rate == 0.0:
            router.expert_bias[:2] = -100.0


def one_step(cfg: Config, impl: str) -> dict[str, Any]:
    """As ``three_steps`` of one step, with routers and dispatchers, and nothing else, running ``impl``."""
    from engine.model import moe

    run = tiny.start(cfg, masked=True)
    _starve(run)
    dispatchers: list[Any] = [layer.mlp.token_dispatcher for chunk in run.chunks
                              for layer in moe.unwrap(chunk).decoder.layers if hasattr(layer.mlp, "token_dispatcher")]
    for dispatcher, (_, router) in zip(dispatchers, moe.routers(run.chunks), strict=True):
        dispatcher.impl = router.impl = impl
    result = run.step()
    assert [dispatcher.fused for dispatcher in dispatchers] == [impl == "triton"] * len(dispatchers)
    stats = result.sums.router
    assert stats is not None
    return {"losses": [result.sums.loss], "tokens": [result.sums.tokens], "norms": [result.grad_norm],
            "counts": stats.tokens_per_expert_le, "router": torch.stack([stats.aux_loss_l, stats.z_loss_l]),
            "gradients": tiny.whole_weights(run, lambda p: p.main_grad), "weights": None}


def three_steps(cfg: Config) -> dict[str, Any]:
    """Losses, norms and router statistics of each step; the first's gradients; weights and biases after the last.

    Everything of the unsplit model, the same on every rank. Loss masks are uneven.
    """
    from engine.model import moe

    run = tiny.start(cfg, masked=True)
    _starve(run)
    results, gradients = [], None
    for _ in range(3):
        results.append(run.step())
        if gradients is None and not cfg.parallel.distributed_optimizer:  # which leaves each rank a part of the sums
            gradients = tiny.whole_weights(run, lambda p: p.main_grad)
    routers = [result.sums.router for result in results]
    assert all(stats is not None for stats in routers)
    return {"losses": [r.sums.loss for r in results], "tokens": [r.sums.tokens for r in results],
            "norms": [r.grad_norm for r in results],
            "counts": torch.stack([s.tokens_per_expert_le for s in routers if s]),
            "router": torch.stack([torch.stack([s.aux_loss_l, s.z_loss_l]) for s in routers if s]),
            "gradients": gradients, "weights": tiny.whole_weights(run),
            "expert_bias": {i: r.expert_bias.clone() for i, r in moe.routers(run.chunks) if r.expert_bias is not None}}


def _errors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    return {name: ((found[name].double() - value.double()).norm() / (value.double().norm() + 1e-30)).item()
            for name, value in expected.items()}


def differences(found: dict, expected: dict, bound: float, tensors: float | None = None) -> list[str]:
    """What of ``three_steps`` is off by more than ``bound``; a tensor, by more than ``tensors``, of its own norm."""
    tensors = bound if tensors is None else tensors
    wrong = [] if found["tokens"] == expected["tokens"] else [f"tokens {found['tokens']} for {expected['tokens']}"]
    for name in ("losses", "norms"):
        numbers = {name: torch.tensor(found[name])}, {name: torch.tensor(expected[name])}
        wrong += [f"{name} {found[name]} for {expected[name]}" for error in _errors(*numbers).values() if error > bound]
    if (found["router"] - expected["router"]).abs().max() > bound:
        wrong.append(f"router losses {found['router']} for {expected['router']}")
    for kind in ("gradients", "weights"):
        if found[kind] is not None and expected[kind] is not None:
            wrong += [f"{kind}: {name} is off by {error:.1e}"
                      for name, error in _errors(found[kind], expected[kind]).items() if not error <= tensors]
    return wrong
