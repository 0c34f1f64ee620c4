"""A Hugging Face directory's tokenizer in the words of GGUF: tokens, types, merges or scores, the split, special ids.

llama.cpp knows splits (``tokenizer.ggml.pre``) by name only. A tokenizer whose split has none, or whose model llama.cpp
lacks, is refused: the file would load and give other ids.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from engine.errors import UserError
from engine.export import sentencepiece

# GGUF's types of tokens; SentencePiece's have the same numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_WORD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_NAME = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_SLASHES = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_O200K = f"{_WORD}{_CONTRACTIONS}?|{_NAME}{_CONTRACTIONS}?" + r"|\p{N}{1,3}" + _SLASHES
_TEKKEN = f"{_WORD}|{_NAME}" + r"|\p{N}" + _SLASHES
GPT2, DIGITS = "GPT-2's", "single digits, then GPT-2's"
# The split: llama.cpp's names for it, each with whether it takes a whole word that is a token without merging.
SPLITS: dict[str, list[tuple[str, bool]]] = {
    _LLAMA3: [("llama-bpe", True), ("smaug-bpe", False)], _QWEN2: [("qwen2", False)],
    _O200K: [("gpt-4o", False)], _TEKKEN: [("tekken", True)], GPT2: [("gpt-2", False)], DIGITS: [("smollm", False)],
}  # fmt: skip
_OTHER = "Train the tokenizer with `mainspring prepare`, whose BPE llama.cpp knows, or serve it with Transformers"


@dataclass
class Vocabulary:
    """``model``: gpt2 (byte-level BPE), llama (SentencePiece BPE) or t5 (SentencePiece unigram)."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    special: dict[str, int] = field(default_factory=dict)  # bos, eos, eot, unk, pad
    add_bos: bool = False
    add_eos: bool = False
    space_prefix: bool | None = None
    remove_extra_spaces: bool | None = None
    charsmap: bytes = b""
    chat_template: Any = None
    notes: list[str] = field(default_factory=list)


def read(directory: Path, rows: int) -> Vocabulary:
    """The tokenizer with as many tokens as the embedding has ``rows``; those it lacks are unused. Raises UserError."""
    file, proto = directory / "tokenizer.json", directory / "tokenizer.model"
    if not file.is_file() and not proto.is_file():
        raise UserError("holds no tokenizer.json and no tokenizer.model", where=str(directory), fix="Export it again")
    content = _json(file) if file.is_file() else None
    if proto.is_file() and (content is None or not _is_byte_level(content)):
        found = _from_sentencepiece(proto)
    else:
        assert content is not None
        found = _from_json(content, file)
    if content is not None:
        _added(found, content, file)
        _affixes(found, file)
    config = _json(directory / "tokenizer_config.json") if (directory / "tokenizer_config.json").is_file() else {}
    found.special = _special(directory, config, found.tokens)
    if content is None:
        found.add_bos = bool(config.get("add_bos_token", True)) and "bos" in found.special
    _pad(found, rows, directory)
    template = directory / "chat_template.jinja"
    found.chat_template = template.read_text(encoding="utf-8") if template.is_file() else config.get("chat_template")
    return found


def _json(path: Path) -> dict:
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot be read ({error})", where=str(path), fix="Export the model again") from None
    return found


def _steps(content: dict, name: str) -> list[dict]:
    """A tokenizer.json's normalizers or pre-tokenizers, a sequence as its parts."""
    step = content.get(name)
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    parts = step["pretokenizers" if name == "pre_tokenizer" else "normalizers"]
    return [inner for part in parts for inner in _steps({name: part}, name)]


def _is_byte_level(content: dict) -> bool:
    return any(step["type"] == "ByteLevel" for step in _steps(content, "pre_tokenizer"))


def _from_json(content: dict, file: Path) -> Vocabulary:
    kind = content["model"].get("type") or ("BPE" if "merges" in content["model"] else "")
    if kind == "BPE" and _is_byte_level(content):
        return _byte_level(content, file)
    if kind == "BPE" and content["model"].get("byte_fallback"):
        return _metaspace(content, file)
    level = "byte-level " if _is_byte_level(content) else ""
    raise UserError(f"llama.cpp has no {level}{kind} tokenizer", where=str(file), fix=_OTHER)


