"""Answers to prompts from exported models: Hugging Face directories (with PEFT adapters) and GGUF files.

A prompt is a list of chat messages, ``{"role": …, "content": …}``, that ends with what is to be answered.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.config.answer import AnswerConfig
from engine.errors import UserError
from engine.evaluation import refusal

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Answer:
    """``ended``: by the model, not by max_new_tokens."""

    text: str
    tokens: int
    ended: bool


def read_prompts(options: AnswerConfig) -> list[Messages]:
    """Those of the command line, then those of the file. Raises ``UserError`` with file and line."""
    found = [_user(text) for text in options.prompt]
    if options.prompts is not None:
        try:
            lines = options.prompts.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            problem = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
            raise UserError(problem or str(error), where=str(options.prompts), fix="Check --prompts") from error
        plain = options.prompts.suffix not in (".jsonl", ".json")
        found += [_user(line) if plain else _row(line, f"{options.prompts}:{number}")
                  for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UserError("holds no prompt", where=str(options.prompts), fix="Give a file with prompts")
    if options.system is not None:
        found = [m if m[0]["role"] == "system" else [{"role": "system", "content": options.system}, *m] for m in found]
    return found[:options.max_prompts]


def _user(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def _row(line: str, where: str) -> Messages:
    """One line of JSONL. What the row answers itself is left out."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"is not JSON ({error})", where=where, fix="Mend the line, or leave it out") from None
    if isinstance(row, dict):
        text = next((row[key] for key in ("prompt", "instruction", "question") if row.get(key)), None)
        if isinstance(text, str):
            more = row.get("input")
            return _user(f"{text}\n\n{more}" if isinstance(more, str) and more.strip() else text)
        messages = text if isinstance(text, list) else row.get("messages")
        if isinstance(messages, list) and all(
                isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
                for m in messages):
            while messages and messages[-1]["role"] == "assistant":
                messages = messages[:-1]
            if messages:
                return [{"role": m["role"], "content": m["content"]} for m in messages]
    raise UserError("holds no prompt", where=where, fix="Give it one of prompt, instruction, question, messages")


def exported(options: AnswerConfig) -> Callable[[Messages], Answer]:
    """A model that answers, from what an export has left. Raises ``UserError``."""
    return _gguf(options) if options.model.suffix == ".gguf" else _hugging_face(options)


def is_exported(path: Path) -> bool:
    """Whether the path is a model for Transformers or llama.cpp, not a checkpoint of the engine's."""
    return path.suffix == ".gguf" or (path / "config.json").is_file()


def _hugging_face(options: AnswerConfig) -> Callable[[Messages], Answer]:
    transformers = _package("transformers", "transformers")
    import torch
    from safetensors import SafetensorError

    where = str(options.model)
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options.precision]
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, local_files_only=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=dtype, local_files_only=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"Transformers cannot load it: {error}", where=where,
                        fix="Export it again with `mainspring export --format hf`") from error
    if options.adapter is not None:
        model = _with_adapter(model, options.adapter)
    model = model.to(device).eval()
    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    choice = {"do_sample": False} if options.temperature == 0 else {
        "do_sample": True, "temperature": options.temperature, "top_p": options.top_p}

    def answer(messages: Messages) -> Answer:
        ids = _encode(tokenizer, messages, chat=options.chat)
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and len(ids) >= limit:
            raise UserError(f"the prompt has {len(ids)} tokens, the model's context {limit}", where="prompt",
                            fix="Shorten the prompt")
        room = options.max_new_tokens if limit is None else min(options.max_new_tokens, limit - len(ids))
        torch.manual_seed(options.seed)
        tokens_bs = torch.tensor([ids], device=device)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sampling fields that greedy decoding does not read
            added = model.generate(tokens_bs, attention_mask=torch.ones_like(tokens_bs), max_new_tokens=room,
                                   eos_token_id=sorted(ends) or None, pad_token_id=min(ends, default=0),
                                   **choice)[0, len(ids):].tolist()
        ended = bool(added) and added[-1] in ends
        kept = added[:-1] if ended else added
        return Answer(tokenizer.decode(kept, skip_special_tokens=True), len(kept), ended)

    return answer


def _encode(tokenizer: Any, messages: Messages, *, chat: bool) -> list[int]:
    """By the tokenizer's chat template; without one, the contents as they are, a line between two."""
    if chat and tokenizer.chat_template:
        found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        return list(found)
    return tokenizer("\n".join(message["content"] for message in messages))["input_ids"]


def _with_adapter(model: Any, adapter: Path) -> Any:
    peft = _package("peft", "peft")
    from safetensors import SafetensorError

    if not (adapter / "adapter_config.json").is_file():
        raise UserError("is not a PEFT adapter (no adapter_config.json)", where=str(adapter), fix="Check --adapter")
    try:
        return peft.PeftModel.from_pretrained(model, str(adapter))
    except SafetensorError as error:
        raise UserError(f"is damaged or not whole ({error})", where=str(adapter), fix="Export it again") from error
    except (ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"does not fit the model: {error}", where=str(adapter),
                        fix="Give the model that the adapter was trained on") from error


def _gguf(options: AnswerConfig) -> Callable[[Messages], Answer]:
    if not options.model.is_file():
        raise UserError("no such file", where=str(options.model), fix="Check --model")
    llama_cpp = _package("llama_cpp", "llama-cpp-python")
    try:
        model = llama_cpp.Llama(str(options.model), n_ctx=0, seed=options.seed % 2**31, verbose=False)
    except ValueError as error:
        raise UserError(f"llama.cpp cannot load it: {error}", where=str(options.model),
                        fix="Export it again") from error
    choice = {"max_tokens": options.max_new_tokens, "temperature": options.temperature, "top_p": options.top_p}
    by_template = options.chat and "tokenizer.chat_template" in model.metadata

    def answer(messages: Messages) -> Answer:
        if by_template:
            found = model.create_chat_completion(messages, **choice)
            text = found["choices"][0]["message"]["content"]
        else:
            found = model.create_completion("\n".join(message["content"] for message in messages), **choice)
            text = found["choices"][0]["text"]
        return Answer(text, found["usage"]["completion_tokens"], found["choices"][0]["finish_reason"] == "stop")

    return answer


def _package(module: str, name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"the package {name} is needed to answer from this model, and is not installed",
                        fix=f"pip install {name}") from error


def summary(answers: list[Answer]) -> dict[str, float]:
    """What gates can be set on. Shares are 0 to 1."""
    count = max(len(answers), 1)
    return asdict(refusal.rates(answer.text for answer in answers)) | {
        "ended_rate": sum(answer.ended for answer in answers) / count,
        "python_rate": sum(is_python(answer.text) for answer in answers) / count,
        "distinct_rate": len({answer.text for answer in answers}) / count,
        "mean_tokens": sum(answer.tokens for answer in answers) / count,
    }


def is_python(text: str) -> bool:
    """Whether an answer, or the first fenced block in it, is Python with something in it. Nothing is run."""
    fenced = re.search(r"```(?:python|py)?\n(.*?)```", text, re.DOTALL)
    code = fenced[1] if fenced else text
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SyntaxWarning of what a model writes
            return bool(ast.parse(code).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
