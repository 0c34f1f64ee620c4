"""Exact round trips, text that spells specials, identity by content, both formats, and every refusal."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.tokenizer import load_tokenizer, train_tokenizer
from engine.data.tokenizer_training import special_tokens
from engine.errors import UserError

TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "The quick brown fox jumps over the lazy dog.\n",
    "for i in range(10):\n    print(i)\n",
] * 4
BPE = train_tokenizer(TEXTS, 320)
UNIGRAM = train_tokenizer(TEXTS, 320, "unigram")
SP_BPE = train_tokenizer(TEXTS, 330, form="sentencepiece", specials=24)
SP_UNIGRAM = train_tokenizer(TEXTS, 330, "unigram", form="sentencepiece", specials=24)


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory):
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog", "a small world of words"] * 50),
        model_writer=out, vocab_size=30, model_type="unigram", num_threads=1, minloglevel=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("sp") / "my.model"
    path.write_bytes(out.getvalue())
    return path


# U+2581 is SentencePiece's space, U+2585 its end of a word.
ODD = st.sampled_from(
    ["\u2581", "\u2585", " ", "  ", "\t", "\n", "\r\n", "\0", "<0x41>", "<unk>", "<|mask|>", "\ufeff", "def"]
)
KINDS = [BPE, UNIGRAM, SP_BPE, SP_UNIGRAM]


@pytest.mark.parametrize("tokenizer", KINDS, ids=["bpe", "unigram", "sp-bpe", "sp-unigram"])
@settings(deadline=None)
@given(text=st.lists(st.one_of(st.text(), ODD)).map("".join))
def test_round_trip_is_exact_for_any_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(tokenizer.vocab_size > token >= 16 for token in ids)
    packed, lengths = tokenizer.encode_packed([text, "", text], 2)
    assert (packed.tolist(), lengths.tolist()) == (ids + ids, [len(ids), 0, len(ids)])


def test_layout_of_a_trained_vocabulary():
    assert (BPE.eod_id, BPE.eod_token, BPE.vocab_size) == (0, "<|endoftext|>", 320)
    assert [BPE.token_id(token) for token in special_tokens(16)] == list(range(16))
    assert special_tokens(6) == [
        "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>", "<|reserved_0|>", "<|reserved_1|>",
    ]  # fmt: skip
    # What was prepared with 16 keeps its meaning; more are added behind them.
    assert special_tokens(16)[4:] == [f"<|reserved_{number}|>" for number in range(12)]
    assert special_tokens(26)[:16] == special_tokens(16)
    assert special_tokens(26)[16:] == [
        "<|mask|>", "<|ignore|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>", "<|startoftext|>",
        "<|reserved_12|>", "<|reserved_13|>",
    ]  # fmt: skip
    assert BPE.token_id("no such token") is None
    # Nothing was learned from nothing: bytes follow the specials, in the order of their characters.
    bare = train_tokenizer([], 300, specials=4)
    assert bare.vocab_size == 4 + 256
    assert bare.encode("!\"a\x00") == [4, 5, 4 + ord("a") - ord("!"), 4 + 94 + 12 + 82]
    assert bare.decode(range(4, 260)) == bytes(
        b for _, b in sorted((char, byte) for byte, char in byte_alphabet().items())
    ).decode("utf-8", "replace")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("text", ["", "a", "\u4e2d\u6587" * 50, "\u4e2d" * 5000 + "\u6587 \u5b57"])
def test_a_space_that_was_hardly_seen_comes_back(text, kind):
    made = train_tokenizer([text], 320, kind, form="sentencepiece")
    for other in ("a b", "  ", "\u2581 \u2581", "x\n y ", text):
        assert made.decode(made.encode(other)) == other



@pytest.mark.parametrize("tokenizer", [SP_BPE, SP_UNIGRAM], ids=["bpe", "unigram"])
def test_layout_of_a_trained_sentencepiece_model(tokenizer, tmp_path):
    assert [tokenizer.token_id(token) for token in special_tokens(24)] == list(range(24))
    assert (tokenizer.eod_id, tokenizer.eod_token, tokenizer.token_id("<unk>")) == (0, "<|endoftext|>", 24)
    assert [tokenizer.token_id(f"<0x{byte:02X}>") for byte in range(256)] == list(range(25, 281))
    assert 281 < tokenizer.vocab_size <= 330
    # An unknown character is its bytes, a line's end too; what was learned is used.
    assert tokenizer.encode("\u5b57\n") == [25 + byte for byte in "\u5b57\n".encode()]
    assert len(tokenizer.encode("return a + b")) < 12
    space = [25 + byte for byte in "\u2581".encode()]
    assert tokenizer.encode("a\u2581b") == [*tokenizer.encode("a"), *space, *tokenizer.encode("b")]
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.sha256, again.encode(TEXTS[0])) == (tokenizer.sha256, tokenizer.encode(TEXTS[0]))
    assert tokenizer.encode("<|im_start|>")[0] >= 24
    for few in (1, 2):
        small = train_tokenizer(TEXTS, 300, specials=few, form="sentencepiece")
        assert [small.token_id(token) for token in special_tokens(few)] == list(range(few))
        assert small.token_id("<unk>") == few


def byte_alphabet() -> dict[int, str]:
    """GPT-2's: printable bytes stand for themselves, the others for characters from U+0100 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}


