"""Every contradiction: the field that is named, and the way out."""

from __future__ import annotations

import importlib.util
import re

import pytest

from engine.config import Config
from engine.errors import UserError

MOE = {"moe": {"num_experts": 8}}
SP2 = {"tensor": 2, "sequence_parallel": True}

# (sections, message): the message is complete, so that a test reads like what a user sees.
REFUSALS = [
    # shape
    ({"model": {"num_attention_heads": 5}},
     "model.num_attention_heads: 5 heads do not divide hidden_size 384. Use 4 heads, or set model.head_dim"),
    ({"model": {"num_query_groups": 4}}, "model.num_query_groups: 4 groups do not divide 6 heads. Use 3 groups"),
    ({"model": {"head_dim": 33}},
     "model.head_dim: 33 is odd, and the rotary embedding turns pairs. Use fewer or more heads, or set an even "
     "model.head_dim"),
    ({"model": {"rotary_percent": 0.01}}, "model.rotary_percent: 0.01 of a head of 64 is less than one pair. Use 1.0"),
    ({"model": {"full_attention_every": 2}}, "model.full_attention_every: is for models with a window, but "
     "window_size is null. "
     "Set model.window_size, or full_attention_every to null"),
    ({"model": {"yarn": {}, "backend": "te"}},
     "model.yarn: is built into the engine's attention, but backend is te. Use backend engine"),
    ({"model": {"seq_length": 8192, "yarn": {"factor": 1.5, "original_seq_length": 4096}}},
     "model.yarn.factor: stretches the context to 6144 tokens, but model.seq_length is 8192. Raise factor, or lower "
     "model.seq_length"),
    ({"model": {"llama3_rope": {}, "backend": "te"}},
     "model.llama3_rope: is built into the engine's attention, but backend is te. Use backend engine"),
    ({"model": {"llama3_rope": {"low_freq_factor": 4}}},
     "model.llama3_rope.low_freq_factor: 4.0 is not below high_freq_factor (4.0). Use 1 and 4"),
    ({"model": {"llama3_rope": {}, "yarn": {}}},
     "model.llama3_rope: stretches the context, but so does yarn. Set one of the two to null"),
    ({"model": {"yarn": {"beta_slow": 40}}}, "model.yarn.beta_slow: 40.0 is not below beta_fast (32.0). Use 1 and 32"),
    # experts
    ({"model": {"moe": {"num_experts": 4, "top_k": 5}}},
     "model.moe.top_k: 5 experts a token, but only 4 experts. Use top_k of at most 4"),
    ({"model": {"moe": {"top_k": 1}}}, "model.moe.router: softmax over a single chosen expert is always 1, so the "
     "router would not "
     "learn. Use router softmax_before_topk or sigmoid, or top_k of 2"),
    ({"model": {"moe": {"expert_bias": True}}},
     "model.moe.expert_bias: needs sigmoid scores, but router is softmax_after_topk. Use router sigmoid"),
    ({"model": {"moe": {"num_dense_layers": 6}}},
     "model.moe.num_dense_layers: 6 leaves no expert layer of the 6. Lower it, or set model.moe to null"),
    ({"model": MOE, "parallel": {"expert": 3}},
     "parallel.expert: 3 ranks do not divide model.moe.num_experts (8). The nearest layout that works: "
     "parallel.expert 4"),
    ({"parallel": {"expert": 2}},
     "parallel.expert: 2 ranks share experts, but the model has none (model.moe is null). The nearest layout that "
     "works: parallel.expert 1"),
    ({"parallel": {"expert_tensor": 2}},
     "parallel.expert_tensor: 2 ranks share experts, but the model has none (model.moe is null). The nearest layout "
     "that works: parallel.expert_tensor 1"),
    ({"model": MOE, "parallel": {"tensor": 2}},
     "parallel.sequence_parallel: a mixture of experts (model.moe) with parallel.tensor 2 needs it. The nearest "
     "layout that works: parallel.sequence_parallel true"),
    ({"model": {"moe": {"ffn_hidden_size": 100}}, "parallel": {"expert_tensor": 3}},
     "parallel.expert_tensor: 3 ranks do not divide an expert's model.moe.ffn_hidden_size (100). The nearest layout "
     "that works: parallel.expert_tensor 4"),
    ({"model": {"moe": {"shared_ffn_hidden_size": 101}}, "parallel": SP2},
     "parallel.tensor: 2 does not divide model.moe.shared_ffn_hidden_size (101). The nearest layout that works: "
     "parallel.tensor 1, parallel.sequence_parallel false, parallel.expert_tensor 2"),
    ({"model": {**MOE, "linear_bias": True}, "parallel": SP2},
     "parallel.tensor: experts with biases (model.linear_bias) cannot be split over 2 ranks. The nearest layout that "
     "works: parallel.expert_tensor 1"),
    ({"model": MOE, "train": {"precision": "fp16"}},
     "train.precision: fp16 does not go with model.moe: experts would scale by themselves. "
     "Use train.precision bf16"),
    # layout
    ({"parallel": {"tensor": 4}},
     "parallel.tensor: 4 does not divide model.num_attention_heads (6). The nearest layout that works: "
     "parallel.tensor 2"),
    ({"model": {"num_attention_heads": 12, "num_query_groups": 3}, "parallel": {"tensor": 2}},
     "parallel.tensor: 2 and model.num_query_groups (3) do not divide each other. The nearest layout that works: "
     "parallel.tensor 1"),
    ({"model": {"ffn_hidden_size": 1001}, "parallel": {"tensor": 2}},
     "parallel.tensor: 2 does not divide model.ffn_hidden_size (1001). The nearest layout that works: "
     "parallel.tensor 1"),
    ({"parallel": {"sequence_parallel": True}},
     "parallel.sequence_parallel: shares sequences over tensor ranks, but parallel.tensor is 1. The nearest layout "
     "that works: parallel.sequence_parallel false"),
    ({"model": {"seq_length": 1023}, "parallel": SP2},
     "parallel.sequence_parallel: shares model.seq_length (1023) over parallel.tensor 2 ranks, which do not divide "
     "it. The nearest layout that works: parallel.sequence_parallel false"),
    ({"train": {"seq_length_schedule": [{"step": 0, "seq_length": 511}]}, "parallel": SP2},
     "parallel.sequence_parallel: shares train.seq_length_schedule.0.seq_length (511) over parallel.tensor 2 ranks, "
     "which do not divide it. The nearest layout that works: parallel.sequence_parallel false"),
    ({"parallel": {"pipeline": 4}},
     "parallel.pipeline: 4 stages do not divide model.num_layers (6). The nearest layout that works: "
     "parallel.pipeline 3"),
    ({"parallel": {"pipeline": 2, "virtual_pipeline": 2}},
     "parallel.virtual_pipeline: 2 stages of 2 chunks do not divide model.num_layers (6). The nearest layout that "
     "works: parallel.virtual_pipeline 3"),
    ({"model": {"num_layers": 8}, "parallel": {"pipeline": 3, "virtual_pipeline": 2}},
     "parallel.pipeline: 3 stages of 2 chunks do not divide model.num_layers (8). The nearest layout that works: "
     "parallel.pipeline 4"),
    ({"parallel": {"virtual_pipeline": 2}},
     "parallel.virtual_pipeline: 2 chunks interleave pipeline stages, but parallel.pipeline is 1. The nearest layout "
     "that works: parallel.virtual_pipeline 1"),
    ({"parallel": {"pipeline": 3, "virtual_pipeline": 2}},
     "train.global_batch_size: 32 gives 32 micro-batches, not a multiple of parallel.pipeline (3) as interleaving "
     "(parallel.virtual_pipeline) needs. The nearest layout that works: parallel.virtual_pipeline 1"),
    ({"model": {"seq_length": 1026}, "parallel": {"context": 2}},
     "model.seq_length: 1026 tokens do not divide into 2 x parallel.context = 4 equal parts. The nearest layout that "
     "works: parallel.context 3"),
    ({"parallel": {"context": 2}, "train": {"seq_length_schedule": [{"step": 0, "seq_length": 510}]}},
     "train.seq_length_schedule.0.seq_length: 510 tokens do not divide into 2 x parallel.context = 4 equal parts. "
     "The nearest layout that works: parallel.context 1"),
    # batches
    ({"train": {"micro_batch_size": 5}}, "train.global_batch_size: 32 is not a multiple of train.micro_batch_size (5). "
     "Use 30 or 35, or a micro_batch_size that divides 32"),
    ({"train": {"batch_size_schedule": {"start": 64, "every_steps": 1}}},
     "train.batch_size_schedule.start: 64 is above train.global_batch_size (32). Use at most 32"),
    ({"train": {"batch_size_schedule": {"start": 3, "every_steps": 1}}},
     "train.batch_size_schedule.start: 3 does not double to train.global_batch_size (32). Use 16, 8, 4"),
    ({"train": {"micro_batch_size": 4, "batch_size_schedule": {"start": 2, "every_steps": 1}}},
     "train.batch_size_schedule.start: 2 is not a multiple of train.micro_batch_size (4). Use 4"),
    ({"train": {"batch_size_schedule": {"kind": "ramp", "start": 4, "every_steps": 1, "increment": 3}}},
     "train.batch_size_schedule.increment: steps of 3 from 4 miss train.global_batch_size (32). Use a divisor of 28"),
    ({"train": {"batch_size_schedule": {"kind": "ramp", "start": 4, "every_steps": 1}}},
     "train.batch_size_schedule.increment: a ramp needs an increment. Set it, or use kind doubling"),
    ({"train": {"batch_size_schedule": {"start": 4, "every_steps": 1, "increment": 4}}},
     "train.batch_size_schedule.increment: doubling has no increment. Remove it, or use kind ramp"),
    # sequence lengths
    ({"train": {"seq_length_schedule": [{"step": 5, "seq_length": 64}]}},
     "train.seq_length_schedule.0.step: the first stage begins at step 5. Begin with step 0"),
    ({"train": {"seq_length_schedule": [{"step": 0, "seq_length": 64}, {"step": 0, "seq_length": 128}]}},
     "train.seq_length_schedule.1.step: step 0 does not come after step 0. List the stages in ascending order of "
     "steps"),
    ({"train": {"seq_length_schedule": [{"step": 0, "seq_length": 2048}]}}, "train.seq_length_schedule.0.seq_length: "
     "2048 tokens are "
     "more than the context, model.seq_length (1024). Use at most 1024, or raise model.seq_length"),
    # learning rate
    ({"train": {"lr": 1e-4, "min_lr": 1e-3}}, "train.min_lr: 0.001 is above train.lr (0.0001). Lower min_lr, or raise "
     "lr"),
    ({"train": {"max_steps": 50, "warmup_steps": 60}},
     "train.warmup_steps: 60 warmup steps in a run of 50 (train.max_steps). Use at most 50, for example 5"),
    ({"train": {"max_steps": 50, "warmup_steps": 20, "decay_steps": 40}},
     "train.decay_steps: 20 warmup and 40 decay steps are more than the 50 of train.max_steps. Use at most 30"),
    ({"train": {"schedule": "constant", "decay_steps": 4}},
     "train.decay_steps: a constant schedule does not decay. Remove it, or use train.schedule wsd"),
    # precision and devices
    ({"device": "cpu", "train": {"precision": "fp16"}},
     "train.precision: fp16 needs a CUDA GPU, but device is cpu. Use bf16 or fp32"),
    ({"train": {"loss_scale": 1024}},
     "train.loss_scale: is for fp16, but train.precision is auto. Set it to null, or train.precision to fp16"),
    ({"train": {"fp8": True, "precision": "fp16"}},
     "train.fp8: goes with bf16, but train.precision is fp16. Use train.precision bf16"),
    ({"device": "cpu", "model": {"backend": "te"}},
     "model.backend: Transformer Engine needs a CUDA GPU, but device is cpu. Use backend engine"),
    # out of memory
    ({"train": {"enable_oom_recovery": True}, "parallel": {"tensor": 2, "pipeline": 2}},
     "train.enable_oom_recovery: only data-parallel ranks can agree on a retry, but parallel.tensor 2 and "
     "parallel.pipeline 2 is set. "
     "Set it to false (--no-enable-oom-recovery), or those sizes to 1"),
    # data
    ({"data": {"path": "a", "blend": [{"path": "b"}]}},
     "data.blend: data.path and data.blend are both set. Keep one; put the path into the blend with its weight"),
    ({"data": {"blend": [{"path": "b"}, {"path": "b"}]}},
     "data.blend.1.path: b is listed twice. Merge the two entries into one weight"),
    ({"data": {"blend": [{"path": "a"}, {"path": "b", "weight": None}]}},
     "data.blend.1.weight: is null, but other entries have a weight. Give every entry one, or set all to null"),
    ({"data": {"blend": [{"path": "a", "weight": 0}]}},
     "data.blend: no entry has a weight above 0. Give at least one entry a positive weight"),
    ({"data": {"path": "a", "blend_changes": [{"step": 1, "weights": [1]}]}},
     "data.blend_changes: is set, but data.blend is empty. Remove it, or name a blend"),
    ({"data": {"path": "a", "blend_by": "documents"}},
     "data.blend_by: is set, but data.blend is empty. Remove it, or name a blend"),
    ({"data": {"blend": [{"path": "a"}], "blend_changes": [{"step": 1, "weights": [1, 2]}]}},
     "data.blend_changes.0.weights: 2 weights for 1 entries of data.blend. Give one for each entry, in their order"),
    ({"data": {"blend": [{"path": "a"}], "blend_changes": [{"step": 5, "weights": [1]}, {"step": 5, "weights": [2]}]}},
     "data.blend_changes.1.step: step 5 does not come after step 5. List the changes in ascending order of steps"),
    ({"data": {"blend": [{"path": "a"}], "blend_changes": [{"step": 5, "weights": [0]}]}},
     "data.blend_changes.0.weights: no entry has a weight above 0. Give at least one entry a positive weight"),
    ({"data": {"blend": [{"path": "a"}], "blend_changes": [{"step": 5, "weights": [-1]}]}},
     "data.blend_changes.0.weights.0: -1.0 is no weight. Give a number that is not negative"),
    # experts and what only some backends have
    ({"model": {**MOE, "linear_bias": True, "moe": {"shared_ffn_hidden_size": 64}}},
     "model.moe.shared_ffn_hidden_size: a shared expert has no biases, but model.linear_bias is true. "
     "Set it to null, or model.linear_bias to false"),
    ({"model": {**MOE, "backend": "te"}},
     "model.backend: te does not have this engine's model.moe. Use backend engine"),
    ({"model": {"activation": "clamped_swiglu", "backend": "te"}},
     "model.backend: te does not have this engine's model.activation. Use backend engine"),
]  # fmt: skip


