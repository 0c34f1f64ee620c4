"""Special tokens come from templates only, and the borders between tokens are those of the whole text."""

from __future__ import annotations

import io

import chat_tokenizers as chat
import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from engine.data.chat.conversation import BadRow
from engine.data.chat.special import spelling
from engine.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, train_tokenizer

NAMES = ("<s>", "</s>", "<s><s>", "[INST]", "<|end|>")
BYTES = chat.tokenizer(NAMES, "<s>", "</s>")
SPELLING = spelling(BYTES)
PIECES = st.lists(st.sampled_from([*NAMES, "<", "s", ">", "<s", "s>", "a", "\n\n", " ", "é", "<think>", "🙂", "[INST"]))


def lifted(*parts: str) -> str:
    """Messages and template in turns, as twins and plain text."""
    shielded = [SPELLING.shield(part) if i % 2 == 0 else part for i, part in enumerate(parts)]
    return SPELLING.plain(SPELLING.twins("".join(shielded)))


@given(before=PIECES, token=st.sampled_from(NAMES), after=PIECES)
def test_a_message_spells_and_a_template_means(before, token, after):
    one, other = "".join(before), "".join(after)
    assert SPELLING.twins(SPELLING.shield(one)) == SPELLING.shield(one)
    assert SPELLING.plain(SPELLING.shield(one)) == one
    text = lifted(one, f"\t{token}\t", other)
    assert SPELLING.written(text) == f"{one}\t{token}\t{other}"
    ids, ranges = SPELLING.encode(text)
    assert BYTES.decode(ids.tolist()) == f"{one}\t{token}\t{other}"
    special = np.isin(ids, list(SPELLING.specials.values()))
    assert ids[special].tolist() == [BYTES.token_id(token)]
    # Bytes of one character share its range; else the tokens lie one behind the other.
    assert (ranges[1:, 0] >= ranges[:-1, 0]).all()
    assert ranges.min(initial=0) == 0
    assert ranges.max(initial=0) == len(text)


@given(parts=st.lists(st.sampled_from(["<s>", "</s>", "two and", " is", "\n\n", "é世", "<think>"]), max_size=8))
def test_a_text_is_tokenized_whole(parts):
    """As the tokenizer itself does it, with its special tokens switched on."""
    text = "".join(parts)
    expected = chat.model_of(NAMES).encode(text, add_special_tokens=False)
    ids, ranges = SPELLING.encode(SPELLING.twins(text))
    assert ids.tolist() == expected.ids
    if "<" not in text:
        assert ranges.tolist() == [list(offsets) for offsets in expected.offsets]


@pytest.mark.parametrize("text", ["a\U00101000", "\U0010fffd", "\ud800", "x\udfff"])
def test_characters_that_could_forge_a_token_are_refused(text):
    with pytest.raises(BadRow, match=r"holds .* \(U\+"):
        SPELLING.shield(text)
    with pytest.raises(BadRow, match=r"plane 16|surrogate"):
        SPELLING.shield_all({"a": [{text: 1}]})


def test_words_that_start_a_text_only_there():
    """A tokenizer that puts a space before the first word: not behind special tokens (Llama 2, Mistral)."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE({"▁": 0, "a": 1, "▁a": 2, "b": 3, "<s>": 4}, [("▁", "a")]))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    model.add_special_tokens(["<s>"])
    own = HuggingFaceTokenizer(model.to_str(), where="test", config={"eos_token": "<s>"})
    made = spelling(own)
    ids, ranges = made.encode(made.twins("a<s>a a"))
    assert ids.tolist() == model.encode("a<s>a a").ids == [2, 4, 1, 2]
    assert ranges.tolist() == [[0, 1], [1, 2], [2, 3], [3, 5]]


def test_special_tokens_that_take_the_blanks_behind_them():
    model = tokenizers.Tokenizer.from_str(train_tokenizer(chat.TEXTS, 300, specials=2).text)
    model.add_special_tokens([tokenizers.AddedToken("<|end|>", rstrip=True, special=True)])
    made = spelling(HuggingFaceTokenizer(model.to_str(), where="test"))
    text = "a<|end|>\n b"
    ids, _ = made.encode(made.twins(text))
    assert ids.tolist() == model.encode(text, add_special_tokens=False).ids
    spelt, _ = made.encode(made.plain(made.shield(text)))
    assert model.token_to_id("<|end|>") not in spelt.tolist()
    assert own_text(model, spelt) == text


def own_text(model: tokenizers.Tokenizer, ids: np.ndarray) -> str:
    return model.decode(ids.tolist(), skip_special_tokens=False)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece(kind):
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog", "a small world of words"] * 50),
        model_writer=out, vocab_size=300, model_type=kind, byte_fallback=True, hard_vocab_limit=False, num_threads=1,
        minloglevel=2, control_symbols=["<|end|>"], remove_extra_whitespaces=False,
    )  # fmt: skip
    own = SentencePieceTokenizer(out.getvalue(), where="test")
    made = spelling(own)
    end, bos = own.token_id("<|end|>"), own.token_id("<s>")
    said = "the fox <|end|> é世"
    text = made.plain(made.twins("<s>" + made.shield(said) + "<|end|>the dog"))
    ids, ranges = made.encode(text)
    assert [token for token in ids.tolist() if token in made.specials.values()] == [bos, end]
    place = ids.tolist().index(end)
    # The message is what the tokenizer makes of it, but for the space before the first word.
    spelt = own.encode(said)
    assert own.decode(ids[1:place].tolist()) == own.decode(spelt) == said
    assert own.decode(ids[place + 1 :].tolist()) == "the dog"
    for token, (start, stop) in zip(ids[1:place].tolist(), ranges[1:place].tolist(), strict=True):
        piece = own.decode([token])
        assert piece.strip() in text[start:stop] or "\ufffd" in piece
    assert ranges[place].tolist() == [1 + len(said), 2 + len(said)]
    # Only at the text's start, as in the tokenizer's own vocabulary; decoding would hide it.
    pieces = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    start, behind = (pieces.id_to_piece(made.encode(made.twins(f"{head}the dog"))[0].tolist()[at])
                     for head, at in (("", 0), ("<|end|>", 1)))  # fmt: skip
    assert (start[0], behind[0]) == ("▁", "t")
