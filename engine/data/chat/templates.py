"""Chat templates: Jinja programs from files that nobody vetted, run where they can do nothing but write text."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.data.chat.builtin import NEEDED, TEMPLATES
from engine.data.chat.conversation import BadRow, Message
from engine.data.chat.special import GENERATION_END, GENERATION_START
from engine.data.tokenizer import CONFIG, Tokenizer
from engine.errors import UserError

# Templates that ask for today's date get this one: the same data is the same tokens on every day.
DATE = datetime(2025, 1, 1)
MARKS = re.compile(r"{%-?\+?\s*generation\s*-?\+?%}")
_KINDS = "Take alpaca, chatml, harmony, auto, or a .jinja file."
# What a template can raise on the data it is given; a sandbox violation is a jinja2.TemplateError as well.
_FAILURES = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True)
class Template:
    """``texts`` by name; "default", and perhaps "tool_use" for conversations with tools. ``variables`` are those that a
    template finds beside the messages (``bos_token`` …)."""

    name: str
    texts: dict[str, str]
    variables: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def sha256(self) -> str:
        """Of everything that decides the text of a conversation."""
        content = json.dumps([self.texts, self.variables, DATE.isoformat()], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def text(self, tools: object = None) -> str:
        """The template for a conversation with these tools."""
        return self.texts.get("tool_use", self.texts["default"]) if tools else self.texts["default"]

    def marked(self, tools: object = None) -> bool:
        """Whether the template itself says what the model generates."""
        return bool(MARKS.search(self.text(tools)))

    @cached_property
    def _compiled(self) -> dict[str, jinja2.Template]:
        return {text: _compile(text, f"template {self.name}") for text in self.texts.values()}

    def render(self, messages: list[Message], tools: list[dict] | None = None, *, prompt: bool = False) -> str:
        """The conversation's text, ``prompt`` with the start of the assistant's next turn. Around what the model
        generates stand ``GENERATION_START`` and ``GENERATION_END``, if the template says so.

        Raises:
            BadRow: the template refuses the conversation, or cannot handle it.
        """
        context = {**self.variables, "messages": messages, "tools": tools, "documents": None}
        try:
            return self._compiled[self.text(tools)].render(**context, add_generation_prompt=prompt)
        except _FAILURES as error:
            kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
            message = " ".join(f"{kind}{error}".split())[:200]
            raise BadRow("refused_by_template", f"the chat template ({self.name}) refuses it: {message}") from None


def load(name: str, tokenizer_folder: str | Path | None, tokenizer: Tokenizer) -> Template:
    """``auto`` (the tokenizer's own, ChatML if it has none), ``alpaca``, ``chatml``, ``harmony``, or a .jinja file.

    Raises:
        UserError: no such template, not Jinja, or special tokens that it is built on are not in the vocabulary.
    """
    folder = Path(tokenizer_folder) if tokenizer_folder is not None else None
    texts = None
    if name == "auto":
        texts = _own(folder, tokenizer) if folder is not None else _of_config(tokenizer.config, "tokenizer")
        name = "the tokenizer's own" if texts else "chatml"
        if not texts and any(tokenizer.token_id(token) is None for token in NEEDED["chatml"]):
            raise UserError("the tokenizer brings no chat template and has no ChatML tokens", where="examples.template",
                            fix=_KINDS)  # fmt: skip
    if texts is None and name in TEMPLATES:
        missing = [token for token in NEEDED[name] if tokenizer.token_id(token) is None]
        if missing:
            problem = f"{name} needs the tokens {', '.join(missing)}, which the tokenizer does not have"
            raise UserError(problem, where="examples.template", fix="Take alpaca, or a tokenizer that has them.")
        texts = {"default": TEMPLATES[name]}
    elif texts is None:
        texts = {"default": _file(Path(name))}
    template = Template(name, texts, _variables(tokenizer))
    for text in texts.values():
        _compile(text, name if name.endswith(".jinja") else f"chat template ({name})")
    return template


def _file(path: Path) -> str:
    if path.suffix not in (".jinja", ".j2", ".jinja2"):
        raise UserError(f"no template is called {str(path)[:100]!r}", where="examples.template", fix=_KINDS)
    return _read(path)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(error.strerror or str(error), where=str(path), fix=_KINDS) from None
    except UnicodeDecodeError:
        raise UserError("not UTF-8 text", where=str(path), fix="A chat template is a text file.") from None


def _own(folder: Path, tokenizer: Tokenizer) -> dict[str, str] | None:
    """The templates in a tokenizer's folder: files of their own win over tokenizer_config.json, as in Transformers."""
    folder = folder if folder.is_dir() else folder.parent
    folder = next((one for one in (folder, folder / "tokenizer") if (one / CONFIG).is_file()), folder)
    texts = {}
    if (folder / "chat_template.jinja").is_file():
        texts["default"] = _read(folder / "chat_template.jinja")
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        texts[path.stem] = _read(path)
    if "default" not in texts and (folder / "chat_template.json").is_file():
        texts = _of_config(_json(folder / "chat_template.json"), str(folder / "chat_template.json")) or {}
    if "default" in texts:
        return texts
    config = _json(folder / CONFIG) if (folder / CONFIG).is_file() else tokenizer.config
    return _of_config(config, str(folder / CONFIG))


def _json(path: Path) -> dict:
    try:
        found = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON ({error})", where=str(path), fix="Mend it, or remove it.") from None
    return found if isinstance(found, dict) else {}


def _of_config(config: dict, where: str) -> dict[str, str] | None:
    own = config.get("chat_template")
    if isinstance(own, str):
        return {"default": own}
    if own is None or own == []:
        return None
    if isinstance(own, dict):
        own = [{"name": name, "template": text} for name, text in own.items()]
    try:
        texts = {str(one["name"]): str(one["template"]) for one in own}
    except (TypeError, KeyError):
        problem = "chat_template is neither text nor a list of named texts"
        raise UserError(problem, where=where, fix="Mend it.") from None
    if "default" not in texts:
        problem = f"none of its chat templates ({', '.join(texts)}) is called default"
        raise UserError(problem, where=where, fix="Give the one to use as a .jinja file.")
    return texts


def _variables(tokenizer: Tokenizer) -> dict[str, Any]:
    """Special tokens by the names that templates know; as in Transformers, only those that there are."""
    found: dict[str, Any] = {}
    for name in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
        token = tokenizer.config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[name] = token
    found.setdefault("eos_token", tokenizer.eod_token)
    return found


class _Generation(jinja2.ext.Extension):
    """``{% generation %}…{% endgeneration %}``: what stands inside, between two private-use characters."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own way)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        start, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in (GENERATION_START, GENERATION_END))
        # A scope of its own, as in Transformers: what is set inside is not seen outside.
        return nodes.Scope([start, *body, end]).set_lineno(line)


class _LoopControls(jinja2.ext.LoopControlExtension):
    """``{% break %}`` and ``{% continue %}``."""


def _refuse(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


_NOT_ASCII = re.compile(r"[^\x00-\x7f]")


def _escape(match: re.Match) -> str:
    # Plane 16 is ours (see special.py) and must come out as it went in.
    return match[0] if match[0] >= "\U00100000" else json.dumps(match[0])[1:-1]


def _to_json(value: object, ensure_ascii: bool = False, indent: int | str | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:  # fmt: skip
    """Jinja's own filter escapes HTML; templates are written for this one."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    return _NOT_ASCII.sub(_escape, text) if ensure_ascii else text


def _today(form: str) -> str:
    return DATE.strftime(form)


def _compile(text: str, where: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, _LoopControls], cache_size=0
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _today}
    try:
        return environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        problem = f"not a Jinja template: {error.message}"
        raise UserError(problem, where=f"{where}:{error.lineno}", fix="Mend it, or take another.") from None


def generated(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Rendered text without its marks, and the character ranges that they enclosed."""
    if GENERATION_START not in text:
        return text, []
    return _unmarked(text)


def _unmarked(text: str) -> tuple[str, list[tuple[int, int]]]:
    parts, ranges, starts, place = [], [], [], 0
    for part in _pieces(text):
        if part == GENERATION_START:
            starts.append(place)
        elif part == GENERATION_END and starts:
            ranges.append((starts.pop(), place))
        elif part != GENERATION_END:
            parts.append(part)
            place += len(part)
    return "".join(parts), sorted(one for one in ranges if one[1] > one[0])


def _pieces(text: str) -> Iterator[str]:
    yield from re.split(f"({GENERATION_START}|{GENERATION_END})", text)
