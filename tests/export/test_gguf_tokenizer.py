"""Tokenizers in the words of GGUF: which split, which types, which special ids; and llama.cpp's own ids beside ours."""

from __future__ import annotations

import io
import json

import pytest
import tokenizers
from tiny_transformers import save, tokenizer
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from engine.errors import UserError
from engine.export import gguf, gguf_tokenizer, gguf_verify, sentencepiece
from engine.export.gguf_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from engine.export.tokenizer_files import SAMPLES

TEXTS = [*SAMPLES, "low lower lowest, 12 1234567 new newer", "the cat isn't there; it's here"] * 20
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
O200K = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
         r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
         r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def by(pattern: str):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES])


PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False)
SPLITS = {
    "smaug-bpe": by(LLAMA3), "qwen2": by(LLAMA3.replace("{1,3}", "")), "gpt-4o": by(O200K), "gpt-2": PLAIN,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), PLAIN]),
}  # fmt: skip


def trained(split, *, size: int = 500, normalizer=None) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = split, decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|endoftext|>", "<s>"], initial_alphabet=sorted(alphabet),
        show_progress=False))
    return made


def placed(made: tokenizers.Tokenizer, directory, **config):
    directory.mkdir(exist_ok=True)
    made.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"} | config))
    return directory


def changed(directory, **model):
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"] |= model
    path.write_text(json.dumps(content))


def ids_of(directory, texts=SAMPLES, rows: int | None = None):
    """llama.cpp's ids for a model with this directory's tokenizer."""
    pytest.importorskip("llama_cpp")
    size = rows or tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab_size()
    model_directory = directory.parent / "model"
    save("llama", model_directory, vocab_size=size, num_hidden_layers=1)
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja"):
        (model_directory / name).unlink(missing_ok=True)
        if (directory / name).exists():
            (model_directory / name).write_bytes((directory / name).read_bytes())
    (directory.parent / "m.gguf").unlink(missing_ok=True)
    gguf.write(model_directory, directory.parent / "m.gguf", "f32")
    llama = gguf_verify.load(directory.parent / "m.gguf", context=64)
    found = [llama.tokenize(text.encode(), add_bos=False, special=False) if text else [] for text in texts]
    llama.close()
    return found


@pytest.mark.parametrize("pre", SPLITS)
def test_each_split_has_its_name_and_llama_cpp_gives_the_same_ids(pre, tmp_path):
    made = trained(SPLITS[pre])
    directory = placed(made, tmp_path / "t")
    found = gguf_tokenizer.read(directory, made.get_vocab_size())
    assert (found.model, found.pre) == ("gpt2", pre)
    assert found.tokens == [made.id_to_token(i) for i in range(made.get_vocab_size())]
    assert found.types == [CONTROL, CONTROL] + [NORMAL] * (made.get_vocab_size() - 2)
    marks = pre == "gpt-4o"  # which llama.cpp cannot keep with their letter there
    assert [note[:50] for note in found.notes] == ["llama.cpp splits words at combining marks, this to"] * marks
    texts = [text for text in (*SAMPLES, *TEXTS[-2:]) if "\u0301" not in text or not marks]
    assert ids_of(directory, texts) == [made.encode(text, add_special_tokens=False).ids for text in texts]


def test_merges_and_types_and_padding_of_our_own_tokenizer(tmp_path):
    tokenizer().save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    found = gguf_tokenizer.read(tmp_path, 704)
    assert found.merges == [" ".join(pair) for pair in content["model"]["merges"]]
    assert found.tokens[:3] == ["<|endoftext|>", "<|pad|>", "<|im_start|>"]
    assert found.types == [CONTROL] * 16 + [NORMAL] * 684 + [UNUSED] * 4
    assert found.tokens[700:] == ["[PAD700]", "[PAD701]", "[PAD702]", "[PAD703]"]
    assert found.special == {"eos": 0, "pad": 1}
    assert (found.add_bos, found.add_eos, found.chat_template) == (False, False, None)
    with pytest.raises(UserError, match="the tokenizer has 700 tokens, the model's embedding 699"):
        gguf_tokenizer.read(tmp_path, 699)


def test_bos_chat_template_end_of_turn_and_added_tokens(tmp_path):
    made = trained(SPLITS["gpt-2"])
    size = made.get_vocab_size()
    made.add_tokens([AddedToken("<tool>", special=False), AddedToken("<|turn|>", special=True)])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    directory = placed(made, tmp_path / "t", bos_token={"content": "<s>"}, chat_template="{{ messages }}")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, size + 1]}))
    found = gguf_tokenizer.read(directory, size + 2)
    assert found.special == {"bos": 1, "eos": 0, "eot": size + 1}
    assert (found.add_bos, found.add_eos) == (True, False)
    assert found.tokens[size:] == ["<tool>", "<|turn|>"]
    assert found.types[size:] == [USER_DEFINED, CONTROL]
    assert found.chat_template == "{{ messages }}"
    (directory / "chat_template.jinja").write_text("{{ other }}")
    assert gguf_tokenizer.read(directory, size + 2).chat_template == "{{ other }}"
    pytest.importorskip("llama_cpp")
    assert ids_of(directory, ["a <tool> b<|turn|>"])[0] == made.encode("a <tool> b", add_special_tokens=False).ids + (
        made.encode("<", add_special_tokens=False).ids + ids_of(directory, ["|turn|>"])[0])  # special text stays text
    llama = gguf_verify.load(tmp_path / "m.gguf", context=64)
    assert llama.tokenize(b"a<|turn|>", add_bos=True, special=True)[0] == 1
    assert llama.tokenize(b"a<|turn|>", add_bos=True, special=True)[-1] == size + 1
    assert (llama.token_bos(), llama.token_eos(), llama.metadata["tokenizer.chat_template"]) == (1, 0, "{{ other }}")
    llama.close()


