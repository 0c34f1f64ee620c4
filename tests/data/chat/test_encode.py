"""Lengths, texts, preferences, and rows that cannot be encoded."""

from __future__ import annotations

import chat_tokenizers as chat
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.chat.conversation import BadRow, Conversation, Preference, Text


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


def test_an_answer_that_shares_a_token_with_the_header_only_on_one_side():
    encoder = chat.encoder("chatml")
    pair = encoder.pair(Preference([user("x")], answer("\nA"), answer("B")))
    assert chat.text_of(encoder, pair.prompt) == "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant"
    assert chat.text_of(encoder, pair.chosen) == "\n\nA<|im_end|>"
    assert chat.text_of(encoder, pair.rejected) == "\nB<|im_end|>"


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


def test_data_that_would_overflow_the_stack():
    deep: dict = {}
    for _ in range(5000):
        deep = {"a": deep}
    call = answer("") | {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": deep}}]}
    with pytest.raises(BadRow) as refused:
        chat.encoder("chatml").example(Conversation([user("x"), call]))
    assert refused.value.reason == "too_deep"
