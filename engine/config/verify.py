"""What `mainspring verify-layout` can be told, beside the training configuration that it verifies."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from engine.config.base import Section, option
from engine.config.schema import Config

# Summation order alone costs 1e-7 to 1e-6 in fp32. In bf16 (8 bits) it costs 2e-2, and 3e-2 of an expert's weights
# where a token goes to another expert for it (docs/layouts.md).
TOLERANCES = {"fp32": 1e-5, "bf16": 5e-2}


class VerifyOptions(Section):
    """How a layout is compared with one rank."""

    shrink: bool = option(False, "compare a tiny model of the same kind: seconds, and no memory to speak of")
    ranks: int | None = option(
        None,
        "processes of the layout (null: as few as use all of it; two data-parallel ones where it asks for nothing "
        "else, or for the distributed optimizer)",
        "ranks", ge=1, le=4096)
    tolerance: float | None = option(
        None, "largest relative error of a loss, gradient or weight (null: 1e-5; in bf16 5e-2)", "1", gt=0, le=1)
    precision: Literal["fp32", "bf16"] = option("fp32", "arithmetic on both sides")
    json_file: Path | None = option(None, "also write everything as JSON here")

    @property
    def bound(self) -> float:
        """The tolerance, with its default for the precision."""
        return self.tolerance if self.tolerance is not None else TOLERANCES[self.precision]


class VerifyConfig(Config):
    """Loss, router statistics, gradients and weights under a layout against those of one rank, on this machine's CPUs.

    The configuration is the training run's; data, checkpoints and logging are not used.
    """

    aliases: ClassVar[dict[str, str]] = Config.aliases | {
        "shrink": "verify.shrink", "ranks": "verify.ranks", "tolerance": "verify.tolerance",
        "precision": "verify.precision", "json": "verify.json_file",
    }

    verify: VerifyOptions = option(VerifyOptions, "how the layout is compared with one rank")

    def training(self) -> Config:
        """The configuration of the run alone."""
        return Config.model_validate(self.model_dump(exclude_unset=True, exclude={"verify"}))
