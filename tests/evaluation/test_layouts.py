"""Evaluation and generation from a checkpoint under every layout equal those of one rank, whatever layout saved it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from engine import evaluate, generate
from engine.checkpoint import restore
from engine.config.inference import EvaluationLayout
from engine.errors import UserError

PROMPT = "the spring stores"
TASKS = {
    "prompt": PROMPT,
    "evaluate": [{}, {"batch_size": 3, "max_sequences": 7, "seq_length": 12}],
    "generate": [{"max_new_tokens": 8, "temperature": 0.0},
                 {"max_new_tokens": 8, "temperature": 1.0, "top_p": 0.9, "num_samples": 3, "seed": 5}],
}
# Sharp enough logits that no choice depends on rounding.
SHAPE = {"model__num_layers": 4, "model__init_std": 0.3, "train__global_batch_size": 8, "train__max_steps": 9}
UNTIED = {"model__tie_embeddings": False, "model__qk_norm": True, "model__num_query_groups": 1}
EXPERTS = {"model__moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 24, "shared_ffn_hidden_size": 40,
                          "num_dense_layers": 1, "router": "sigmoid", "expert_bias": True}}
GPT_OSS = {"model__moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 48}, "model__linear_bias": True,
           "model__activation": "clamped_swiglu", "model__attention_sinks": True, "model__window_size": 5,
           "model__full_attention_every": 2}
# name: (changes to the shape, the layout that trains and saves it)
CHECKPOINTS = {
    "one": ({}, None),
    "tp2": (UNTIED, {"parallel.tensor": 2, "parallel.sequence_parallel": True}),
    "interleaved": ({}, {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2}),
    "ep2": (EXPERTS, {"parallel.expert": 2}),
    "gpt_oss": (GPT_OSS, {"parallel.pipeline": 2}),
}
LAYOUTS: dict[str, dict] = {
    "dp2": {}, "tp2": {"tensor": 2}, "tp2_sp": {"tensor": 2, "sequence_parallel": True}, "pp2": {"pipeline": 2},
    "cp2": {"context": 2}, "ep2": {"expert": 2}, "tp2_ep2": {"tensor": 2, "expert": 2, "expert_tensor": 1},
    "tp2_pp2": {"tensor": 2, "pipeline": 2}, "ep2_pp2": {"expert": 2, "pipeline": 2}, "pp4": {"pipeline": 4},
    "tp2_ep2_dp2": {"tensor": 2, "expert": 2},
}
READS = {
    2: [("one", "dp2"), ("one", "tp2"), ("one", "tp2_sp"), ("one", "pp2"), ("one", "cp2"),
        ("tp2", "pp2"), ("tp2", "tp2"), ("interleaved", "tp2"), ("interleaved", "pp2"),
        ("ep2", "ep2"), ("ep2", "tp2"), ("ep2", "pp2"), ("ep2", "dp2"),
        ("gpt_oss", "ep2"), ("gpt_oss", "tp2_ep2"), ("gpt_oss", "cp2")],
    4: [("tp2", "tp2_pp2"), ("interleaved", "pp4"), ("ep2", "ep2_pp2"), ("ep2", "tp2_ep2_dp2")],
}


@pytest.fixture(scope="module")
def checkpoints(corpus, tmp_path_factory) -> dict[str, Path]:
    return {name: tmp_path_factory.mktemp("layouts") / name for name in CHECKPOINTS}


@pytest.fixture(scope="module")
def results(corpus, checkpoints, tmp_path_factory) -> dict:
    """What two ranks found, after they trained those checkpoints that are theirs, and then four."""
    configs = {name: tiny.config(corpus, checkpoints[name], **SHAPE | changes)
               for name, (changes, _) in CHECKPOINTS.items()}
    run = tiny.start(configs["one"])
    run.step()
    run.save()
    found: dict = {"read": {}}
    for world, reads in READS.items():
        folder = tmp_path_factory.mktemp("job")
        job = {"train": [(tiny.to_json(configs[name]), layout) for name, (_, layout) in CHECKPOINTS.items()
                         if layout and world == 2],
               "read": {f"{source}-{target}": (str(checkpoints[source]), LAYOUTS[target]) for source, target in reads},
               "tasks": TASKS, "command line": str(checkpoints["one"])}
        (folder / "job.json").write_text(json.dumps(job))
        for code, output in tiny.launch(Path(__file__).with_name("layouts_worker.py"), world, folder):
            assert code == 0, output[-5000:]
        new = json.loads((folder / "results.json").read_text())
        found["read"] |= new.pop("read")
        found[world] = new
    return found


@pytest.mark.parametrize("source", CHECKPOINTS)
def test_every_layout_equals_one_rank(results, checkpoints, source):
    restored = restore.model(checkpoints[source])
    evaluated = [evaluate.run(restored, **options) for options in TASKS["evaluate"]]
    generated = [generate.continuations(restored, PROMPT, **options) for options in TASKS["generate"]]
    whole = sum(p.numel() for p in restored.chunks[0].parameters())
    assert len({*generated[1], *generated[0]}) == 4, "the draws do not differ: nothing is sampled"
    for target in (target for start, target in [*READS[2], *READS[4]] if start == source):
        found = results["read"][f"{source}-{target}"]
        assert (found["parameters"] == whole) == (target in ("dp2", "cp2")), target
        for one, other in zip(found["evaluate"], evaluated, strict=True):
            assert one["tokens"] == other["tokens"], target
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-6), target
            assert one["accuracy"] == pytest.approx(other["accuracy"], abs=2 / other["tokens"]), target
        assert found.get("generate", generated) == generated, target


def test_the_main_rank_alone_reads_the_prompt_and_prints(results, checkpoints):
    with restore.model(checkpoints["one"]) as restored:
        expected = generate.continuations(restored, PROMPT, max_new_tokens=5, temperature=0.0)[0]
    for world in READS:
        assert results[world]["command line"] == [f"{PROMPT}{expected}\n", *[""] * (world - 1)]


@pytest.mark.parametrize(("command", "words", "world", "message"), [
    ("generate", ["--parallel.tensor", "3"], 3,
     r"parallel\.tensor: 3 does not divide model\.num_attention_heads \(4\)\. The nearest layout"),
    ("evaluate", ["--parallel.pipeline", "3"], 3,
     r"parallel\.pipeline: 3 stages do not divide model\.num_layers \(4\)\. The nearest layout"),
    ("generate", ["--parallel.expert", "2"], 2, r"parallel\.expert: 2 ranks share experts, but the model has none"),
    ("generate", ["--parallel.tensor", "2"], 1,
     r"parallel: 1 rank does not fit tensor 2, which takes a multiple of 2\. Start 2 ranks"),
    ("evaluate", ["--parallel.pipeline", "2"], 3, r"parallel: 3 ranks do not fit pipeline 2.* Start 2 or 4 ranks"),
    ("generate", [], 2, r"parallel: 2 ranks would hold 2 copies of the model that generate the same text\. Start 1"),
    ("generate", ["--parallel.tensor", "2"], 4, r"parallel: 4 ranks would hold 2 copies .* Start 2"),
    ("evaluate", ["--parallel.tensor", "2", "--parallel.sequence_parallel", "--seq_length", "13"], 2,
     r"parallel\.sequence_parallel: shares model\.seq_length \(13\) over parallel\.tensor 2 ranks, which do"),
    ("evaluate", ["--parallel.context", "2", "--seq_length", "14"], 2,
     r"seq_length: 14 tokens do not divide into 2 x parallel\.context = 4 equal parts\. The nearest layout"),
    ("evaluate", ["--seq_length", "17"], 2, r"seq_length: 17 tokens is longer than the model's context \(16\)"),
    ("generate", ["--parallel.context", "2"], 2, r"--parallel\.context: unknown option"),
    ("generate", ["--parallel.sequence_parallel"], 2, r"--parallel\.sequence_parallel: unknown option"),
])
def test_impossible_layouts_are_refused_before_anything_starts(results, checkpoints, monkeypatch, command, words, world,
                                                              message):
    def started(*_, **__):
        raise AssertionError("started")

    monkeypatch.setattr(restore.topology, "build", started)
    monkeypatch.setattr(restore.layout, "verify", started)
    for name, value in {"RANK": 0, "WORLD_SIZE": world, "MASTER_ADDR": "localhost", "MASTER_PORT": 9}.items():
        monkeypatch.setenv(name, str(value))
    main = {"generate": generate.main, "evaluate": evaluate.main}[command]
    with pytest.raises(UserError, match=message):
        main(["--checkpoint", str(checkpoints["one"]), *words, *(["--prompt", "a"] if command == "generate" else [])])


def test_ranks_end_with_one_line(results, checkpoints):
    """The modules as torchrun starts them."""
    script = Path(evaluate.__file__ or "")
    ranks = tiny.launch(script, 2, "--checkpoint", checkpoints["one"], "--parallel.expert", 2)
    assert [code for code, _ in ranks] == [2, 2]
    lines = [line for _, output in ranks for line in output.splitlines() if line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: parallel.expert: 2 ranks share experts, but the model has none")


def test_no_text_where_ranks_share_the_sequence(results, checkpoints, monkeypatch):
    with restore.model(checkpoints["one"]) as restored:
        monkeypatch.setattr(restored.chunks[0].config, "sequence_parallel", True)
        with pytest.raises(UserError, match="parallel: ranks cannot share the single token that is new"):
            generate.continuations(restored, PROMPT)


def test_the_default_layout_is_one_piece():
    assert EvaluationLayout().model_dump() == {"tensor": 1, "pipeline": 1, "expert": 1, "expert_tensor": None,
                                               "context": 1, "sequence_parallel": False}
