"""FP8: quantisation alone, fused into the norm and the activation, and linear layers made of it.

Quantising reads n k elements and writes as many bytes, with the transpose twice as many (``given``: the scale is known
beforehand; ``current``: the tensor is read once more, which a large one cannot avoid). A linear layer [n, k] x [m, k]
does 2 n k m FLOPs forward and 4 n k m backward, quantisation included in its time; beside it ``scaled_mm``, the forward
product alone of matrices that are quantised already, and bf16.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs, optional
from engine_kernels.fp8 import E4M3, E5M2, Quantised, quantise, quantise_reference
from engine_kernels.fp8_linear import fp8_linear, product, transpose
from engine_kernels.fp8_outputs import rms_norm_fp8, swiglu_fp8
from engine_kernels.rms_norm import add_rms_norm_reference
from engine_kernels.swiglu import swiglu_reference

QUANTISED = {"full": [(8192, 4096), (8192, 28672)], "tiny": [(33, 48)]}
NORMED = {"full": [(16384, 4096), (8192, 16384)], "tiny": [(33, 48)]}
ACTIVATED = {"full": [(8192, 14336)], "tiny": [(33, 48)]}
LINEAR = {"full": [(4096, 4096, 4096), (8192, 4096, 4096), (8192, 4096, 14336), (8192, 8192, 28672)],
          "tiny": [(32, 48, 64)]}
EPS = 1e-5


def _wide(q: Quantised) -> tuple[Tensor, ...]:
    """Its numbers, where the suite compares them; only a view where it measures time."""
    found = q.q_nk, *(() if q.q_km is None else (q.q_km,))
    return tuple(part.view(torch.uint8) for part in found)


def _quantisations(scale: str) -> list[Case]:
    found = []
    for n, k in QUANTISED[scale]:
        for name, dtype, known, options in (
                ("given", E4M3, True, {}), ("given transpose", E4M3, True, {"transpose": True}),
                ("current transpose", E5M2, False, {"transpose": True}), ("rowwise", E4M3, False, {"rowwise": True}),
                ("rowwise transpose", E4M3, False, {"rowwise": True, "transpose": True})):
            def run(function: Any, x: Tensor, one: Tensor, dtype=dtype, known=known, options=options):
                return _wide(function(x, dtype, scale=one if known else None, **options))

            written = 2 if options.get("transpose") else 1
            found.append(Case(
                "fp8_quantise", f"{n}x{k} {name}",
                lambda new, n=n, k=k: (new.normal(n, k), new.normal(1, dtype=torch.float32).fill_(2.0**-6)),
                {"ours": partial(run, partial(quantise, impl="triton")), "eager": partial(run, quantise_reference)},
                forward_bytes=(2 + written + (0 if known else 2)) * n * k, forward_flops=n * k, exact=None,
                tolerance=0.0, notes={"scale": "known" if known else "from a pass before"}))
    return found


def _transposes(scale: str) -> list[Case]:
    """Of the fused outputs, which are written in rows, for the weight's gradient."""
    return [Case("fp8_transpose", f"{n}x{k}", lambda new, n=n, k=k: (new.normal(n, k).to(E4M3),),
                 {"ours": lambda q_nk: transpose(q_nk, impl="triton").view(torch.uint8),
                  "eager": lambda q_nk: transpose(q_nk.to(E4M3), impl="torch").view(torch.uint8)},
                 forward_bytes=2 * n * k, forward_flops=0, tolerance=0.0) for n, k in QUANTISED[scale]]


def _normed(x: Tensor, residual: Tensor, weight: Tensor, one: Tensor, *, known: bool, plain: bool
            ) -> tuple[Tensor, ...]:
    scale = one if known else None
    if not plain:
        normed = rms_norm_fp8(x, weight, residual=residual, eps=EPS, scale=scale, impl="triton")
        return *_wide(normed.q), normed.total
    y, total = add_rms_norm_reference(x, residual, weight, eps=EPS)
    return *_wide(quantise_reference(y, E4M3, scale=scale, rowwise=not known)), total


def _activated(x: Tensor, one: Tensor, *, known: bool, plain: bool) -> tuple[Tensor, ...]:
    scale = one if known else None
    if not plain:
        return _wide(swiglu_fp8(x, scale=scale, impl="triton"))
    return _wide(quantise_reference(swiglu_reference(x), E4M3, scale=scale, rowwise=not known))


