"""A GGUF file beside the Hugging Face directory that it was written from: llama.cpp's ids, logits and greedy text.

Needs llama-cpp-python. Both compute in fp32 on the CPU, llama.cpp with its cache in fp32 as well; so an f32 file agrees
to rounding, and what other types lose can be read off.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.errors import UserError
from engine.export.tokenizer_files import SAMPLES

TEXT = "def mean(values):\n    return sum(values) / len(values)  # of numbers, 3.14 or 1,000; naïve — 你好\n"
_F32 = 0  # GGML_TYPE_F32


@dataclass(frozen=True)
class Compared:
    """``logits``: largest difference over ``tokens`` places, ``scale``: Transformers' largest logit. ``greedy``: tokens
    of greedy text that are the same from the first on, of ``continued``."""

    logits: float
    scale: float
    tokens: int
    greedy: int
    continued: int


def installed() -> bool:
    """Whether llama-cpp-python is there."""
    from importlib.util import find_spec

    return find_spec("llama_cpp") is not None


def verify(hf_directory: Path | str, file: Path | str, *, tolerance: float | None = None, text: str = TEXT,
           max_tokens: int = 256, new_tokens: int = 16) -> Compared:
    """Compares them. Raises ``UserError``: ids that differ, or logits that differ by more than ``tolerance``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(hf_directory), local_files_only=True)
    ids = theirs.encode(text)[:max_tokens]
    model: Any = AutoModelForCausalLM.from_pretrained(str(hf_directory), dtype=torch.float32, local_files_only=True)
    model.eval()
    llama = load(file, context=len(ids) + new_tokens + 8)
    try:
        _compare_ids(theirs, llama, str(file))
        found_sv = logits(llama, ids)
        with torch.no_grad():
            expected_sv = model(torch.tensor([ids])).logits[0].float().numpy()
        difference = float(np.abs(found_sv - expected_sv).max())
        if tolerance is not None and not difference <= tolerance:
            raise UserError(f"llama.cpp's logits are off Transformers' by {difference:.2e}, allowed {tolerance:.0e}",
                            where=str(file), fix="Report it with config.json")
        continued = greedy(llama, ids, new_tokens)
        with torch.no_grad():
            expected = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=new_tokens,
                                      eos_token_id=None, pad_token_id=0)[0, len(ids):].tolist()
    finally:
        llama.close()
    same = next((i for i, (a, b) in enumerate(zip(continued, expected, strict=False)) if a != b), len(expected))
    return Compared(difference, float(np.abs(expected_sv).max()), len(ids), same, len(expected))


def load(file: Path | str, *, context: int) -> Any:
    """The file in llama.cpp, everything in fp32. Raises ``UserError`` where it is missing or refused."""
    try:
        import llama_cpp
    except ImportError:
        raise UserError("comparing a GGUF file needs llama-cpp-python", where=str(file),
                        fix="pip install llama-cpp-python, or leave out the comparison") from None
    try:
        return llama_cpp.Llama(str(file), n_ctx=context, n_batch=max(context, 32), logits_all=True, verbose=False,
                               type_k=_F32, type_v=_F32, n_gpu_layers=0)
    except ValueError as error:
        raise UserError(f"llama.cpp cannot load it ({error})", where=str(file), fix="Export it again") from None


def _compare_ids(theirs: Any, llama: Any, where: str) -> None:
    def found_in(text: str) -> list[int]:
        return llama.tokenize(text.encode(), add_bos=False, special=False) if text else []

    for text in (*SAMPLES, TEXT):
        expected, found = theirs.encode(text, add_special_tokens=False), found_in(text)
        if found != expected:  # llama.cpp does not compose accents, and takes loose ones for no part of the word
            composed = unicodedata.normalize("NFC", text)
            expected, found = theirs.encode(composed, add_special_tokens=False), found_in(composed)
        if found != expected:
            raise UserError(f"llama.cpp gives {text[:30]!r} the ids {found[:12]}, Transformers {expected[:12]}",
                            where=where, fix="Report it with the tokenizer")


def logits(llama: Any, ids: list[int]) -> np.ndarray:
    """[s, v] fp32."""
    llama.reset()
    llama.eval(ids)
    return np.array(llama.scores[: len(ids)])


def greedy(llama: Any, ids: list[int], count: int) -> list[int]:
    """The likeliest next tokens, one after the other."""
    llama.reset()
    llama.eval(ids)
    found: list[int] = []
    while len(found) < count:
        found.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
        llama.eval(found[-1:])
    return found
