"""What `mainspring import` and `mainspring export` can be told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

from engine.config.base import Problem, Section, option
from engine.config.inference import Device, ModelLayout

Architecture = Literal["auto", "llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "gpt_oss"]


class ImportConfig(Section):
    """A Hugging Face model, or adapters that PEFT wrote, as a checkpoint of the engine."""

    aliases: ClassVar[dict[str, str]] = {"from": "source"}

    source: Path = option(..., "Hugging Face directory: config.json, safetensors, tokenizer (--from for short)")
    output: Path = option(..., "the run's folder; the checkpoint becomes its iter_0000000")
    tokenizer: Path | None = option(None, "tokenizer (null: the directory's own)")
    base: str | None = option(
        None, "of adapters: the model beside which they were trained, a checkpoint or a Hugging Face directory",
        min_length=1)
    seq_length: int | None = option(None, "context length (null: max_position_embeddings)", "tokens", ge=2, le=2**31)
    precision: Literal["auto", "fp32", "bf16"] = option(
        "auto", "what the checkpoint stores; auto is the files' own, with fp32 for fp16")
    verify: bool = option(False, "also load it with Transformers and compare the logits, in fp32")
    device: Device = option("auto", "processor")
    parallel: ModelLayout = option(ModelLayout, "how ranks share the model while it is read; it loads under any layout")


class ExportConfig(Section):
    """A checkpoint as a Hugging Face directory, a GGUF file, or adapters for PEFT."""

    checkpoint: Path = option(..., "checkpoint (iter_NNNNNNN), or a run's output_dir")
    output: Path = option(..., "the directory (hf, adapter) or file (gguf) to write; it must not exist")
    format: Literal["hf", "gguf", "adapter"] = option(
        "hf", "Hugging Face directory, a file for llama.cpp, or the adapters alone, as PEFT keeps them")
    merge: bool = option(False, "fold a checkpoint of adapters into its base first")
    dtype: Literal["auto", "fp32", "bf16", "fp16", "q8_0"] = option(
        "auto", "type of the weights (auto: as the model was trained; q8_0: gguf only)")
    architecture: Architecture = option("auto", "whose model it becomes (auto: the first that computes the same)")
    max_shard_gb: float = option(5.0, "size of a file at most", "GB", gt=0)
    seq_length: int | None = option(
        None, "context length that config.json states (null: the model's)", "tokens", ge=2, le=2**31)
    verify: bool = option(
        True, "before the export gets its name, load it with Transformers and compare logits and token ids, in fp32")
    tolerance: float = option(1e-4, "largest difference of a logit", "1", gt=0)
    device: Device = option("auto", "processor")
    parallel: ModelLayout = option(ModelLayout, "how ranks share the model, whatever the layout of training was")

    def problems(self) -> Iterator[Problem]:
        if self.dtype == "q8_0" and self.format != "gguf":
            yield Problem("dtype", f"q8_0 is a type of GGUF, but format is {self.format}", "Use --format gguf, or bf16")
        if self.merge and self.format == "adapter":
            yield Problem("merge", "leaves no adapters to write, but format is adapter", "Use --format hf")