def test_ignore_merges_picks_the_name_or_is_shown_to_make_no_difference(tmp_path):
    made = trained(SPLITS["smaug-bpe"])
    directory = placed(made, tmp_path / "t")
    changed(directory, ignore_merges=True)
    assert gguf_tokenizer.read(directory, made.get_vocab_size()).pre == "llama-bpe"
    made = trained(SPLITS["qwen2"])
    directory = placed(made, tmp_path / "u")
    changed(directory, ignore_merges=True)  # llama.cpp's qwen2 merges always
    assert gguf_tokenizer.read(directory, made.get_vocab_size()).pre == "qwen2"
    merges = json.loads((directory / "tokenizer.json").read_text())["model"]["merges"]
    changed(directory, merges=merges[:-1])  # now the last token is reached as a whole word only
    with pytest.raises(UserError, match=r"ignore_merges is True, and llama.cpp's qwen2 does it the other way"):
        gguf_tokenizer.read(directory, made.get_vocab_size())


def sentencepiece_model(kind: str, tmp_path, **options):
    import sentencepiece as spm

    options = {"byte_fallback": True, "normalization_rule_name": "identity",
               "remove_extra_whitespaces": False} | options
    trained = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=trained, model_type=kind, vocab_size=400, minloglevel=2,
        user_defined_symbols=["<tool>"], character_coverage=1.0, hard_vocab_limit=False, num_threads=1, **options)
    directory = tmp_path / "t"
    directory.mkdir()
    (directory / "tokenizer.model").write_bytes(trained.getvalue())
    return directory, spm.SentencePieceProcessor(model_proto=trained.getvalue())


def test_sentencepiece_bpe_from_the_model_and_from_its_tokenizer_json(tmp_path):
    directory, model = sentencepiece_model("bpe", tmp_path)
    found = gguf_tokenizer.read(directory, len(model))
    assert (found.model, found.space_prefix) == ("llama", True)
    assert found.tokens == [model.id_to_piece(i) for i in range(len(model))]
    assert found.scores == [model.get_score(i) for i in range(len(model))]
    assert found.types[:5] == [UNKNOWN, CONTROL, CONTROL, USER_DEFINED, BYTE]
    expected = [model.encode(text) for text in SAMPLES]
    assert ids_of(directory, rows=len(model)) == expected
    (tmp_path / "json").mkdir()
    sentencepiece.convert((directory / "tokenizer.model").read_bytes()).save(str(tmp_path / "json/tokenizer.json"))
    again = gguf_tokenizer.read(tmp_path / "json", len(model))
    assert (again.model, again.tokens, again.types) == ("llama", found.tokens, found.types)
    best = sorted(range(len(model)), key=lambda i: -again.scores[i])
    order = [found.tokens[i] for i in best if again.scores[i] > -1e8]
    assert order == [model.id_to_piece(i) for i in sorted(range(len(model)), key=lambda i: -model.get_score(i))
                     if model.id_to_piece(i) in set(order)]  # fmt: skip
    assert ids_of(tmp_path / "json", rows=len(model)) == expected


def test_sentencepiece_unigram(tmp_path):
    directory, model = sentencepiece_model("unigram", tmp_path, byte_fallback=False, normalization_rule_name="nmt_nfkc",
                                           remove_extra_whitespaces=True)
    found = gguf_tokenizer.read(directory, len(model))
    assert (found.model, found.remove_extra_spaces, found.space_prefix) == ("t5", True, True)
    assert found.charsmap
    texts = ["The quick brown fox", "low lower lowest, 12", "naïve café ﬁ ①", "two  spaces,   three"]
    assert ids_of(directory, texts, rows=len(model)) == [model.encode(text) for text in texts]


def test_tokenizers_that_llama_cpp_lacks_are_refused(tmp_path):
    from engine.data.tokenizer import train_tokenizer

    def refused(directory, message):
        with pytest.raises(UserError, match=message) as raised:
            gguf_tokenizer.read(directory, 10_000)
        assert str(directory) in str(raised.value)

    train_tokenizer(TEXTS, 400, "unigram").save(tmp_path / "unigram")
    refused(tmp_path / "unigram", "llama.cpp has no byte-level Unigram tokenizer")
    refused(placed(trained(by(r"\p{L}+|\s+|.")), tmp_path / "split"), "splits text in a way that llama.cpp has no name")
    lower = trained(SPLITS["gpt-2"], normalizer=normalizers.Lowercase())
    refused(placed(lower, tmp_path / "lower"), "normalises text by Lowercase")
    prefixed = pre_tokenizers.ByteLevel(add_prefix_space=True)
    refused(placed(trained(prefixed), tmp_path / "prefix"), "add_prefix_space")
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    refused(placed(words, tmp_path / "words"), "no WordLevel tokenizer")
    directory, _ = sentencepiece_model("bpe", tmp_path, byte_fallback=False)
    refused(directory, "no SentencePiece BPE without byte fallback")
    (tmp_path / "words/tokenizer.json").write_text("{")
    refused(tmp_path / "words", "tokenizer.json: cannot be read")
    directory = placed(trained(SPLITS["gpt-2"], normalizer=normalizers.NFC()), tmp_path / "nfc")
    composed = gguf_tokenizer.read(directory, 600)
    assert composed.notes == ["llama.cpp does not compose accents (NFC) before it splits text, this tokenizer does"]