def test_merges_are_those_of_the_most_frequent_pairs():
    tokenizer = train_tokenizer(["aab aab aab ab"], 4 + 256 + 2, specials=4)
    # "ab" 4 times, then " aab" holds "a"+"ab" 3 times.
    assert [tokenizer.decode([token]) for token in (260, 261)] == ["ab", "aab"]
    assert tokenizer.encode("aab") == [261]
    assert [tokenizer.decode([token]) for token in tokenizer.encode("abaab")] == ["ab", "aab"]


def test_text_that_spells_a_special_is_text():
    text = "before <|endoftext|> after <|im_start|><|pad|>"
    for tokenizer in (BPE, UNIGRAM):
        ids = tokenizer.encode(text)
        assert not set(ids) & set(range(16))
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([tokenizer.eod_id, *tokenizer.encode("x")]) == "<|endoftext|>x"


def test_batch_is_what_single_texts_give():
    texts = ["", "a", *TEXTS, "é" * 100]
    assert BPE.encode_batch(texts) == [BPE.encode(text) for text in texts]
    assert BPE.encode("") == []


def test_training_gives_the_same_bytes_in_another_process():
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from engine.data.tokenizer import train_tokenizer\n"
        f"texts = {TEXTS!r}\n"
        "made = [train_tokenizer(texts, 320, kind) for kind in ('bpe', 'unigram')]\n"
        "made += [train_tokenizer(texts, 330, kind, specials=24, form='sentencepiece')\n"
        "         for kind in ('bpe', 'unigram')]\n"
        "print([one.sha256 for one in made])"
    )
    paths = [path for path in sys.path if path]
    found = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True).stdout
    assert found.strip() == str([made.sha256 for made in KINDS])


def test_identity_is_content_not_place(tmp_path):
    for name in ("one", "two/tokenizer"):
        BPE.save(tmp_path / name)
    assert load_tokenizer(tmp_path / "one").sha256 == load_tokenizer(tmp_path / "two").sha256 == BPE.sha256
    assert load_tokenizer(tmp_path / "one/tokenizer.json").sha256 == BPE.sha256
    compact = json.dumps(json.loads((tmp_path / "one/tokenizer.json").read_text()))
    (tmp_path / "compact.json").write_text(compact)
    assert load_tokenizer(tmp_path / "compact.json").sha256 == BPE.sha256
    assert load_tokenizer(tmp_path / "one", eod_token="<|im_end|>").sha256 != BPE.sha256
    assert train_tokenizer(TEXTS, 319).sha256 != BPE.sha256
    content = json.dumps(json.loads(compact), sort_keys=True, separators=(",", ":")) + "\n<|endoftext|>"
    assert hashlib.sha256(content.encode()).hexdigest() == BPE.sha256


def test_saving_a_loaded_one_changes_no_byte(tmp_path):
    model = tokenizers.Tokenizer.from_str(BPE._text)
    source = tmp_path / "hf"
    source.mkdir()
    (source / "tokenizer.json").write_text(model.to_str(pretty=False))
    (source / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|im_end|>"}, "model_max_length": 77}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    loaded = load_tokenizer(source)
    assert (loaded.eod_token, loaded.eod_id) == ("<|im_end|>", 3)
    loaded.save(tmp_path / "copy")
    again = load_tokenizer(tmp_path / "copy")
    assert (again.sha256, again.eod_id, again.encode("def")) == (loaded.sha256, 3, BPE.encode("def"))
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "copy" / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((tmp_path / "copy/tokenizer_config.json").read_text())
    assert config["model_max_length"] == 77
    assert config["eod_token"] == "<|im_end|>"


def test_switches_in_the_file_do_not_reach_pretraining(tmp_path):
    model = tokenizers.Tokenizer.from_str(BPE._text)
    model.enable_truncation(3)
    model.enable_padding(length=9)
    model.model.dropout = 0.9
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 2)]
    )
    model.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    for _ in range(20):
        assert loaded.encode(TEXTS[0]) == BPE.encode(TEXTS[0])


