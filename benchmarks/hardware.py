"""What a GPU can do at most, by its data sheet: the floors beside what is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Peaks:
    """Bytes/s of the memory; dense FLOP/s of the matrix units by kind of arithmetic."""

    bandwidth: float
    flops: Mapping[str, float]

    def floor_seconds(self, moved: float, flops: float, arithmetic: str = "bf16") -> float:
        """No implementation takes less: the longer of moving the bytes and doing the FLOPs."""
        return max(moved / self.bandwidth, flops / self.flops[arithmetic])


H200 = Peaks(4.8e12, {"bf16": 989e12, "fp8": 1979e12, "fp32": 67e12})
_KNOWN = {
    "H200": H200,
    "H100": Peaks(3.35e12, H200.flops),
    "B200": Peaks(8e12, {"bf16": 2250e12, "fp8": 4500e12, "fp32": 75e12}),
    "A100": Peaks(2.04e12, {"bf16": 312e12, "fp8": 312e12, "fp32": 19.5e12}),
}


def peaks(device_name: str) -> Peaks | None:
    """Of a GPU by what nvidia-smi or torch calls it; None where its data sheet is not known here."""
    return next((found for name, found in _KNOWN.items() if name in device_name), None)
