"""Every kind of tokenizer that the engine trains with, exported: AutoTokenizer gives the same ids."""

from __future__ import annotations

import io
import json
import sysconfig
from pathlib import Path

import pytest

from engine.data.tokenizer import load_tokenizer, train_tokenizer
from engine.errors import UserError
from engine.export import sentencepiece, tokenizer_files
from engine.export.chat import Chat

KINDS = {
    "unigram": {"model_type": "unigram"},
    "unigram, bytes": {"model_type": "unigram", "byte_fallback": True},
    "llama": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
              "remove_extra_whitespaces": False, "split_digits": True},
    "bpe": {"model_type": "bpe"},
    "no prefix": {"model_type": "unigram", "add_dummy_prefix": False, "remove_extra_whitespaces": False,
                  "byte_fallback": True, "user_defined_symbols": ["<|turn|>", "    "]},
}
ENGLISH = [line for line in (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text().splitlines() if line]


@pytest.fixture(scope="module")
def trained() -> dict[str, bytes]:
    import sentencepiece as library

    found = {}
    for name, settings in KINDS.items():
        written = io.BytesIO()
        library.SentencePieceTrainer.train(
            sentence_iterator=iter([*ENGLISH, *tokenizer_files.SAMPLES[:-1] * 3]), model_writer=written,
            vocab_size=700, minloglevel=2, num_threads=1, character_coverage=0.999, **settings)
        found[name] = written.getvalue()
    return found


def folder(tmp_path: Path, proto: bytes, **config) -> Path:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.model").write_bytes(proto)
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path / "tokenizer"


@pytest.mark.parametrize("kind", KINDS)
def test_sentencepiece_has_the_same_ids(kind, trained, tmp_path):
    source = folder(tmp_path, trained[kind])
    (source / "chat_template.jinja").write_text("{{ messages }}")
    out = tmp_path / "out"
    tokens = tokenizer_files.write(source, out, 64)
    engine = load_tokenizer(source)
    tokenizer_files.check(engine, out)
    assert (out / "tokenizer.model").read_bytes() == trained[kind]
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert tokens["eos_token_id"] == engine.eod_id
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(out))
    assert theirs.eos_token_id == engine.eod_id
    assert len(theirs) == engine.vocab_size
    text = "def add(a, b):  # Привет\n\treturn a + b 🙂"
    ids = theirs.encode(text, add_special_tokens=False)
    assert ids == engine.encode(text)
    if kind == "llama":  # the others normalise, and lose what they do not know
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text
    for line in ENGLISH[:400]:
        if "===" in line:  # two ways to cut it are as likely
            continue
        assert theirs.encode(line, add_special_tokens=False) == engine.encode(line), line


def test_a_llama_tokenizer_still_begins_texts(trained, tmp_path):
    from transformers import AutoTokenizer

    cases = [({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>"}, True),
             ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, False), ({}, False)]
    for i, (config, begins) in enumerate(cases):
        (tmp_path / str(i)).mkdir()
        out = tmp_path / str(i) / "out"
        tokenizer_files.write(folder(tmp_path / str(i), trained["llama"], **config), out, 64)
        ids = AutoTokenizer.from_pretrained(str(out)).encode("a text")
        assert (ids[0] == 1) == begins, config
        assert ids[-1] != 1


def test_what_sentencepiece_alone_can_do_is_refused(tmp_path):
    import sentencepiece as library

    written = io.BytesIO()
    library.SentencePieceTrainer.train(sentence_iterator=iter(ENGLISH), model_writer=written, vocab_size=90,
                                       model_type="char", minloglevel=2)
    with pytest.raises(UserError, match="this kind of SentencePiece model has no counterpart"):
        sentencepiece.convert(written.getvalue())


def test_another_tokenizer_is_noticed(trained, tmp_path):
    """As when a normaliser were lost on the way."""
    source, out = folder(tmp_path, trained["bpe"]), tmp_path / "out"
    tokenizer_files.write(source, out, 64)
    content = json.loads((out / "tokenizer.json").read_text())
    content["normalizer"]["normalizers"] = content["normalizer"]["normalizers"][-1:]
    (out / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"AutoTokenizer gives .* the ids .*, the engine"):
        tokenizer_files.check(load_tokenizer(source), out)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_own_tokenizers_template_and_ends(kind, tmp_path):
    from transformers import AutoTokenizer

    engine = train_tokenizer(ENGLISH, 600, kind)
    engine.save(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "eos_token_id": 5}))
    end = "<|im_end|>" if engine.token_id("<|im_end|>") is not None else "<|pad|>"
    out = tmp_path / "out"
    chat = Chat("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}", end)
    found = tokenizer_files.write(tmp_path / "tokenizer", out, 64, chat)
    tokenizer_files.check(engine, out)
    assert found["eos_token_id"] == engine.eod_id
    theirs = AutoTokenizer.from_pretrained(str(out))
    assert theirs.model_max_length == 64
    assert theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<|user|>hi"
    stated = json.loads((out / "generation_config.json").read_text())
    assert stated == {"temperature": 0.6, "eos_token_id": [5, engine.eod_id, engine.token_id(end)]}


@pytest.mark.parametrize("template", ["alpaca", "chatml"])
def test_the_template_that_answers_were_trained_with_is_exported(template, tmp_path):
    """With the engine's own marks of what is generated, which Transformers understands as well."""
    from transformers import AutoTokenizer

    from engine.config import Config
    from engine.data.chat import templates
    from engine.export import chat

    engine = train_tokenizer(ENGLISH, 600)
    engine.save(tmp_path / "tokenizer")
    cfg = Config.model_validate({"examples": {"template": template}})
    assert chat.of(cfg, tmp_path / "tokenizer") is None, "pretraining has no answers"
    found = chat.of(cfg.model_copy(update={"stage": "sft"}), tmp_path / "tokenizer")
    assert found is not None
    assert found.end == {"alpaca": engine.eod_token, "chatml": "<|im_end|>"}[template]
    tokenizer_files.write(tmp_path / "tokenizer", tmp_path / "out", 64, found)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Two and two?"},
                {"role": "assistant", "content": "Four."}]
    own = templates.load(template, tmp_path / "tokenizer", engine)
    plain = own.render(messages).replace(templates.GENERATION_START, "").replace(templates.GENERATION_END, "")
    assert theirs.apply_chat_template(messages, tokenize=False) == plain
    assert theirs.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True) == own.render(
        messages[:2], prompt=True)
    marked = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert any(marked["assistant_masks"])
    assert not all(marked["assistant_masks"])
    stated = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert engine.token_id(str(found.end)) in (stated if isinstance(stated, list) else [stated])