def test_vocabulary_with_a_gap_counts_to_its_last_id(tmp_path):
    model = json.loads(BPE._text)
    model["added_tokens"].append(dict(model["added_tokens"][0], id=400, content="<|late|>"))
    model["model"]["vocab"]["<|late|>"] = 400
    (tmp_path / "tokenizer.json").write_text(json.dumps(model))
    assert load_tokenizer(tmp_path).vocab_size == 401


def test_transformers_reads_the_directory_and_agrees(tmp_path):
    from transformers import PreTrainedTokenizerFast  # 3 s, for this one test

    BPE.save(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert theirs(TEXTS[0])["input_ids"] == BPE.encode(TEXTS[0])
    assert (theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (0, 1, 320)
    assert theirs.decode(BPE.encode(TEXTS[0])) == TEXTS[0]


def test_sentencepiece(sentencepiece_file, tmp_path):
    loaded = load_tokenizer(sentencepiece_file)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    text = "the lazy fox jumps"
    assert loaded.encode(text) == reference.encode(text)
    assert loaded.encode_batch([text, "dog"]) == [reference.encode(text), reference.encode("dog")]
    assert loaded.decode(loaded.encode(text)) == text
    assert (loaded.vocab_size, loaded.eod_id, loaded.eod_token) == (30, reference.eos_id(), "</s>")
    assert (loaded.token_id("</s>"), loaded.token_id("absent")) == (2, None)
    loaded.save(tmp_path / "copy")
    again = load_tokenizer(tmp_path / "copy")
    assert (again.sha256, again.encode(text)) == (loaded.sha256, loaded.encode(text))
    assert (tmp_path / "copy/tokenizer.model").read_bytes() == sentencepiece_file.read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.json", None, "gone.json: no such tokenizer. Give a tokenizer.json"),
        ("tokenizer.json", b"hello", "tokenizer.json: not a tokenizer (expected value at line 1 column 1)"),
        ("tokenizer.json", b"{}", "tokenizer.json: not a tokenizer (Model missing"),
        ("tokenizer.json", b"\xff\x00", "tokenizer.json: not a tokenizer (it is no text)"),
        ("my.model", b"not a protobuf", "my.model: not a tokenizer ("),
        ("my.model", b"", "my.model: not a tokenizer ("),
    ],
)
def test_not_a_tokenizer(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path / name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_directory_without_one(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds no tokenizer\.json and no tokenizer\.model\. Save one there"):
        load_tokenizer(tmp_path)
    BPE.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: not JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: not a JSON object"):
        load_tokenizer(tmp_path)


def test_end_of_document_token(tmp_path):
    text = BPE._text.replace("<|endoftext|>", "<|finis|>")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=r"no end-of-document token that we know\. Name one of its tokens with"):
        load_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path, eod_token="<|finis|>").eod_id == 0
    with pytest.raises(UserError, match=r"no token '<eod>' to end documents with\. Set --eod_token"):
        load_tokenizer(tmp_path, eod_token="<eod>")


def test_training_refusals():
    with pytest.raises(UserError, match=r"vocab_size: 271 is too small for 256 bytes and 16 special tokens\. .*272"):
        train_tokenizer(TEXTS, 271)
    assert train_tokenizer(TEXTS, 272).vocab_size == 272
    with pytest.raises(UserError, match=r"277 is too small for 256 bytes and <unk> and 21 special tokens\..*278"):
        train_tokenizer(TEXTS, 277, specials=21, form="sentencepiece")
    with pytest.raises(UserError, match=r"vocab_size: 280 cannot be trained .*smaller than required_chars.*Raise it"):
        train_tokenizer(TEXTS, 280, specials=21, form="sentencepiece")
    # A word that the trainer could learn would end a document wherever it is written.
    with pytest.raises(UserError, match="eod_token: 'EOD' is an ordinary word"):
        train_tokenizer(TEXTS, 300, eod_token="EOD")
    assert train_tokenizer(TEXTS, 300, eod_token="</s>").token_id("</s>") == 0
    assert special_tokens(5, "<|pad|>") == ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|reserved_0|>", "<|reserved_1|>"]


def test_code_in_the_file_is_not_run(tmp_path):
    BPE.save(tmp_path)
    canary = tmp_path / "canary"
    (tmp_path / "tokenization_evil.py").write_text(f"open({str(canary)!r}, 'w')")
    config = {"auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}, "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).encode("def") == BPE.encode("def")
    assert not os.path.exists(canary)
