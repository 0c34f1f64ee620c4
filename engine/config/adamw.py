"""``AdamWConfig``: how many bytes of state the optimizer keeps for a parameter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from engine.config.base import Problem, Section, option


class AdamWConfig(Section):
    """What AdamW keeps, beside train.beta1, beta2 and eps. bf16 weights take 12 bytes by default, 6 at the least.

    With train.optimizer muon this holds for the parameters that AdamW updates.
    """

    moments: Literal["fp32", "bf16"] = option(
        "fp32", "numbers of the two means; bf16 is rounded stochastically, and takes 4 bytes less a parameter"
    )
    master: Literal["fp32", "remainder", "none"] = option(
        "fp32", "fp32 weights behind bf16 ones: a copy (4 bytes), the 16 bits that bf16 lacks (2 bytes, the same "
        "numbers), or none (0 bytes: bf16 weights, rounded stochastically)"
    )

    def precision_problems(self, precision: str) -> Iterator[Problem]:
        """What contradicts ``train.precision``."""
        if self.master != "fp32" and precision in ("fp32", "fp16"):
            yield Problem("master", f"{self.master} is for bf16 weights, but train.precision is {precision}",
                          "Set it to fp32, or train.precision to bf16")
