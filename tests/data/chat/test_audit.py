"""The audit passes what the encoder makes, and names every kind of mask that is wrong."""

from __future__ import annotations

import chat_tokenizers as chat
import numpy as np
import pytest

from engine.data.chat import audit, templates
from engine.data.chat.conversation import Conversation, Preference, Text
from engine.data.chat.encode import Encoder, Example, Pair
from engine.errors import UserError

TALK = Conversation([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}] * 2)
ENCODER = chat.encoder("like_llama3")
GOOD = ENCODER.example(TALK)
CHOSEN, REJECTED = ({"role": "assistant", "content": text} for text in "ab")
PAIR = ENCODER.pair(Preference(TALK.messages[:1], CHOSEN, REJECTED))


def check(*examples, encoder=ENCODER, **settings):
    return audit.check(examples, encoder.tokenizer, end_ids=encoder.end_ids, bos_id=encoder.bos_id, **settings)


def check_pairs(*pairs, **settings):
    return audit.check_pairs(pairs, ENCODER.tokenizer, end_ids=ENCODER.end_ids, bos_id=ENCODER.bos_id, **settings)


def masked(mask) -> Example:
    return Example(GOOD.tokens, np.array(mask, bool))


def test_good_examples_are_counted():
    found = check(GOOD, ENCODER.example(Text("xyz")), samples=1)
    assert found.counts == {"rows": 2, "tokens": len(GOOD.tokens) + 4, "supervised_tokens": int(GOOD.mask.sum()) + 3}
    assert len(found.samples) == 1
    assert check(chat.encoder("chatml", supervise="all").example(TALK)).counts["rows"] == 1
    assert check_pairs(PAIR).counts == {"rows": 1, "tokens": sum(map(len, (PAIR.prompt, PAIR.chosen, PAIR.rejected))),
                                        "supervised_tokens": len(PAIR.chosen) + len(PAIR.rejected)}  # fmt: skip


LAST = np.flatnonzero(GOOD.mask)[-1]
FIRST_END = np.flatnonzero(GOOD.mask[:-1] & ~GOOD.mask[1:])[0]
BUT = np.arange(len(GOOD.tokens))
BOS = np.array([ENCODER.bos_id], np.int32)


@pytest.mark.parametrize(("example", "problem"), [
    (masked(GOOD.mask & False), "have no supervised token"),
    (masked(BUT > 0), "have a mask of all ones"),
    (masked(GOOD.mask & (BUT != FIRST_END)), "do not learn the end token"),
    (masked(GOOD.mask & (BUT != LAST)), "do not learn the end token"),
    (Example(np.append(BOS, GOOD.tokens), np.append(False, GOOD.mask)), "start with two beginning-of-sequence"),
    (Example(GOOD.tokens[:-1], GOOD.mask[:-1]), "end within an answer"),
])  # fmt: skip
def test_bad_examples(example, problem):
    with pytest.raises(UserError, match=rf"mask audit: 1 of 3 examples {problem}.* \(the first: a\.jsonl:7\)") as error:
        check(("a.jsonl:1", GOOD), ("a.jsonl:7", example), ("a.jsonl:8", GOOD))
    assert error.value.exit_code == 2


@pytest.mark.parametrize(("pair", "problem"), [
    (Pair(np.append(BOS, PAIR.prompt), PAIR.chosen, PAIR.rejected), "start with two beginning-of-sequence"),
    (Pair(PAIR.prompt, PAIR.chosen, PAIR.rejected[:0]), "have an empty answer"),
    (Pair(PAIR.prompt, PAIR.chosen, PAIR.chosen), "have the same answer twice"),
    (Pair(PAIR.prompt, PAIR.chosen, PAIR.rejected[:-1]), "end within an answer"),
])  # fmt: skip
def test_bad_pairs(pair, problem):
    with pytest.raises(UserError, match=f"1 of 2 examples {problem}.*the first: example 2"):
        check_pairs(PAIR, pair)


def test_the_worst_comes_first_and_the_others_are_told():
    nothing = masked(GOOD.mask & False)
    with pytest.raises(UserError, match=r"2 of 3 examples have no supervised token .*; 1 have a mask of all ones"):
        check(nothing, nothing, masked(BUT > 0))
    with pytest.raises(UserError, match="no examples are left"):
        check()


@pytest.mark.parametrize(("before", "after", "passes"), [
    ("{{ m.content }}{{ eos_token }}\n", "", True),
    ("{{ m.content }}{{ eos_token }}", "", True),
    ("{{ m.content }}", "{{ eos_token }}", False),
    ("{{ m.content }}{{ eos_token }}and more", "", False),
])
def test_marks_of_templates(before, after, passes):
    """Marks that leave out the end token are found; a line break behind it does no harm."""
    text = ("{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>' + m.content + '<|im_start|>' }}"
            f"{{% else %}}{{% generation %}}{before}{{% endgeneration %}}{after}{{% endif %}}{{% endfor %}}")
    made = chat.tokenizer(chat.CHATML, None, "<|im_end|>", text)
    encoder = Encoder(made, templates.load("auto", None, made), 4096)
    if passes:
        check(encoder.example(TALK), encoder=encoder)
    else:
        with pytest.raises(UserError, match="mask audit: 1 of 1"):
            check(encoder.example(TALK), encoder=encoder)


def test_samples_show_what_is_supervised():
    plain = check(GOOD, colour=False).samples[0]
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert plain.count(f"{header}⟦yes<|eot_id|>⟧") == 2
    coloured = check(GOOD).samples[0]
    assert coloured.count("\x1b[32myes\x1b[0m\x1b[30;42m<|eot_id|>\x1b[0m") == 2
    assert coloured.startswith("\x1b[2m<|begin_of_text|>")
    pair = check_pairs(PAIR, colour=False).samples[0]
    assert pair.endswith(f"{header}\n  chosen: ⟦a<|eot_id|>⟧\n  rejected: ⟦b<|eot_id|>⟧")
    steering = Conversation([{"role": "user", "content": "\x1b[2J" + "x" * 3000}, TALK.messages[1]])
    shown = check(ENCODER.example(steering)).samples[0]
    assert "\x1b[2J" not in shown
    assert "\\x1b[2J" in shown
    assert "characters…]" in shown
