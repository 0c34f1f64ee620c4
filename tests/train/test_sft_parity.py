"""SFT's gradients: packed like unpacked, and both like TRL's trainer with assistant masks, from the same JSON Lines."""

from __future__ import annotations

import json
from pathlib import Path

import hugging_face
import pytest
import sft_runs
import tiny
import torch

from engine.model.answers import ANSWERS

SEQ = 96
# With marks, which TRL needs to find the answers; the engine is also given the same template without.
# Newlines behind a tag are dropped by Jinja, so that one is written as an expression.
MARKED = ("{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}\n{% else %}"
          "A:{% generation %} {{ m.content }}{{ eos_token }}{% endgeneration %}{{ '\\n' }}{% endif %}{% endfor %}"
          "{% if add_generation_prompt %}A:{% endif %}")
PLAIN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def rows() -> list[dict]:
    found = []
    for i in range(24):
        turns = []
        for turn in range(1 + i % 3):
            asked = " ".join(tiny._WORDS[(i * k + turn) % 13] for k in range(1, 3 + i % 5))
            turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": f"the {asked[:9]} {i}"}]
        found.append({"messages": turns})
    return found


@pytest.fixture
def data(corpus, tmp_path: Path):
    """A JSON Lines file, and the corpus's tokenizer with the marked template as its own."""
    import shutil

    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    (tmp_path / "plain.jinja").write_text(PLAIN)
    shutil.copytree(corpus / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "tokenizer/chat_template.jinja").write_text(MARKED)
    return tmp_path


def one_step(config, data: Path, **changes):
    """The engine's whole epoch in one step: -> initial weights, result, gradients, all of the unsplit model."""
    from engine.data.examples import build

    tiny.forget_layout()
    cfg = config(model__seq_length=SEQ, train__clip_grad=0.0, model__tie_embeddings=False,
                 examples__train=[{"path": str(data / "chat.jsonl")}], **changes)
    run = tiny.start(cfg)
    run.data.close()
    loader = build.build(cfg, data / "tokenizer", "train", dp_rank=0, dp_size=1)
    assert loader.num_examples == len(rows())
    cfg = cfg.with_values({"train.global_batch_size": loader.rows_per_epoch})
    weights = tiny.whole_weights(run)
    result = sft_runs.Run(cfg, run.groups, loader, run.chunks, run.optimizer, run.state, ANSWERS).step()
    return cfg, weights, result, tiny.whole_weights(run, lambda p: p.main_grad)


def test_packed_and_unpacked_rows_have_the_same_gradients(config, data):
    packed, _, one, gradients = one_step(config, data)
    single, _, other, expected = one_step(config, data, examples__packing=False)
    assert packed.train.global_batch_size < single.train.global_batch_size == len(rows())
    assert one.sums.tokens == other.sums.tokens
    assert (one.sums.correct, one.sums.extra) == (other.sums.correct, other.sums.extra)
    assert one.sums.loss == pytest.approx(other.sums.loss, rel=1e-6)
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-6 * gradient.norm(), name
        assert gradient.norm() > 0


def theirs(policy, data: Path):
    """TRL's loss on all rows as one batch, which it tokenizes and masks itself; the model holds the gradients."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(data / "tokenizer")
    args = trl.SFTConfig(output_dir=str(data / "trl"), use_cpu=True, bf16=False, report_to=[], max_length=SEQ + 1,
                         assistant_only_loss=True, gradient_checkpointing=False)
    trainer = trl.SFTTrainer(model=policy, args=args, train_dataset=datasets.Dataset.from_list(rows()),
                             processing_class=tokenizer)
    found = [trainer.train_dataset[i] for i in range(len(rows()))]
    batch = trainer.data_collator(found)
    tokens = int((batch["labels"][:, 1:] != -100).sum())
    loss = trainer.compute_loss(policy.train(), dict(batch))
    loss.backward()
    return loss.item(), tokens


@pytest.mark.parametrize("template", ["marked", "plain"])
def test_one_step_equals_trl(config, data, template):
    changes = {} if template == "marked" else {"examples__template": str(data / "plain.jinja")}
    cfg, weights, result, gradients = one_step(config, data, **changes)
    policy = hugging_face.model("Llama", weights, cfg.model, vocab_size=tiny.VOCAB)
    loss, tokens = theirs(policy, data)
    assert result.sums.tokens == tokens
    assert result.sums.loss == pytest.approx(loss, rel=1e-5)
    ours = hugging_face.state_dict(gradients, cfg.model)
    for key, parameter in policy.named_parameters():
        assert (ours[key][: len(parameter)] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), key


def test_accuracies_are_those_of_the_logits(config, corpus):
    """Counted by hand, document by document, from whole logits."""
    tiny.forget_layout()
    run = sft_runs.start(config(**sft_runs.MODEL, train__micro_batch_size=2))
    for _ in range(4):
        run.step()
    found = run.evaluate()
    right = tokens = exact = documents = 0
    for example in [store.example(i) for store in run.data.corpus.stores for i in range(len(store))]:
        inputs = torch.from_numpy(example.tokens[:-1]).long()[None]
        with torch.no_grad():
            logits = run.chunks[0].eval()(inputs, torch.arange(inputs.shape[1])[None], None)
        hits = logits[0, :, : tiny.VOCAB].argmax(-1) == torch.from_numpy(example.tokens[1:]).long()
        supervised = torch.from_numpy(example.mask[1:])
        right += int(hits[supervised].sum())
        tokens += int(supervised.sum())
        documents += bool(supervised.any())
        exact += bool(supervised.any() and hits[supervised].all())
    assert found["tokens"] == tokens
    assert found["accuracy"] == right / tokens
    assert found["sequence_accuracy"] == exact / documents
    assert 0 < exact < documents