def _by_id(vocab: dict[str, int], file: Path) -> list[str]:
    tokens = [""] * (max(vocab.values(), default=-1) + 1)
    for token, number in vocab.items():
        tokens[number] = token
    if "" in tokens:  # an id in between that only an added token has
        tokens = [token or f"[UNUSED_{number}]" for number, token in enumerate(tokens)]
    if len(set(tokens)) < len(tokens):
        raise UserError("has two ids with the same token", where=str(file), fix=_OTHER)
    return tokens


def _byte_level(content: dict, file: Path) -> Vocabulary:
    model = content["model"]
    for key in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if key != "unk_token" and model.get(key):
            raise UserError(f"{key} is {model[key]!r}, which llama.cpp's byte-level BPE does not have",
                            where=str(file), fix=_OTHER)
    notes = []
    for step in _steps(content, "normalizer"):
        if step["type"] != "NFC":
            problem = f"normalises text by {step['type']}, which llama.cpp does not do"
            raise UserError(problem, where=str(file), fix=_OTHER)
        notes.append("llama.cpp does not compose accents (NFC) before it splits text, this tokenizer does")
    split = _split(content, file)
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    whole = bool(model.get("ignore_merges"))
    names = SPLITS[split]
    pre = next((name for name, ignores in names if ignores == whole), None)
    if pre is None:  # the switch matters only for tokens that their own merges do not make
        if not _merges_make_all(content):
            raise UserError(f"ignore_merges is {whole}, and llama.cpp's {names[0][0]} does it the other way",
                            where=str(file), fix=_OTHER)
        pre = names[0][0]
    if split in (_O200K, _TEKKEN):
        notes.append("llama.cpp splits words at combining marks, this tokenizer does not: text that is not composed "
                     "(NFC) has other ids")  # fmt: skip
    tokens = _by_id(model["vocab"], file)
    merges = [f"{left} {right}" for left, right in pairs]
    return Vocabulary("gpt2", pre, tokens, [NORMAL] * len(tokens), merges=merges, notes=notes)


def _split(content: dict, file: Path) -> str:
    """The key of ``SPLITS``. Raises UserError for a split that llama.cpp has no name for."""
    patterns: list[str] = []
    for step in _steps(content, "pre_tokenizer"):
        match step["type"]:
            case "Split" if step.get("behavior") == "Isolated" and not step.get("invert"):
                patterns.append(step["pattern"].get("Regex", ""))
            case "Split" if step.get("behavior") == "Removed" and step.get("invert"):  # the same, said otherwise
                patterns.append(step["pattern"].get("Regex", ""))
            case "Digits" if step.get("individual_digits"):
                patterns.append(DIGITS)
            case "ByteLevel" if not step.get("add_prefix_space", True):
                patterns += [GPT2] if step.get("use_regex", True) else []
            case kind:
                patterns.append(f"a step {kind} with {({k: v for k, v in step.items() if k != 'type'})}")
    if patterns == [DIGITS, GPT2]:
        return DIGITS
    if len(patterns) == 1 and patterns[0] in SPLITS and patterns[0] != DIGITS:
        return patterns[0]
    shown = " and ".join(pattern[:60] for pattern in patterns) or "none"
    raise UserError(f"splits text in a way that llama.cpp has no name for ({shown})", where=str(file), fix=_OTHER)


def _merges_make_all(content: dict) -> bool:
    """Whether every token of the model is what its own text is merged to."""
    plain = {**content["model"], "ignore_merges": False}
    bare = {"version": "1.0", "model": plain, "added_tokens": [], "normalizer": None, "pre_tokenizer": None,
            "post_processor": None, "decoder": None}
    model = tokenizers.Tokenizer.from_str(json.dumps(bare))
    added = {token["content"] for token in content.get("added_tokens", [])}
    wanted = [token for token in content["model"]["vocab"] if token not in added]
    return all(len(found.ids) == 1 for found in model.encode_batch_fast(wanted, add_special_tokens=False))


def _metaspace(content: dict, file: Path) -> Vocabulary:
    """SentencePiece's BPE as Transformers writes it: merges become scores, the first the best."""
    model, vocab = content["model"], content["model"]["vocab"]
    tokens = _by_id(vocab, file)
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(model["merges"]):
        ranks.setdefault("".join(pair.split(" ") if isinstance(pair, str) else pair), rank)
    types = [BYTE if len(token) == 6 and token.startswith("<0x") else NORMAL for token in tokens]
    if model.get("unk_token") in vocab:
        types[vocab[model["unk_token"]]] = UNKNOWN
    scores = [-float(ranks[token]) if token in ranks else -1e9 for token in tokens]
    steps = [*_steps(content, "normalizer"), *_steps(content, "pre_tokenizer")]
    known = {"Prepend", "Replace", "Metaspace"}
    if other := [step["type"] for step in steps if step["type"] not in known]:
        raise UserError(f"has a step {other[0]}, which llama.cpp does not have", where=str(file), fix=_OTHER)
    prefix = any(step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
                 for step in steps)  # fmt: skip
    return Vocabulary("llama", "default", tokens, types, scores=scores, space_prefix=prefix)


