"""Tokenizers behind one interface: tokenizer.json (Hugging Face, read without transformers) and SentencePiece .model.

``encode`` takes text for what it is: no token is added, and a document that spells out ``<|endoftext|>`` does not
end there. A tokenizer's identity is ``sha256``, of its content, wherever it lies.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, overload

from engine.data.tokenizer_base import CONFIG, KINDS, Tokenizer, not_a_tokenizer
from engine.data.tokenizer_huggingface import HuggingFaceTokenizer
from engine.data.tokenizer_sentencepiece import SentencePieceTokenizer
from engine.data.tokenizer_training import EOD, special_tokens, train_bpe, train_sentencepiece, train_unigram, words
from engine.errors import UserError

__all__ = ["HuggingFaceTokenizer", "SentencePieceTokenizer", "Tokenizer", "load_tokenizer", "train_tokenizer"]

Kind = Literal["bpe", "unigram"]
Form = Literal["huggingface", "sentencepiece"]
# Travel with a Hugging Face tokenizer; none of them changes an id.
COMPANIONS = ("special_tokens_map.json", "chat_template.jinja", "generation_config.json")
MODELS = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
TOKENIZER_FILES = frozenset([*MODELS, CONFIG, *COMPANIONS])


def load_tokenizer(path: str | Path, *, eod_token: str | None = None) -> Tokenizer:
    """From a tokenizer.json, a SentencePiece .model, or a directory (Hugging Face's or a prepared one) that holds one.

    Raises UserError if it is missing, not a tokenizer, or has no end-of-document token and none is given.
    """
    path = Path(path)
    if not path.exists():
        raise UserError("no such tokenizer", where=str(path), fix=KINDS)
    file = _file_in(path) if path.is_dir() else path
    try:
        content = file.read_bytes()
        config = _config_beside(file, path.is_dir())
    except OSError as error:
        raise UserError(error.strerror or str(error), where=str(file), fix="Check its permissions.") from None
    if file.suffix == ".model":
        return SentencePieceTokenizer(content, where=str(file), config=config, eod_token=eod_token)
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise not_a_tokenizer(str(file), "it is no text") from None
    tokenizer = HuggingFaceTokenizer(text, where=str(file), config=config, eod_token=eod_token)
    if path.is_dir():
        found = {name: file.with_name(name) for name in COMPANIONS}
        tokenizer.companions = {name: beside.read_bytes() for name, beside in found.items() if beside.is_file()}
    return tokenizer


@overload
def train_tokenizer(
    texts: Iterable[str], vocab_size: int, kind: Kind = "bpe", *, specials: int = 16, eod_token: str = EOD,
    form: Literal["huggingface"] = "huggingface",
) -> HuggingFaceTokenizer: ...  # fmt: skip
@overload
def train_tokenizer(
    texts: Iterable[str], vocab_size: int, kind: Kind = "bpe", *, specials: int = 16, eod_token: str = EOD,
    form: Literal["sentencepiece"],
) -> SentencePieceTokenizer: ...  # fmt: skip
def train_tokenizer(
    texts: Iterable[str], vocab_size: int, kind: Kind = "bpe", *, specials: int = 16, eod_token: str = EOD,
    form: Form = "huggingface",
) -> Tokenizer:  # fmt: skip
    """Train a tokenizer that loses nothing: ``decode(encode(text)) == text`` for any text, whatever it was trained on.

    ``form``: a tokenizer.json, byte-level, or a SentencePiece .model with byte fallback (one more id, for <unk>).
    ``vocab_size`` (tokens) includes the ``specials`` (their ids: `special_tokens`) and the 256 bytes; with little text
    fewer are learned. The same texts in the same order give the same bytes. Raises UserError if there is no room.
    """
    if len(words(eod_token)) < 2:
        # The trainer could learn it from text, and every mention would end a document.
        raise UserError(f"{eod_token!r} is an ordinary word", where="eod_token", fix=f"Take one like {EOD}.")
    names = special_tokens(specials, eod_token)
    extra = 256 + (form == "sentencepiece")
    if vocab_size < extra + len(names):
        problem = f"{vocab_size} is too small for {extra} bytes{' and <unk>' * (extra - 256)} and {len(names)} special"
        raise UserError(f"{problem.replace('257', '256')} tokens", where="vocab_size",
                        fix=f"Set it to at least {extra + len(names)}.")  # fmt: skip
    where = f"trained {kind} tokenizer"
    if form == "sentencepiece":
        try:
            proto = train_sentencepiece(texts, vocab_size, names, kind)
        except RuntimeError as error:
            raise _no_room(vocab_size, error) from None
        return SentencePieceTokenizer(proto, where=where, eod_token=eod_token)
    model = {"bpe": train_bpe, "unigram": train_unigram}[kind](texts, vocab_size, names)
    return HuggingFaceTokenizer(model.to_str(pretty=True), where=where, eod_token=eod_token)


def _no_room(vocab_size: int, error: RuntimeError) -> UserError:
    detail = str(error).splitlines()[0][:200]
    return UserError(f"{vocab_size} cannot be trained ({detail})", where="vocab_size",
                     fix="Raise it: every character that is not rare takes an id of its own.")  # fmt: skip


def _file_in(directory: Path) -> Path:
    for folder in (directory, directory / "tokenizer"):
        for name in MODELS:
            if (folder / name).is_file():
                return folder / name
    raise UserError(
        "holds no tokenizer.json and no tokenizer.model", where=str(directory),
        fix="Save one there with transformers' AutoTokenizer.from_pretrained(…).save_pretrained(…).",
    )  # fmt: skip


def _config_beside(file: Path, in_directory: bool) -> dict:
    # A single file stands for itself: what lies beside it may belong to something else.
    beside = file.with_name(CONFIG)
    if not in_directory or not beside.is_file():
        return {}
    try:
        config = json.loads(beside.read_bytes())
    except (ValueError, RecursionError) as error:
        fix = "Mend it, or give the tokenizer file itself."
        raise UserError(f"not JSON ({error})", where=str(beside), fix=fix) from None
    if not isinstance(config, dict):
        raise UserError("not a JSON object", where=str(beside), fix="Mend it, or give the tokenizer file itself.")
    return config
