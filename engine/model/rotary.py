"""Rotation tables: cos and sin of every position's angles, and of the positions that this rank's tokens stand at.

r pairs of a head that rotate, s positions, b rows.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from engine.config.model import Llama3RopeConfig, YarnConfig
from engine.model.sequence import Sequence
from engine.parallel import context


@dataclass(frozen=True)
class Yarn:
    """``YarnConfig``'s values, hashable: tables are cached by them."""

    factor: float
    original_seq_length: int
    beta_fast: float
    beta_slow: float
    truncate: bool = False


@dataclass(frozen=True)
class Llama3:
    """``Llama3RopeConfig``'s values."""

    factor: float
    original_seq_length: int
    low_freq_factor: float
    high_freq_factor: float


@dataclass(frozen=True)
class Rotary:
    """``dim`` elements of a head rotate (2 r); ``base`` is that of the wavelengths."""

    dim: int
    base: float = 10000.0
    yarn: Yarn | None = None
    llama3: Llama3 | None = None

    @classmethod
    def of(cls, dim: int, base: float, yarn: YarnConfig | None = None, llama3: Llama3RopeConfig | None = None
           ) -> Rotary:
        return cls(dim, base, None if yarn is None else Yarn(**yarn.model_dump()),
                   None if llama3 is None else Llama3(**llama3.model_dump()))

    def frequencies(self) -> torch.Tensor:
        """Radians a position, fp64 [r]: pair i turns by base^(-2i/dim) (Su et al., 2021, arXiv:2104.09864).

        YaRN (Peng et al., 2023, arXiv:2309.00071, section 3.2) divides by ``factor`` those of the pairs that turn less
        than ``beta_slow`` times within the original context, leaves those that turn more than ``beta_fast`` times, and
        blends linearly between, with ends that are rounded to whole pairs only if ``truncate`` (GPT-OSS: false).
        Llama 3.1 (Meta's llama-models, ``apply_scaling``) does the same with ``low_freq_factor`` and
        ``high_freq_factor``, but blends linearly in the number of turns, where YaRN does in the pair's place.
        """
        plain = self.base ** (-torch.arange(0, self.dim, 2, dtype=torch.float64) / self.dim)
        if self.llama3 is not None:
            low, high = self.llama3.low_freq_factor, self.llama3.high_freq_factor
            kept = ((self.llama3.original_seq_length * plain / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
            return plain * kept + plain / self.llama3.factor * (1 - kept)
        if self.yarn is None:
            return plain

        def pair(rotations: float) -> float:
            turns = self.yarn.original_seq_length / (rotations * 2 * math.pi)  # type: ignore[union-attr]
            return self.dim * math.log(turns) / (2 * math.log(self.base))

        low, high = pair(self.yarn.beta_fast), pair(self.yarn.beta_slow)
        if self.yarn.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0.0), min(high, self.dim - 1.0)
        places = torch.arange(self.dim // 2, dtype=torch.float64)
        stretched = ((places - low) / (high - low or 0.001)).clamp(0, 1)
        return plain * (1 - stretched) + plain / self.yarn.factor * stretched

    @property
    def magnitude(self) -> float:
        """What YaRN multiplies cos and sin by, so that scores grow with the context: 0.1 ln(factor) + 1."""
        return 1.0 if self.yarn is None else 0.1 * math.log(self.yarn.factor) + 1.0


@functools.lru_cache(maxsize=4)
def _table(rotary: Rotary, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin at positions 0 … length - 1, fp32 [length, r] each."""
    angles = torch.outer(torch.arange(length, dtype=torch.float64), rotary.frequencies())
    cos, sin = ((turn * rotary.magnitude).float().to(device) for turn in (angles.cos(), angles.sin()))
    return cos, sin


@functools.lru_cache(maxsize=4)  # in training every layer asks for the same
def table(rotary: Rotary, start: int, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin at positions start … start + length - 1, fp32 [length, r] each: views of a cached table."""
    end = start + length
    cos, sin = _table(rotary, max(256, 1 << (end - 1).bit_length()), device)  # few tables, however lengths grow
    return cos[start:end], sin[start:end]


@functools.lru_cache(maxsize=4)  # all layers of a micro-batch ask for the same
def shared_table(rotary: Rotary, sequence: Sequence, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin where this rank's tokens of ``sequence`` stand: fp32 [s, r], or [s, b, r] in rows of documents."""
    cos, sin = table(rotary, 0, sequence.length, device)
    at = sequence.positions_bs
    place = context.positions(sequence.length, sequence.group, device) if at is None else at.t()
    return cos[place], sin[place]