def _from_sentencepiece(file: Path) -> Vocabulary:
    model = sentencepiece.parse(file.read_bytes())
    tokens, scores, types = (list(column) for column in zip(*model.pieces, strict=True))
    found = Vocabulary("llama", "default", tokens, types, scores=scores, space_prefix=model.dummy_prefix)
    if model.algorithm == 1:
        found.model, found.charsmap, found.remove_extra_spaces = "t5", model.charsmap, model.remove_extra_spaces
        if model.byte_fallback:
            found.notes.append("llama.cpp has no byte fallback for unigram: characters without a token become unknown")
    elif model.algorithm != 2 or not model.byte_fallback:
        kind = "BPE without byte fallback" if model.algorithm == 2 else "models of words or characters"
        raise UserError(f"llama.cpp has no SentencePiece {kind}", where=str(file), fix=_OTHER)
    elif model.charsmap or model.remove_extra_spaces:
        found.notes.append("llama.cpp does not normalise text before this tokenizer as SentencePiece does: unusual "
                           "characters or spaces in a row may have other ids")  # fmt: skip
    return found


def _added(found: Vocabulary, content: dict, file: Path) -> None:
    """Added tokens are found in text as they are spelt; special ones only where the caller allows it."""
    for token in content.get("added_tokens", []):
        number = token["id"]
        while len(found.tokens) <= number:
            found.tokens.append(f"[UNUSED_{len(found.tokens)}]")
            found.types.append(UNUSED)
            if found.scores:
                found.scores.append(-10000.0)
        if found.types[number] != UNKNOWN:
            found.types[number] = CONTROL if token.get("special") else USER_DEFINED
        found.tokens[number] = token["content"]
    found.types = [UNUSED if text == f"[UNUSED_{i}]" else kind
                   for i, (text, kind) in enumerate(zip(found.tokens, found.types, strict=True))]
    if len(set(found.tokens)) < len(found.tokens):
        raise UserError("has two ids with the same token", where=str(file), fix=_OTHER)


def _affixes(found: Vocabulary, file: Path) -> None:
    """What the tokenizer puts before and after a text, seen on one."""
    model = tokenizers.Tokenizer.from_file(str(file))
    model.no_truncation()
    model.no_padding()
    bare, full = (model.encode("a", add_special_tokens=special).ids for special in (False, True))
    at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    found.add_bos, found.add_eos = at > 0, len(full) > at + len(bare)


def _text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _special(directory: Path, config: dict, tokens: list[str]) -> dict[str, int]:
    """Ids of bos, eos, unk and pad as tokenizer_config.json names them; of eot, where generation ends there too."""
    place = {token: number for number, token in enumerate(tokens)}
    found = {name: place[_text(config.get(f"{name}_token"))] for name in ("bos", "eos", "unk", "pad")
             if _text(config.get(f"{name}_token")) in place}
    for name in ("config.json", "generation_config.json"):
        stated = _json(directory / name) if (directory / name).is_file() else {}
        for kind in ("bos", "eos", "pad"):
            ids = stated.get(f"{kind}_token_id")
            for number in ids if isinstance(ids, list) else [ids]:
                if isinstance(number, int) and 0 <= number < len(tokens):
                    found.setdefault(kind, number)
                    if kind == "eos" and number != found["eos"]:
                        found.setdefault("eot", number)
    return found


def _pad(found: Vocabulary, rows: int, directory: Path) -> None:
    """One token for each row of the embedding."""
    if len(found.tokens) > rows:
        raise UserError(f"the tokenizer has {len(found.tokens)} tokens, the model's embedding {rows}",
                        where=str(directory), fix="Check that both belong to one model")
    for number in range(len(found.tokens), rows):
        found.tokens.append(f"[PAD{number}]")
        found.types.append(UNUSED)
        if found.scores:
            found.scores.append(-10000.0)
