"""Defaults, derived values, presets, schedules and the world size, by value."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from engine.config import PRESETS, BlendEntry, Config, ModelConfig, TrainConfig, fields, parameter_count
from engine.config.parameters import padded_vocab_size
from engine.errors import UserError


def test_defaults():
    cfg = Config()
    assert cfg.output_dir == Path("runs/default")
    assert (cfg.stage, cfg.resume_from_checkpoint, cfg.seed, cfg.device) == ("pretrain", "auto", 1234, "auto")
    assert (cfg.train.weight_decay, cfg.train.beta1, cfg.train.beta2, cfg.train.eps) == (0.1, 0.9, 0.95, 1e-8)
    assert (cfg.train.clip_grad, cfg.train.precision, cfg.train.fp8, cfg.train.recompute) == (
        1.0,
        "auto",
        False,
        "none",
    )
    assert cfg.model.moe is None
    assert cfg.data.blend == []
    assert (cfg.checkpoint.keep_last, cfg.checkpoint.keep_best, cfg.evaluation.eval_batches) == (2, True, None)
    assert (cfg.logging.logging_steps, cfg.logging.wandb, cfg.parallel.timeout_minutes) == (10, "off", 10)


def test_every_field_has_a_description_and_every_number_a_unit():
    unitless = {"seed", "data.shuffle_seed"}
    for leaf in fields.walk(Config):
        description = leaf.info.description
        assert description, leaf.path
        assert "\n" not in description, leaf.path
        kinds = fields.options(leaf.info.annotation)
        if int in kinds or float in kinds:
            assert bool(leaf.unit) != (leaf.path in unitless), leaf.path


def test_derived_sizes():
    model = ModelConfig(hidden_size=768, num_attention_heads=12)
    assert (model.num_query_groups, model.head_dim, model.ffn_hidden_size) == (12, 64, 2048)
    assert ModelConfig(hidden_size=512, num_attention_heads=8).ffn_hidden_size == 1408  # 1365.3 rounded up to 64
    assert ModelConfig(hidden_size=256, num_attention_heads=4, num_query_groups=2, head_dim=96).head_dim == 96
    moe = Config(model={"ffn_hidden_size": 512, "moe": {"num_experts": 4}}).model.moe
    assert moe is not None
    assert moe.ffn_hidden_size == 512


def test_derived_sizes_are_not_counted_as_set():
    changed = Config(model={"hidden_size": 512, "num_attention_heads": 8}).with_values({"model.hidden_size": 768})
    assert (changed.model.head_dim, changed.model.ffn_hidden_size) == (96, 2048)


def test_frozen_and_with_values():
    cfg = Config()
    with pytest.raises(ValidationError, match="frozen"):
        cfg.train.lr = 1.0
    changed = cfg.with_values({"train.lr": 1e-3, "data.path": "x"})
    assert (changed.train.lr, changed.data.path, cfg.train.lr) == (1e-3, Path("x"), 3e-4)
    with pytest.raises(
        UserError,
        match=r"^train\.micro_batch_sise: unknown field\. Did you mean "
        r"train\.micro_batch_size\?$",
    ):
        cfg.with_values({"train.micro_batch_sise": 2})


def test_a_preset_fills_what_is_not_set():
    model = Config(model={"preset": "7B", "num_layers": 2, "vocab_size": None}).model
    assert (model.preset, model.num_layers, model.hidden_size, model.num_query_groups) == ("7b", 2, 4096, 8)
    assert (model.seq_length, model.vocab_size, model.tie_embeddings) == (4096, None, False)
    moe = Config(model={"preset": "20b-moe", "moe": {"top_k": 2}}).model.moe
    assert moe is not None
    assert (moe.num_experts, moe.top_k, moe.ffn_hidden_size) == (32, 2, 2880)
    assert Config(model={"preset": "20b_moe", "moe": None}).model.moe is None


def test_changing_the_preset_later_replaces_what_it_filled():
    cfg = Config(model={"preset": "small", "num_layers": 3}).with_values({"model.preset": "large"})
    assert (cfg.model.num_layers, cfg.model.hidden_size, cfg.model.num_attention_heads) == (3, 768, 12)


# The stated sizes; embeddings padded to 50,304 where the preset leaves the vocabulary open. Names round generously:
# small is 10.6M and 19.3M of embedding.
@pytest.mark.parametrize(("name", "stated", "tolerance"), [
    ("small", 25e6, 0.2), ("medium", 50e6, 0.05), ("large", 125e6, 0.05), ("xl", 300e6, 0.06), ("1b", 1e9, 0.08),
    ("3b", 3e9, 0.05), ("7b", 7e9, 0.06), ("8b", 8e9, 0.01), ("20b_moe", 20e9, 0.05), ("70b", 70e9, 0.01),
    ("mixtral_8x7b", 46.7e9, 0.001), ("qwen3_30b_a3b", 30.5e9, 0.002)])  # fmt: skip
def test_preset_sizes(name, stated, tolerance):
    model = Config(model={"preset": name}).model
    assert parameter_count(model, vocab_size=50257) == pytest.approx(stated, rel=tolerance)


@pytest.mark.parametrize(("name", "layers", "hidden", "heads", "groups", "context"), [
    ("small", 6, 384, 6, 6, 1024), ("medium", 8, 512, 8, 8, 1024), ("large", 12, 768, 12, 12, 1024),
    ("xl", 24, 1024, 16, 4, 2048), ("7b", 32, 4096, 32, 8, 4096), ("8b", 32, 4096, 32, 8, 8192),
    ("20b_moe", 24, 2880, 64, 8, 4096), ("70b", 80, 8192, 64, 8, 8192), ("mixtral_8x7b", 32, 4096, 32, 8, 4096),
    ("qwen3_30b_a3b", 48, 2048, 32, 4, 4096)])  # fmt: skip
def test_preset_shapes(name, layers, hidden, heads, groups, context):
    m = Config(model={"preset": name}).model
    assert (m.num_layers, m.hidden_size, m.num_attention_heads, m.num_query_groups, m.seq_length) == (
        layers,
        hidden,
        heads,
        groups,
        context,
    )


def test_published_parameter_counts():
    published = {"8b": 8_030_261_248, "70b": 70_553_706_496, "20b_moe": 20_914_757_184,
                 "mixtral_8x7b": 46_702_792_704, "qwen3_30b_a3b": 30_532_122_624}
    assert {name: parameter_count(Config(model={"preset": name}).model) for name in published} == published
    gpt_oss = Config(model={"preset": "20b_moe"}).model
    embedding = 201088 * 2880
    assert parameter_count(gpt_oss, active=True) - embedding == pytest.approx(3.61e9, rel=0.01)
    for name, active in (("mixtral_8x7b", 12.9e9), ("qwen3_30b_a3b", 3.3e9)):
        assert parameter_count(Config(model={"preset": name}).model, active=True) == pytest.approx(active, rel=0.02)


def test_parameter_count_by_hand():
    model = ModelConfig(
        num_layers=2,
        hidden_size=8,
        num_attention_heads=2,
        num_query_groups=1,
        ffn_hidden_size=16,
        vocab_size=10,
        vocab_multiple=4,
        tie_embeddings=False,
        qk_norm=True,
        attention_bias=True,
    )
    attention = 8 * 8 + 2 * 8 * 4 + 8 * 8 + (8 + 4 + 4) + 2 * 4  # q, k and v, output, biases, two norms of a head
    assert parameter_count(model) == 2 * 12 * 8 + 2 * (attention + 3 * 8 * 16 + 2 * 8) + 8
    assert parameter_count(model, tensor=2) == parameter_count(model) + 2 * 4 * 8  # 10 words become 16 rows
    with pytest.raises(ValueError, match="pass the tokenizer's"):
        parameter_count(ModelConfig())


@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
def test_fixed_vocabularies_are_padded_alike_under_every_tensor_size(tensor):
    for name in ("7b", "8b", "20b_moe", "70b", "mixtral_8x7b", "qwen3_30b_a3b"):
        model = Config(model={"preset": name}).model
        assert model.vocab_size is not None
        assert padded_vocab_size(model, model.vocab_size, tensor) == model.vocab_size
    assert padded_vocab_size(ModelConfig(), 50257) == 50304


def test_preset_names_are_the_presets():
    assert [name for name in fields.choices(ModelConfig.model_fields["preset"].annotation) if name] == list(PRESETS)


def test_batch_size_schedules():
    doubling = TrainConfig(global_batch_size=16, batch_size_schedule={"start": 4, "every_steps": 10})
    assert [doubling.batch_size_at(s) for s in (0, 9, 10, 19, 20, 29, 30, 10**12)] == [4, 4, 8, 8, 16, 16, 16, 16]
    ramp = TrainConfig(
        global_batch_size=10, batch_size_schedule={"kind": "ramp", "start": 4, "every_steps": 5, "increment": 3}
    )
    assert [ramp.batch_size_at(s) for s in (0, 4, 5, 9, 10, 15, 100)] == [4, 4, 7, 7, 10, 10, 10]
    assert TrainConfig(global_batch_size=6).batch_size_at(3) == 6


def test_sequence_lengths_by_step():
    train = TrainConfig(seq_length_schedule=[{"step": 0, "seq_length": 512}, {"step": 10, "seq_length": 1024}])
    assert [train.seq_length_at(s, 2048) for s in (0, 9, 10, 999)] == [512, 512, 1024, 1024]
    assert TrainConfig().seq_length_at(5, 2048) == 2048


@pytest.mark.parametrize(("values", "length"), [
    ({"schedule": "cosine", "warmup_steps": 10}, 90), ({"schedule": "linear", "decay_steps": 40}, 40),
    ({"schedule": "wsd"}, 10), ({"schedule": "wsd", "decay_steps": 30}, 30), ({"schedule": "constant"}, 0),
    ({"schedule": "wsd", "warmup_steps": 95}, 5)])  # fmt: skip
def test_decay_length(values, length):
    assert TrainConfig(max_steps=100, **values).decay_length() == length


@pytest.mark.parametrize(
    ("parallel", "world", "data_parallel"),
    [({}, 1, 1), ({}, 4, 4), ({"tensor": 2}, 4, 2), ({"tensor": 2, "pipeline": 3}, 12, 2)],
)
def test_data_parallel_size(parallel, world, data_parallel):
    assert Config(parallel=parallel).data_parallel_size(world) == data_parallel


def test_data_parallel_size_with_experts():
    cfg = Config(model={"moe": {"num_experts": 8}}, parallel={"expert": 4})
    assert cfg.data_parallel_size(8) == 8
    with pytest.raises(
        UserError,
        match=r"^parallel: 6 ranks do not fit expert 4, which takes a multiple of 4\. Start "
        r"4 or 8 ranks",
    ):
        cfg.data_parallel_size(6)


@pytest.mark.parametrize(("sections", "world", "message"), [
    ({"parallel": {"tensor": 2, "pipeline": 3}}, 8,
     "parallel: 8 ranks do not fit tensor 2 x pipeline 3, which takes a multiple of 6. Start 6 or 12 ranks, or use "
     "parallel.pipeline 2"),
    ({"parallel": {"tensor": 2}}, 1,
     "parallel: 1 rank does not fit tensor 2, which takes a multiple of 2. Start 2 ranks"),
    ({}, 3,
     "train.global_batch_size: 32 sequences do not divide over 3 data-parallel ranks x train.micro_batch_size 1. Use "
     "train.global_batch_size 30 or 33, or start 2 or 4 ranks"),
    ({"train": {"micro_batch_size": 8}}, 8,
     "train.global_batch_size: 32 sequences do not divide over 8 data-parallel ranks x train.micro_batch_size 8. Use "
     "train.global_batch_size 64, or use train.micro_batch_size 4, or start 4 ranks"),
    ({"train": {"batch_size_schedule": {"start": 4, "every_steps": 1}}}, 8,
     "train.batch_size_schedule.start: 4 sequences do not divide over 8 data-parallel ranks x train.micro_batch_size "
     "1. Start 4 ranks"),
    ({"parallel": {"pipeline": 2, "virtual_pipeline": 3}, "train": {"global_batch_size": 6}}, 4,
     "train.global_batch_size: 6 sequences are 3 micro-batches on each of 2 data-parallel ranks, not a multiple of "
     "parallel.pipeline (2) as parallel.virtual_pipeline needs. Use train.global_batch_size 4 or 8, or start 2 or 6 "
     "ranks")])  # fmt: skip
def test_world_sizes_that_do_not_fit(sections, world, message):
    cfg = Config(**sections)
    with pytest.raises(UserError) as caught:
        cfg.data_parallel_size(world)
    assert str(caught.value) == message


def test_sections_may_be_given_as_models():
    cfg = Config(data={"blend": [BlendEntry(path="a", weight=2), {"path": "b"}]}, train=TrainConfig(max_steps=7))
    assert [(str(entry.path), entry.weight) for entry in cfg.data.blend] == [("a", 2.0), ("b", 1.0)]
    assert cfg.train.max_steps == 7


def test_importing_the_configuration_imports_no_framework():
    frameworks = ("torch", "megatron", "numpy", "transformers")
    code = f"import sys, engine.config; print([m for m in {frameworks} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_config_is_a_pydantic_model():
    assert issubclass(Config, BaseModel)
    assert Config.model_validate(Config().model_dump()) == Config()
