"""Stochastic rounding to bf16, and fp32 as bf16 with a remainder, in plain torch: what ``adamw`` stores, bit for bit.

Random bits are Philox4x32 (Salmon et al. 2011), seven rounds: the fewest that pass its authors' tests. Eight elements
in a row share one 128-bit block, half a word each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROUNDS = 7
_WORD = 0xFFFFFFFF


def split_master(x: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 -> (bf16, int16): the nearest bf16, ties away from zero, and the low 16 bits as a signed number."""
    bits = x.contiguous().view(torch.int32)
    low = ((bits & 0xFFFF) ^ 0x8000) - 0x8000
    return ((bits - low) >> 16).to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def join_master(high: Tensor, low: Tensor) -> Tensor:
    """The fp32 numbers that ``split_master`` split."""
    return ((high.contiguous().view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)).view(torch.float32)


def _philox(key: int, counters: list[Any]) -> list[Tensor]:
    """Four 32-bit words for each counter (int64 tensors or numbers below 2^32). int64 products wrap, as they must."""
    c0, c1, c2, c3 = counters
    k0, k1 = key & _WORD, key >> 32 & _WORD
    for _ in range(ROUNDS):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32 & _WORD) ^ c1 ^ k0, b & _WORD, (a >> 32 & _WORD) ^ c3 ^ k1, a & _WORD
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return [c0, c1, c2, c3]


def random_halves(n: int, place: Any, step: int, use: int, device: torch.device | str = "cpu") -> Tensor:
    """[n] int64 below 65536: the random bits of a tensor's elements. ``place``: ``adamw.Place``."""
    numbers = place.start + torch.arange(n, device=device)
    numbers = numbers + (numbers // place.run * (place.count - 1) + place.index) * place.run
    group, lane = numbers // 8, numbers % 8
    if n % 8 == 0 and n and place.start % 8 == 0 and place.run % 8 == 0:  # a block serves all of its group
        words = torch.stack([w.expand(n // 8) for w in _philox(place.key, _counters(group[::8], step, use))], 1)
        return torch.stack([words & 0xFFFF, words >> 16], 2).flatten()
    a, b, c, d = _philox(place.key, _counters(group, step, use))
    word = torch.where(lane < 4, torch.where(lane < 2, a, b), torch.where(lane < 6, c, d))
    return torch.where(lane % 2 == 0, word & 0xFFFF, word >> 16)


def _counters(group: Tensor, step: int, use: int) -> list[Any]:
    return [group & _WORD, group >> 32, torch.tensor(step & _WORD, device=group.device), use]


def round_stochastic(x: Tensor, place: Any, step: int, use: int) -> Tensor:
    """fp32 -> bf16, up or down with probabilities that make x its mean; what is not finite to the nearest."""
    bits = x.contiguous().view(torch.int32)
    random = random_halves(x.numel(), place, step, use, x.device).to(torch.int32).view(x.shape)
    rounded = torch.where(x.isfinite(), (bits + random) & -0x10000, bits)
    return rounded.view(torch.float32).bfloat16()
