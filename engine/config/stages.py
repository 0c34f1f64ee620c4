"""What the stages after pretraining read and do: examples, preferences, adapters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from engine.config.base import Problem, Section, option

Format = Literal["auto", "alpaca", "instruction", "messages", "sharegpt", "qa", "text", "preference"]
# Names of Hugging Face's modules, and what stands for several of them.
LORA_GROUPS: dict[str, tuple[str, ...]] = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "experts": ("experts.gate_up_proj", "experts.down_proj"),
}
LORA_TARGETS = tuple(name for names in LORA_GROUPS.values() for name in names)


class Source(Section):
    """One source of examples."""

    path: str = option(..., "file, folder, or name of a Hugging Face dataset", min_length=1)
    format: Format = option("auto", "what a row holds (auto: by the names of its fields)")
    weight: float = option(1.0, "share of the rows, relative to the other sources", "1", gt=0)
    split: str | None = option(None, "split of a Hugging Face dataset (null: train)", min_length=1)
    name: str | None = option(None, "configuration of a Hugging Face dataset", min_length=1)


class ExamplesConfig(Section):
    """Instruction, chat or preference data: read, rendered by a chat template, masked, packed."""

    train: list[Source] = option(list, "what is learned from")
    validation: list[Source] = option(list, "what is measured on (empty: see validation_fraction)")
    validation_fraction: float = option(
        0.0, "share of train held out by content hash, where validation is empty", "fraction", ge=0, le=0.5
    )
    template: str = option(
        "auto", "chat template: auto (the tokenizer's own, else chatml), alpaca, chatml, harmony, or a .jinja file",
        min_length=1,
    )
    system: str | None = option(None, "system prompt of conversations that have none")
    supervise: Literal["assistant", "last", "all"] = option(
        "assistant", "tokens that count in the loss: of each answer, of the last one, or all"
    )
    too_long: Literal["drop", "truncate"] = option("drop", "examples longer than model.seq_length")
    packing: bool = option(True, "several examples in a row, which do not see each other (false: one a row)")
    prefix_sharing: bool = option(True, "preference pairs: the prompt computed once for both answers")
    max_bad_fraction: float = option(0.01, "unusable rows, above which the run fails", "fraction", ge=0, le=1)
    max_too_long_fraction: float = option(
        0.25, "rows left out for their length (too_long), above which the run fails", "fraction", ge=0, le=1
    )
    epochs: float | None = option(
        None, "passes over the data, from which train.max_steps follows (null: train.max_steps counts)", "epochs",
        gt=0, le=10**6,
    )
    audit: bool = option(True, "check loss masks before step 1 and show samples")
    audit_samples: int = option(3, "samples that the audit shows", "examples", ge=0, le=1000)
    workers: int = option(0, "processes that tokenize; 0: the available cores, where rows are many", "processes", ge=0)
    cache_dir: Path | None = option(None, "where tokenized examples are kept (null: output_dir/examples)")
    tokenizer: Path | None = option(None, "tokenizer (null: the initial model's own)")


class DpoConfig(Section):
    """Learning from pairs of answers, against a fixed reference model."""

    loss: Literal["dpo", "ipo", "robust"] = option(
        "dpo", "dpo (with label_smoothing: cDPO), ipo, or robust DPO (unbiased under flipped labels)"
    )
    beta: float = option(0.1, "how closely the model is held to the reference", "1", gt=0, le=1000)
    label_smoothing: float = option(0.0, "share of pairs assumed to be labelled the wrong way", "0 to 1", ge=0, lt=0.5)
    reference: str | None = option(
        None, "checkpoint or Hugging Face directory of the reference model (null: what the run starts from)",
        min_length=1,
    )
    cache_dir: Path | None = option(
        None, "where the reference's log-probabilities are kept (null: output_dir/reference)"
    )

    def problems(self) -> Iterator[Problem]:
        if self.loss == "ipo" and self.label_smoothing:
            yield Problem("label_smoothing", f"is {self.label_smoothing}, but ipo has none", "Set it to 0")
        if self.loss == "robust" and not self.label_smoothing:
            yield Problem("label_smoothing", "is 0, which makes robust DPO plain DPO", "Set it to the share of flipped "
                          "labels, or dpo.loss to dpo")


class LoraConfig(Section):
    """Low-rank adapters beside frozen weights."""

    rank: int = option(16, "rank of the adapters", "1", ge=1, le=65536)
    alpha: float = option(32.0, "adapters are scaled by alpha / rank, with rslora by alpha / sqrt(rank)", "1", gt=0)
    dropout: float = option(0.0, "share of an adapter's inputs dropped in training", "0 to 1", ge=0, lt=1)
    rslora: bool = option(False, "rank-stabilised scaling")
    target_modules: list[str] = option(
        lambda: ["all-linear"],
        f"Hugging Face's names: {', '.join(LORA_TARGETS)}; or all-linear, {', '.join(LORA_GROUPS)}", min_length=1,
    )
    base: Literal["none", "nf4"] = option("none", "quantisation of the frozen weights (QLoRA: nf4)")
    double_quant: bool = option(False, "quantise nf4's scales as well: 0.37 bits a parameter less")

    def problems(self) -> Iterator[Problem]:
        known = [*LORA_TARGETS, "all-linear", *LORA_GROUPS]
        for i, name in enumerate(self.target_modules):
            if name not in known:
                yield Problem(f"target_modules.{i}", f"{name!r} is no target", f"There are {', '.join(known)}")
        if self.double_quant and self.base == "none":
            yield Problem("double_quant", "quantises the scales of nf4, but lora.base is none", "Set lora.base to nf4")

    def targets(self) -> tuple[str, ...]:
        """The modules meant, in the order of ``LORA_TARGETS``."""
        named = set(self.target_modules)
        named |= {name for group, names in LORA_GROUPS.items() if group in named for name in names}
        return LORA_TARGETS if "all-linear" in named else tuple(name for name in LORA_TARGETS if name in named)
