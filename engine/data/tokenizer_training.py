"""Training a byte-level tokenizer, deterministically: the same texts in the same order give the same bytes on disk."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Iterator

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

EOD = "<|endoftext|>"
PAD = "<|pad|>"
TURN = ("<|im_start|>", "<|im_end|>")
# From id 16 on, for templates that have a token for each role (Zephyr, Phi-3, GLM) and for denoising objectives.
NAMED = (
    "<|mask|>", "<|ignore|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>", "<|startoftext|>",
)  # fmt: skip
_FIRST_RESERVED = 12  # <|reserved_0|> to <|reserved_11|> fill ids 4 to 15

# Llama 3's split, known to llama.cpp by name. On the standard library's source it gives 5% fewer tokens than
# GPT-2's and trains in half the time, because an indent is not a word of its own.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Longer pieces of text would only make the trainer hold more at once.
_PIECE = 1_000_000
# SentencePiece looks at whole lines, and leaves longer ones out.
_LINE = 2000
# It writes U+2581 for a space and ends words with U+2585; a line with NUL would be left out.
_NOT_LEARNED = dict.fromkeys([0, 0x2581, 0x2585])
_SPACE = "\u2581"  # as bytes, for want of a piece in text without spaces, it would come back as itself


def special_tokens(count: int, eod: str = EOD) -> list[str]:
    """``count`` specials in the order of their ids, which is for good: data in the world was prepared with it.

    0 end of document, 1 padding, 2 and 3 a chat turn's start and end, 4 to 15 reserved, 16 to 23 ``NAMED`` (mask,
    ignore, the roles of a chat), then reserved ones again. The vocabulary's bytes follow, then what was learned.
    """
    reserved = [f"<|reserved_{number}|>" for number in range(max(count, _FIRST_RESERVED))]
    others = [PAD, *TURN, *reserved[:_FIRST_RESERVED], *NAMED, *reserved[_FIRST_RESERVED:]]
    return [eod, *(token for token in others if token != eod)][:count]


def alphabet() -> list[str]:
    """The 256 characters that stand for the bytes."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def words(text: str) -> list[str]:
    """The pieces that training never joins, in the byte alphabet."""
    return [word for word, _ in _byte_level(models.BPE()).pre_tokenizer.pre_tokenize_str(text)]


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for start in range(0, len(text), _PIECE):
            yield text[start : start + _PIECE]


def train_bpe(texts: Iterable[str], vocab_size: int, specials: list[str]) -> tokenizers.Tokenizer:
    """Byte-pair encoding. The vocabulary is smaller than asked for where the texts hold too few pairs."""
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_pieces(texts), trainer)
    return tokenizer


def train_unigram(texts: Iterable[str], vocab_size: int, specials: list[str]) -> tokenizers.Tokenizer:
    """Unigram language model, trained by SentencePiece: `tokenizers`' own trainer gave another vocabulary on every run.

    SentencePiece sees the words that the tokenizer will see, with their counts, and only finds the pieces.
    """
    import sentencepiece  # not needed by the default kind

    counts = Counter(word for text in _pieces(texts) for word in words(text))
    counts.update(alphabet())  # a byte that it never saw would not get into the vocabulary
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(f"{word}\t{count}" for word, count in sorted(counts.items())),
        input_format="tsv", model_writer=trained, model_type="unigram", vocab_size=vocab_size - len(specials) + 1,
        hard_vocab_limit=False, character_coverage=1.0,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        split_by_unicode_script=False, split_by_whitespace=False, split_by_number=False,
        bos_id=-1, eos_id=-1, pad_id=-1, num_threads=1, minloglevel=2,
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    learned = [(model.id_to_piece(i), model.get_score(i)) for i in range(len(model)) if not model.is_unknown(i)]
    tokenizer = _byte_level(models.Unigram([(token, 0.0) for token in specials] + learned))
    tokenizer.add_special_tokens(specials)
    return tokenizer


def train_sentencepiece(texts: Iterable[str], vocab_size: int, specials: list[str], kind: str) -> bytes:
    """A .model, ``kind`` bpe or unigram: text as it is (identity), no space put before it, unknown characters as bytes.

    Ids: the specials, <unk> (which byte fallback never gives), the 256 bytes, what was learned. Learned of lines, so a
    line's end is a byte. Raises RuntimeError of the library where the text's characters do not fit.
    """
    import sentencepiece

    trained = io.BytesIO()
    eod, *rest = specials
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_lines(texts), model_writer=trained, model_type=kind, vocab_size=vocab_size,
        hard_vocab_limit=False, byte_fallback=True, character_coverage=0.9995, required_chars=_SPACE,
        max_sentence_length=8 * _LINE,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, split_digits=True, num_threads=1, minloglevel=2,
        eos_id=0, eos_piece=eod, bos_id=-1, unk_id=len(specials), pad_id=1 if rest else -1,
        pad_piece=rest[0] if rest else PAD, control_symbols=rest[1:],
    )  # fmt: skip
    return trained.getvalue()


def _lines(texts: Iterable[str]) -> Iterator[str]:
    some = False
    for text in texts:
        for line in text.translate(_NOT_LEARNED).split("\n"):
            for start in range(0, len(line), _LINE):
                some = True
                yield line[start : start + _LINE]
    if not some:
        yield "a"  # the trainer wants a sentence
