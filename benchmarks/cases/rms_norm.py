"""RMSNorm, with and without the residual's sum. n rows, d hidden; a weight is read once and costs nothing beside them.

Forward reads x and writes y: 2 n d elements; with the sum it reads two and writes two. Backward reads dy and x and
writes dx; with the sum it also reads dtotal.
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.cases import Case, optional
from engine_kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference

EPS = 1e-5
SIZES = {"full": [(2**20, 64), (2**18, 128), (65536, 1024), (16384, 4096), (16384, 5120), (8192, 8192), (8192, 16384)],
         "tiny": [(5, 24), (3, 130)]}


def _liger():
    function = optional("liger_kernel.ops.rms_norm", "LigerRMSNormFunction")
    return {} if function is None else {"liger": lambda x, w: function.apply(x, w, EPS, 0.0, "llama", False)}


def _quack():
    function = optional("quack", "rmsnorm")
    return {} if function is None else {"quack": lambda x, w: function(x, w, eps=EPS)}


def cases(scale: str) -> list[Case]:
    found = []
    for n, d in SIZES[scale]:
        for dtype in (torch.bfloat16,) if scale == "full" else (torch.bfloat16, torch.float32):
            size, moved = f"{n}x{d} {str(dtype).removeprefix('torch.')}", n * d * dtype.itemsize
            plain = partial(rms_norm_reference, eps=EPS)
            found.append(Case(
                "rms_norm", size,
                lambda new, n=n, d=d, dtype=dtype: (new.normal(n, d, dtype=dtype, grad=True),
                                                    new.normal(d, dtype=dtype, grad=True)),
                {"ours": partial(rms_norm, eps=EPS, impl="triton"), "eager": plain, **_liger(), **_quack()},
                forward_bytes=2 * moved, forward_flops=4 * n * d, backward_bytes=3 * moved, backward_flops=8 * n * d))
            found.append(Case(
                "add_rms_norm", size,
                lambda new, n=n, d=d, dtype=dtype: (new.normal(n, d, dtype=dtype, grad=True),
                                                    new.normal(n, d, dtype=dtype, grad=True),
                                                    new.normal(d, dtype=dtype, grad=True)),
                {"ours": partial(add_rms_norm, eps=EPS, impl="triton"),
                 "eager": partial(add_rms_norm_reference, eps=EPS)},
                forward_bytes=4 * moved, forward_flops=5 * n * d, backward_bytes=4 * moved, backward_flops=9 * n * d))
    return found
