"""The tokenizer of an export, its chat template and the generation config, as Transformers' AutoTokenizer wants them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.data.tokenizer import CONFIG, SentencePieceTokenizer, Tokenizer, load_tokenizer
from engine.errors import UserError
from engine.export import sentencepiece
from engine.export.chat import Chat

TEMPLATE, GENERATION = "chat_template.jinja", "generation_config.json"
# What tokenizers differ in: spaces at either end and in runs, capitals, digits, scripts, emoji, control characters.
SAMPLES = (
    "The quick brown fox jumps over the lazy dog.", " leading", "trailing ", "two  spaces,   three", "\ttab\nline\r\n",
    "def f(x):\n    return x ** 2  # squared\n", "3.14159 1,000,000 0x1F", "ÀÉÎõü naïve café ﬁ ①", "Привет, мир!",
    "你好,世界。こんにちは 안녕하세요", "مرحبا بالعالم", "🙂👩‍👩‍👧 ∑∫√ → ≠", "a\u0301 \u00a0nbsp\u200bzero",
    "xxxxx", "_ __ ___", "",
)  # fmt: skip


def write(tokenizer: Path, directory: Path, seq_length: int, chat: Chat | None = None) -> dict[str, Any]:
    """Writes the tokenizer's files. -> the special ids that config.json names: bos, eos and pad.

    Raises ``UserError`` when Transformers could not have a tokenizer with the same ids.
    """
    loaded = load_tokenizer(tokenizer)
    loaded.save(directory)
    config = _read_json(directory / CONFIG)
    for name in (TEMPLATE, GENERATION):  # a SentencePiece tokenizer does not take them along
        beside = tokenizer / name
        if beside.is_file() and not (directory / name).exists():
            (directory / name).write_bytes(beside.read_bytes())
    if isinstance(loaded, SentencePieceTokenizer):
        config = _from_sentencepiece(loaded, config, directory)
    config.setdefault("model_max_length", seq_length)
    if chat is not None:
        config.pop("chat_template", None)
        (directory / TEMPLATE).write_text(chat.template, encoding="utf-8")
    _write_json(directory / CONFIG, config)
    return _special_ids(loaded, config, directory, None if chat is None else chat.end)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _from_sentencepiece(loaded: SentencePieceTokenizer, config: dict, directory: Path) -> dict:
    """A tokenizer.json beside the .model, checked on samples and on the tokenizer's own pieces."""
    model = sentencepiece.parse(loaded.proto)
    bos = _text(config.get("bos_token")) or next((t for t, _, kind in model.pieces if t == "<s>" and kind == 3), None)
    llama = str(config.get("tokenizer_class", "")).startswith("Llama")
    begins = config.get("add_bos_token", llama) and bos is not None
    found = sentencepiece.convert(loaded.proto, bos=bos if begins else None)
    pieces = [text.replace("\u2581", " ") for text, _, kind in model.pieces if kind == 1]
    texts = [*SAMPLES, *("".join(pieces[i::97]) for i in range(min(97, len(pieces))))]
    controls = [text for text, _, kind in model.pieces if kind == 3]  # which the engine spells out in a text
    for text, expected in zip(texts, loaded.encode_batch(texts), strict=True):
        ids = found.encode(text, add_special_tokens=False).ids
        if ids != expected and not any(t in text for t in controls) and not _equal_scores(model, ids, expected):
            raise UserError(f"has no tokenizer.json with the same ids: {text[:30]!r} would be {ids[:8]}, not "
                            f"{expected[:8]}", where="tokenizer", fix="Report it with the .model")
    found.save(str(directory / "tokenizer.json"))
    unknown = next(text for text, _, kind in model.pieces if kind == 2)
    # Its own class would build another tokenizer from the .model.
    return {"unk_token": unknown} | config | {"tokenizer_class": "PreTrainedTokenizerFast",
                                              "clean_up_tokenization_spaces": False} | (
        {"bos_token": bos} if bos else {})


def _equal_scores(model: sentencepiece.Model, ids: list[int], expected: list[int]) -> bool:
    """Of two ways to cut a text that are as likely, a unigram model may take either."""
    one, other = (sum(model.pieces[i][1] for i in cut) for cut in (ids, expected))
    return model.algorithm == 1 and abs(one - other) < 1e-4 * abs(other)


def _text(token: Any) -> str | None:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _special_ids(loaded: Tokenizer, config: dict, directory: Path, end: str | None) -> dict[str, Any]:
    """bos, eos and pad for config.json; generation_config.json, which also stops at ``end`` and the document's end."""
    ids = {name: loaded.token_id(text) for name in ("bos", "eos", "pad")
           if (text := _text(config.get(f"{name}_token"))) is not None}
    eos = ids.get("eos")
    eos = loaded.eod_id if eos is None else eos
    found = {"bos_token_id": ids.get("bos"), "eos_token_id": eos, "pad_token_id": ids.get("pad")}
    file = directory / GENERATION
    stated = {"_from_model_config": True} | {name: value for name, value in found.items() if value is not None}
    if file.exists():  # the imported model's, with its sampling
        stated = _read_json(file)
    before = stated.get("eos_token_id")
    ends = [*(before if isinstance(before, list) else [before]), eos, loaded.eod_id, end and loaded.token_id(end)]
    ends = list(dict.fromkeys(i for i in ends if i is not None))
    _write_json(file, stated | {"eos_token_id": ends if len(ends) > 1 else ends[0]})
    return found


def _read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON ({error})", where=str(path), fix="Mend or remove it") from None
    return found if isinstance(found, dict) else {}


def check(tokenizer: Tokenizer, directory: Path) -> None:
    """Refuses a directory whose AutoTokenizer gives other ids than the engine's. Raises ``UserError``."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    expected = [tokenizer.encode(text) for text in SAMPLES]
    theirs = AutoTokenizer.from_pretrained(str(directory))
    for text, ids in zip(SAMPLES, expected, strict=True):
        found = theirs.encode(text, add_special_tokens=False)
        if found == ids:
            continue
        reason, fix = f"gives {text[:30]!r} the ids {found[:8]}, the engine {ids[:8]}", "Report it with the tokenizer"
        plain = PreTrainedTokenizerFast.from_pretrained(str(directory))
        if [plain.encode(text, add_special_tokens=False) for text in SAMPLES] == expected:
            # Transformers 5 does so for qwen2, whatever tokenizer_config.json says, and normalises its own way.
            reason = f"takes {type(theirs).__name__} for this architecture and {reason}"
            fix = "Export with --no-verify and load it with PreTrainedTokenizerFast, or use another --architecture"
        raise UserError(f"AutoTokenizer {reason}", where=str(directory), fix=fix)
