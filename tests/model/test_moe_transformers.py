"""Mixtral, Qwen3-MoE and GPT-OSS, tiny and random: the logits of Transformers' models with the same weights."""

from __future__ import annotations

import hugging_face
import pytest
import tiny
import torch

from engine.model import build, whole
from engine.parallel import topology

MOE = {"num_experts": 6, "top_k": 2, "ffn_hidden_size": 40}
QWEN = {"model__qk_norm": True, "model__tie_embeddings": False, "model__rotary_base": 1e6, "model__norm_eps": 1e-6}
GPT_OSS = {"model__linear_bias": True, "model__activation": "clamped_swiglu", "model__attention_sinks": True,
           "model__window_size": 5, "model__full_attention_every": 2, "model__tie_embeddings": False,
           "model__num_layers": 3, "model__rotary_base": 150000.0, "model__ffn_hidden_size": 40,
           "model__yarn": {"factor": 4.0, "original_seq_length": 8}, "model__moe": {**MOE, "top_k": 3}}
YARN = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "truncate": False, "original_max_position_embeddings": 8}
THEIRS = {"num_local_experts": 6, "num_experts_per_tok": 2}

CASES = {
    "mixtral": ("Mixtral", {"model__moe": {**MOE, "ffn_hidden_size": 64}}, {**THEIRS, "sliding_window": None}),
    "qwen3": ("Qwen3Moe", {**QWEN, "model__moe": MOE}, {**THEIRS, "norm_topk_prob": True, "moe_intermediate_size": 40}),
    "qwen3 not renormalised": (
        "Qwen3Moe", {**QWEN, "model__moe": {**MOE, "router": "softmax_before_topk"}},
        {**THEIRS, "norm_topk_prob": False, "moe_intermediate_size": 40}),
    "qwen3 dense first": (
        "Qwen3Moe", {**QWEN, "model__num_layers": 3, "model__moe": {**MOE, "num_dense_layers": 1}},
        {**THEIRS, "norm_topk_prob": True, "moe_intermediate_size": 40, "mlp_only_layers": [0]}),
    "gpt oss": ("GptOss", GPT_OSS, {**THEIRS, "num_experts_per_tok": 3, "sliding_window": 5, "rope_parameters": YARN}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_equals_transformers(config, case, dispatcher):
    family, changes, settings = CASES[case]
    cfg = config(**changes).with_values({"model.moe.dispatcher": dispatcher})
    model = build.model(cfg, topology.build(cfg), tiny.VOCAB)[0].eval()
    with torch.no_grad():  # norms, sinks and biases must be seen as well, and both ends of the clamped gate
        for i, p in enumerate(p for p in model.parameters() if p.dim() == 1):
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        for name, p in model.named_parameters():
            if case == "gpt oss" and name.endswith("linear_fc1.weight"):
                p.mul_(20)
    weights = whole.assemble([whole.parts([model])], tiny.VOCAB)
    theirs = hugging_face.model(family, weights, cfg.model, vocab_size=tiny.VOCAB, **settings)
    tokens_bs = torch.randint(0, tiny.VOCAB, (3, tiny.SEQ), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens_bs).logits
        found = model(tokens_bs, torch.arange(tiny.SEQ).expand_as(tokens_bs), None)[..., : tiny.VOCAB]
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < 1e-4