@pytest.mark.parametrize(("sections", "message"), REFUSALS, ids=[message.partition(":")[0] for _, message in REFUSALS])
def test_contradictions(sections, message):
    with pytest.raises(UserError) as caught:
        Config.model_validate(sections)
    first = str(caught.value)
    assert re.sub(r" \(and \d+ more\)$", "", first) == message


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
def test_fp8_needs_nothing_else(device):
    cfg = Config(device=device, train={"fp8": True})
    assert (cfg.train.fp8_recipe.scaling, cfg.train.fp8_recipe.granularity) == ("current", "tensorwise")


def test_fp8_without_transformer_engine(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "transformer_engine" else found(name, *rest)
    )
    with pytest.raises(UserError) as caught:
        Config(model={"backend": "te"}, train={"fp8": True})
    assert str(caught.value) == (
        "train.fp8: model.backend is te, but Transformer Engine is not installed. "
        "Use model.backend engine, or pip install 'mainspring[te]' on a machine with a GPU"
    )


def test_fp8_with_transformer_engine(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: found("json" if name == "transformer_engine" else name, *rest)
    )
    assert Config(model={"backend": "te"}, train={"fp8": True}).train.fp8
    for sections, message in [
        ({"model": {"backend": "reference"}}, r"^train\.fp8: the reference backend multiplies in the parameters'"),
        (
            {"model": {"backend": "te", "ffn_hidden_size": 1000}},
            r"^model\.ffn_hidden_size: 1000 features on a rank "
            r"are not a multiple of 16",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            Config(**sections, train={"fp8": True})
    with pytest.raises(UserError, match=r"^model\.backend: Transformer Engine needs a CUDA GPU, but device is cpu"):
        Config(device="cpu", model={"backend": "te"}, train={"fp8": True})
    with pytest.raises(UserError, match=r"^train\.fp8_recipe: is the engine's, but model\.backend is te"):
        Config(model={"backend": "te"}, train={"fp8": True, "fp8_recipe": {"margin": 1}})


@pytest.mark.parametrize(("sections", "message"), [
    ({"train": {"fp8_recipe": {"scaling": "delayed", "granularity": "rowwise"}}},
     "train.fp8_recipe.granularity: rows are other tokens in every step, but scaling is delayed. "
     "Use granularity tensorwise, or scaling current"),
    ({"train": {"fp8_recipe": {"first_layers_bf16": 2, "last_layers_bf16": 4}}},
     "train.fp8_recipe.last_layers_bf16: with 2 first and 4 last layers in bf16, none of model.num_layers (6) is left "
     "for FP8. Use fewer than 6 in all, or train.fp8 false (--no-fp8)"),
    ({"model": {"ffn_hidden_size": 1040}, "parallel": {"tensor": 2}},
     "model.ffn_hidden_size: 520 features on a rank are not a multiple of 16, as FP8 needs (train.fp8). "
     "Use a multiple of 32, or --no-fp8"),
    ({"model": {"head_dim": 8, "num_attention_heads": 3}},
     "model.head_dim: 72 features on a rank are not a multiple of 16, as FP8 needs (train.fp8). "
     "Use heads of more features, or --no-fp8"),
    ({"model": {"hidden_size": 376, "num_attention_heads": 4, "head_dim": 64}},
     "model.hidden_size: 376 features on a rank are not a multiple of 16, as FP8 needs (train.fp8). "
     "Use a multiple of 16, or --no-fp8"),
    ({"model": MOE | {"moe": {"shared_ffn_hidden_size": 40}}},
     "model.moe.shared_ffn_hidden_size: 40 features on a rank are not a multiple of 16, as FP8 needs (train.fp8). "
     "Use a multiple of 16, or --no-fp8"),
])
def test_fp8_of_the_engine(sections, message):
    sections = sections | {"train": {"fp8": True} | sections.get("train", {})}
    with pytest.raises(UserError) as caught:
        Config.model_validate(sections)
    assert str(caught.value) == message


def test_several_problems_are_counted():
    with pytest.raises(UserError) as caught:
        Config(parallel={"tensor": 4, "pipeline": 4, "sequence_parallel": False}, train={"enable_oom_recovery": True})
    assert str(caught.value).startswith("parallel.tensor: 4 does not divide model.num_attention_heads (6)")
    assert str(caught.value).endswith("(and 2 more)")


@pytest.mark.parametrize(("sections", "message"), [
    ({"train": {"lr": "fast"}}, "train.lr: got 'fast', expected a number above 0 and at most 1,000"),
    ({"train": {"lr": True}}, "train.lr: got true, expected a number above 0 and at most 1,000"),
    ({"train": {"lr": float("nan")}}, "train.lr: got nan, expected a number above 0 and at most 1,000"),
    ({"train": {"max_steps": 2.5}}, "train.max_steps: got 2.5, expected a whole number from 1 to 1,000,000,000,000"),
    ({"train": {"max_steps": None}}, "train.max_steps: got null, expected a whole number from 1 to 1,000,000,000,000"),
    ({"train": {"schedule": "cosin"}},
     "train.schedule: got 'cosin', expected one of linear, cosine, wsd, constant. Did you mean cosine?"),
    ({"train": {"fp8": "maybe"}}, "train.fp8: got 'maybe', expected true or false"),
    ({"output_dir": 3}, "output_dir: got 3, expected a path (text; quote it if it looks like a number)"),
    ({"parallel": 3}, None),
    ({"data": {"blend": [{"weight": 1}]}}, "data.blend.0.path: is required: a path (text; quote it if it looks like a "
     "number)"),
    ({"data": {"blend": "x"}}, "data.blend: got 'x', expected a list, each item a mapping with the fields path, "
     "weight, max_epochs"),
    ({"model": {"num_layers": 10**5000}}, "model.num_layers: got a number of more than 60 digits, expected a whole "
     "number from 1 to 10,000"),
    ({"trian": {}}, "trian: unknown field. Did you mean train?"),
    ({"lr": 1}, "lr: unknown field. Did you mean train.lr?"),
    ({"train": {"learning_rate": 1}}, "train.learning_rate: unknown field. Did you mean train.lr?"),
    ({"train": {"hidden_size": 1}}, "train.hidden_size: unknown field. Did you mean model.hidden_size?"),
    ({"model": {"moe": {"topk": 1}}}, "model.moe.topk: unknown field. Did you mean model.moe.top_k?"),
    ({"evaluation": {"zzzz": 1}}, "evaluation.zzzz: unknown field. The fields here are eval_steps, eval_batches"),
    ({"evaluation": {"a\nb": 1}}, "evaluation.'a\\nb': unknown field. The fields here are eval_steps, eval_batches"),
])  # fmt: skip
def test_wrong_types_and_names(sections, message):
    with pytest.raises(UserError) as caught:
        Config(**sections)
    if message is None:
        message = "parallel: got 3, expected a mapping with the fields " + ", ".join(
            type(Config().parallel).model_fields
        )
    assert str(caught.value) == message


def test_a_misspelt_name_comes_before_what_is_missing():
    with pytest.raises(
        UserError,
        match=r"^data\.blend\.0\.pth: unknown field\. Did you mean data\.blend\.0\.path\? "
        r"\(and 1 more\)$",
    ):
        Config(data={"blend": [{"pth": "x"}]})
