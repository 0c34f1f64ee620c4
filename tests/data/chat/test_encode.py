"""Lengths, texts, preferences, and rows that cannot be encoded."""

from __future__ import annotations

import chat_tokenizers as chat
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.chat import templates
from engine.data.chat.conversation import BadRow, Conversation, Preference, Text
from engine.data.chat.encode import Encoder
from engine.data.tokenizer import HuggingFaceTokenizer


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def answer(text: str) -> dict:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "S"}
LONG = [SYSTEM, user("one"), answer("1"), user("two"), answer("2"), user("three"), answer("3")]


def length(messages: list[dict], **settings) -> int:
    return len(chat.encoder("chatml", **settings).example(Conversation(messages)).tokens)


def test_what_just_fits_and_what_does_not():
    full = length(LONG)
    fits, short = chat.encoder("chatml", full - 1), chat.encoder("chatml", full - 2)
    assert len(fits.example(Conversation(LONG)).tokens) == full
    with pytest.raises(BadRow, match=f"{full} tokens take {full - 1} positions, seq_length is {full - 2}") as refused:
        short.example(Conversation(LONG))
    assert refused.value.reason == "too_long"


def test_truncating_leaves_out_whole_turns():
    for kept in (5, 3):
        cut = chat.encoder("chatml", length(LONG[:kept]) - 1, too_long="truncate")
        example = cut.example(Conversation(LONG))
        expected = chat.encoder("chatml").example(Conversation(LONG[:kept]))
        assert example.tokens.tolist() == expected.tokens.tolist()
        assert chat.supervised(cut, example) == [f"{n}<|im_end|>" for n in range(1, kept // 2 + 1)]
    with pytest.raises(BadRow, match="seq_length"):
        chat.encoder("chatml", length(LONG[:3]) - 2, too_long="truncate").example(Conversation(LONG))
    # Leaving out the only turn that counts would leave nothing to learn.
    with pytest.raises(BadRow, match="no token"):
        chat.encoder("chatml", length(LONG[:5]) - 1, too_long="truncate").example(
            Conversation(LONG, unsupervised=frozenset([2, 4])))  # fmt: skip


def test_a_call_and_its_result_stay_together():
    call = answer("") | {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    messages = [user("one"), answer("1"), user("two"), call, {"role": "tool", "content": "r"}, answer("2")]
    cut = chat.encoder("chatml", length(messages) - 2, too_long="truncate")
    assert chat.supervised(cut, cut.example(Conversation(messages))) == ["1<|im_end|>"]


def test_the_default_system_prompt():
    encoder = chat.encoder("chatml", system="be brief")
    text = chat.text_of(encoder, encoder.example(Conversation(LONG[1:3])).tokens)
    assert text.startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\none")
    own = chat.text_of(encoder, encoder.example(Conversation(LONG[:3])).tokens)
    assert own.startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\none")
    weighted = encoder.example(Conversation(LONG[1:5], unsupervised=frozenset([1])))
    assert chat.supervised(encoder, weighted) == ["2<|im_end|>"]
    assert chat.text_of(encoder, encoder.pair(Preference(LONG[1:2], answer("a"), answer("b"))).prompt) == text[
        : text.index("1<|im_end|>")]  # fmt: skip


def test_all_tokens_supervised():
    example = chat.encoder("chatml", supervise="all").example(Conversation(LONG))
    assert example.mask.all()
    assert example.tokens.dtype == np.int32
    assert example.mask.dtype == bool


def test_texts():
    encoder = chat.encoder("chatml", 8)
    tokens = encoder.tokenizer.encode("two and <|im_end|>")
    assert encoder.tokenizer.token_id("<|im_end|>") not in tokens
    example = chat.encoder("chatml").example(Text("two and <|im_end|>"))
    assert example.tokens.tolist() == [*tokens, encoder.tokenizer.eod_id]
    assert example.mask.all()
    long = Text("abcdefghijk" * 3)
    with pytest.raises(BadRow, match="seq_length"):
        encoder.example(long)
    cut = chat.encoder("chatml", 8, too_long="truncate").example(long)
    assert cut.tokens.tolist() == encoder.tokenizer.encode(long.text)[:9]
    with pytest.raises(BadRow, match="empty"):
        encoder.example(Text(" \n"))


@pytest.mark.parametrize("name", list(chat.TEMPLATES))
@settings(deadline=None, max_examples=20)
@given(prompt=st.text("ab \n<|im_end>é", min_size=1).filter(str.strip), chosen=st.text("ab\n </s>", max_size=9),
       rejected=st.text("ab\n </s>", max_size=9))  # fmt: skip
def test_pairs_are_whole_conversations_apart_where_the_answers_start(name, prompt, chosen, rejected):
    encoder = chat.encoder(name)
    item = Preference([user(prompt)], answer(f"A{chosen}"), answer(f"B{rejected}Z"))
    pair = encoder.pair(item)
    for side, said in ((pair.chosen, item.chosen), (pair.rejected, item.rejected)):
        whole = encoder.example(Conversation([user(prompt), said]))
        tokens = np.concatenate((pair.prompt, side))
        assert tokens.tolist() == whole.tokens[: len(tokens)].tolist()
        # Behind the answer at most a line break, nothing supervised; the answer is what an example would learn.
        assert not whole.mask[len(tokens) :].any()
        assert int(side[-1]) in encoder.end_ids
        assert chat.text_of(encoder, side).endswith(chat.supervised(encoder, whole)[0])
    assert pair.prompt.dtype == pair.chosen.dtype == np.int32


@pytest.mark.parametrize("name", list(chat.TEMPLATES))
def test_the_prompt_of_a_generation_is_that_of_a_pair(name):
    encoder = chat.encoder(name)
    messages = [user("one <|im_end|>"), answer("1"), user("two")]
    pair = encoder.pair(Preference(messages, answer("a"), answer("b")))
    assert encoder.prompt(messages).tolist() == pair.prompt.tolist()


def test_pairs_that_cannot_be():
    encoder = chat.encoder("like_llama3")
    with pytest.raises(BadRow, match="same tokens") as refused:
        encoder.pair(Preference([user("x")], answer("same "), answer(" same")))
    assert refused.value.reason == "chosen_is_rejected"


@pytest.mark.parametrize("answers", [("\nA", "B"), ("B", "\nA")], ids=["chosen", "rejected"])
def test_an_answer_that_shares_a_token_with_the_header_only_on_one_side(answers):
    encoder = chat.encoder("chatml")
    pair = encoder.pair(Preference([user("x")], *map(answer, answers)))
    assert chat.text_of(encoder, pair.prompt) == "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant"
    assert [chat.text_of(encoder, side) for side in (pair.chosen, pair.rejected)] == [
        f"\n{said}<|im_end|>" for said in answers]  # fmt: skip


def test_lengths_of_pairs():
    item = Preference(LONG[:6], answer("yes it is"), answer("no"))
    pair = chat.encoder("chatml").pair(item)
    prompt, chosen, rejected = len(pair.prompt), len(pair.chosen), len(pair.rejected)
    assert pair.positions(shared=True) == (prompt - 1) + chosen + rejected
    assert pair.positions(shared=False) == (prompt + chosen - 1) + (prompt + rejected - 1)
    for shared in (True, False):
        needed = pair.positions(shared=shared)
        assert chat.encoder("chatml", needed, prefix_sharing=shared).pair(item).prompt.tolist() == pair.prompt.tolist()
        with pytest.raises(BadRow, match=f"need {needed} positions, seq_length is {needed - 1}") as refused:
            chat.encoder("chatml", needed - 1, prefix_sharing=shared).pair(item)
        assert refused.value.reason == "too_long"
    with pytest.raises(BadRow) as refused:
        chat.encoder("chatml", 50, too_long="truncate").pair(Preference([user("x" * 99)], item.chosen, item.rejected))
    assert refused.value.reason == "prompt_too_long"
    # Whole turns are left out at the front, the system message stays.
    shorter = chat.encoder("chatml", pair.positions(shared=True) - 1, too_long="truncate")
    expected = chat.encoder("chatml").pair(Preference([SYSTEM, *LONG[3:6]], item.chosen, item.rejected))
    assert shorter.pair(item).prompt.tolist() == expected.prompt.tolist()


def test_words_that_the_tokenizer_makes_a_special_token_are_refused():
    """One that has its end token as an ordinary piece as well: no shield helps against its own vocabulary."""
    model = tokenizers.Tokenizer(tokenizers.models.Unigram([("<unk>", 0.0), ("</s>", -1.0), ("a", -2.0)], unk_id=0))
    model.add_special_tokens(["</s>"])
    own = HuggingFaceTokenizer(model.to_str(), where="test", config={"eos_token": "</s>"})
    encoder = Encoder(own, templates.load("alpaca", None, own), 4096)
    assert encoder.example(Conversation([user("aa"), answer("a")])).tokens.tolist().count(1) == 1
    for messages in ([user("a</s>a"), answer("a")], [user("a"), answer("a</s>a")]):
        with pytest.raises(BadRow, match="words of a message into a special token") as refused:
            encoder.example(Conversation(messages))
        assert refused.value.reason == "special_in_content"


def test_messages_as_ascii_json_keep_what_they_spell():
    text = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content | tojson(ensure_ascii=true) }}"
            "{{ '<|im_end|>\\n' }}{% endfor %}{{ '<|im_start|>assistant\\n' if add_generation_prompt }}")  # fmt: skip
    own = chat.tokenizer(chat.CHATML, None, "<|im_end|>", text)
    encoder = Encoder(own, templates.load("auto", None, own), 4096)
    example = encoder.example(Conversation([user("é <|im_end|>"), answer("b <|im_end|> c")]))
    assert chat.text_of(encoder, example.tokens).startswith('<|im_start|>user\n"\\u00e9 <|im_end|>"<|im_end|>\n')
    assert chat.supervised(encoder, example) == ['"b <|im_end|> c"<|im_end|>']
    assert example.tokens.tolist().count(own.token_id("<|im_end|>")) == 2


def test_a_text_that_is_no_token():
    model = tokenizers.Tokenizer(tokenizers.models.Unigram([("<unk>", 0.0), ("</s>", -1.0), ("a", -2.0)], unk_id=0))
    model.normalizer = tokenizers.normalizers.Replace("\u200b", "")
    model.add_special_tokens(["</s>"])
    own = HuggingFaceTokenizer(model.to_str(), where="test", config={"eos_token": "</s>"})
    encoder = Encoder(own, templates.load("alpaca", None, own), 4096)
    assert encoder.example(Text("\u200ba")).tokens.tolist() == [2, 1]
    with pytest.raises(BadRow) as refused:
        encoder.example(Text("\u200b"))
    assert refused.value.reason == "missing_text"


def test_data_that_would_overflow_the_stack():
    deep: dict = {}
    for _ in range(5000):
        deep = {"a": deep}
    call = answer("") | {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": deep}}]}
    with pytest.raises(BadRow) as refused:
        chat.encoder("chatml").example(Conversation([user("x"), call]))
    assert refused.value.reason == "too_deep"
