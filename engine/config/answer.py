"""What `mainspring answer` can be told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from engine.config.base import Problem, Section, option
from engine.config.inference import Device, Precision


class AnswerConfig(Section):
    """Answers of a model to prompts, and what share of them refuses, is empty, ends, and is Python."""

    model: Path = option(..., "run, checkpoint, Hugging Face directory, or .gguf file (llama-cpp-python)")
    adapter: Path | None = option(None, "PEFT adapter over a Hugging Face directory")
    prompt: list[str] = option(list, "a prompt; repeat the flag for several")
    prompts: Path | None = option(None, "file of prompts: .txt with one a line, or .jsonl with prompt, instruction "
                                  "(and input), question, or messages")
    max_prompts: int | None = option(64, "only the first so many (null: all)", "prompts", ge=1)
    chat: bool = option(True, "render prompts by the model's chat template, where it has one")
    system: str | None = option(None, "system prompt of those that have none")
    max_new_tokens: int = option(192, "tokens of an answer at most", "tokens", ge=1)
    temperature: float = option(0.0, "0 is greedy; higher is wilder", "1", ge=0, le=100)
    top_p: float = option(0.95, "choose among the likeliest that together reach this probability", "0 to 1", gt=0, le=1)
    seed: int = option(1234, "fixes the draw", ge=0, lt=2**63)
    device: Device = option("auto", "processor")
    precision: Precision = option("auto", "arithmetic (auto: as the model is stored)")
    output: Path = option(..., "folder for answers.jsonl and result.json")

    def problems(self) -> Iterator[Problem]:
        if not self.prompt and self.prompts is None:
            yield Problem("prompt", "there is nothing to answer", "Give --prompt, or a file with --prompts")
        if self.adapter is not None and self.model.suffix == ".gguf":
            yield Problem("adapter", "a .gguf file takes no PEFT adapter", "Merge it before the export")