def _rounded(plain: Any, *arguments: Tensor) -> tuple[Tensor, ...]:
    """The reference on numbers that came in bf16, whose y is rounded to it."""
    *wide, one = arguments
    return plain(*(argument.bfloat16() for argument in wide), one.float())


def _outputs(scale: str) -> list[Case]:
    """Norm (of a sum) and activation that write fp8, beside the steps in plain torch."""
    found = []
    for known in (True, False):
        for n, d in NORMED[scale]:
            def rows(new: Inputs, n=n, d=d):
                return (new.normal(n, d), new.normal(n, d), new.normal(d),
                        new.normal(1, dtype=torch.float32).fill_(2.0**-6))

            plain = partial(_normed, known=known, plain=True)
            # Sums of another order may round to another bf16, and that to another byte.
            found.append(Case("rms_norm_fp8", f"{n}x{d} {'given' if known else 'rowwise'}", rows,
                              {"ours": partial(_normed, known=known, plain=False), "eager": plain},
                              forward_bytes=7 * n * d, forward_flops=6 * n * d, exact=partial(_rounded, plain),
                              tolerance=1e-2))
        for n, f in ACTIVATED[scale]:
            def pairs(new: Inputs, n=n, f=f):
                return new.normal(n, 2 * f), new.normal(1, dtype=torch.float32).fill_(2.0**-6)

            plain = partial(_activated, known=known, plain=True)
            found.append(Case("swiglu_fp8", f"{n}x{f} {'given' if known else 'rowwise'}", pairs,
                              {"ours": partial(_activated, known=known, plain=False), "eager": plain},
                              forward_bytes=5 * n * f, forward_flops=5 * n * f, exact=partial(_rounded, plain),
                              tolerance=1e-2))
    return found


def _torchao() -> dict[str, Any]:
    """torchao's training linear, tensorwise, where it is installed."""
    function, config = (optional("torchao.float8.float8_linear", "matmul_with_hp_or_float8_args"),
                        optional("torchao.float8.config", "Float8LinearConfig"))
    linear_config = optional("torchao.float8.float8_linear_utils", "LinearMMConfig") or optional(
        "torchao.float8.float8_training_tensor", "LinearMMConfig")
    if function is None or config is None or linear_config is None:
        return {}
    return {"torchao": lambda x, w, *_: function.apply(x, w.t(), linear_config(), config())}


def _linears(scale: str) -> list[Case]:
    found = []
    for n, k, m in LINEAR[scale]:
        def numbers(new: Inputs, n=n, k=k, m=m):
            bytes_nk, bytes_mk = (new.normal(rows, k).to(E4M3) for rows in (n, m))
            return (new.normal(n, k, grad=True), new.normal(m, k, scale=k**-0.5, grad=True), bytes_nk, bytes_mk,
                    torch.ones(1, device=new.device))

        def ours(x, w, *_, rowwise=False):
            return fp8_linear(x, w, rowwise=rowwise, impl="triton")

        def scaled_mm(x, w, q_nk, q_mk, one):
            return product(q_nk, one, q_mk, one, out_dtype=x.dtype, fast=True)

        def bf16(x, w, *_):
            return torch.nn.functional.linear(x, w)

        sizes = n * k + m * k + n * m
        found.append(Case(
            "fp8_linear", f"{n}x{k}x{m}", numbers,
            {"ours": ours, "eager": bf16, "rowwise": partial(ours, rowwise=True), **_torchao()},
            forward_bytes=2 * sizes, forward_flops=2 * n * k * m, backward_bytes=4 * sizes,
            backward_flops=4 * n * k * m, tolerance=0.1,
            notes={"arithmetic": "fp8", "against": "bf16's product of the numbers before they were quantised"}))
        found.append(Case(
            "fp8_product", f"{n}x{k}x{m}", numbers,
            {"ours": scaled_mm, "eager": lambda x, w, q_nk, q_mk, one: (q_nk.to(x.dtype) @ q_mk.to(x.dtype).t())},
            forward_bytes=n * k + m * k + 2 * n * m, forward_flops=2 * n * k * m, tolerance=2e-2,
            notes={"arithmetic": "fp8"},
            exact=lambda x, w, q_nk, q_mk, one: q_nk.double() @ q_mk.double().t()))
    return found


def cases(scale: str) -> list[Case]:
    return _quantisations(scale) + _transposes(scale) + _outputs(scale) + _linears(scale)
