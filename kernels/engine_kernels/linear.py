"""Matrix products of a linear layer: y = x wᵀ, grad_x = grad_y w, grad_w = grad_yᵀ x, main_grad += grad_yᵀ x.

    n tokens (all leading dimensions), k input features, m output features

On AMD processors torch hands fp32 products to MKL, which takes about twice as long as oneDNN (the linear rows of
``benchmarks/run.py kernels_cpu``), so they go to oneDNN there. In bf16 torch uses oneDNN itself.
The choice depends on the processor alone, never on a timing, so that a resumed run repeats its bits.

On a GPU the sum over micro-batches is part of the product: cuBLAS adds what main_grad holds to its fp32 accumulators,
so that grad_w is neither rounded to 16 bits nor written and read again. The Triton kernel does the same.
"""

from __future__ import annotations

import functools

import torch

from engine_kernels import dispatch, jit
from engine_kernels.jit import launch, tl, triton


@functools.cache
def onednn_is_faster_in_fp32() -> bool:
    """Whether fp32 products go to oneDNN: on AMD processors, where torch was built with it."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            return any(line.startswith("vendor_id") and "AuthenticAMD" in line for line in f)
    except OSError:
        return False


def _use_onednn(a: torch.Tensor) -> bool:
    return a.dtype == torch.float32 and a.device.type == "cpu" and a.numel() > 0 and onednn_is_faster_in_fp32()


def _onednn(a_nk: torch.Tensor, b_mk: torch.Tensor, bias_m: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(a_nk, b_mk, bias_m, "none", [], "")


def matmul_nt(x: torch.Tensor, weight_mk: torch.Tensor, bias_m: torch.Tensor | None = None) -> torch.Tensor:
    """[..., k] x [m, k] -> [..., m], plus bias: a linear layer's forward."""
    if _use_onednn(x):
        return _onednn(x, weight_mk, bias_m)
    return torch.nn.functional.linear(x, weight_mk, bias_m)


def matmul_nn(grad_y: torch.Tensor, weight_mk: torch.Tensor) -> torch.Tensor:
    """[..., m] x [m, k] -> [..., k]: the gradient of a linear layer's input."""
    if _use_onednn(grad_y):
        return _onednn(grad_y, weight_mk.t())
    return grad_y.matmul(weight_mk)


def matmul_tn(grad_y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[..., m], [..., k] -> [m, k]: the gradient of a linear layer's weight, summed over all leading dimensions."""
    grad_nm, x_nk = grad_y.reshape(-1, grad_y.shape[-1]), x.reshape(-1, x.shape[-1])
    if _use_onednn(grad_y):
        # OneDNN is faster with the wide matrix as its right-hand side: 170 against 125 GFLOP/s a core.
        if grad_nm.shape[1] >= 2 * x_nk.shape[1]:
            return _onednn(x_nk.t(), grad_nm.t()).t()
        return _onednn(grad_nm.t(), x_nk.t())
    return grad_nm.t().matmul(x_nk)


def add_matmul_tn_(main_grad_mk: torch.Tensor, grad_y: torch.Tensor, x: torch.Tensor, *, first: bool,
                   impl: str = "auto") -> None:
    """main_grad [m, k] += grad_y [..., m]ᵀ x [..., k]; with ``first`` it is overwritten, whatever it held.

    grad_y and x are of one dtype, main_grad of that or fp32, with unit stride along k. "auto" and "torch" are cuBLAS on
    a GPU, else ``matmul_tn`` and a sum; "triton" is this file's kernel. Raises ValueError that names the argument.
    """
    if impl == "auto" and not grad_y.is_cuda and not torch.is_grad_enabled() and grad_y.numel() and x.numel():
        # A CPU's backward pass, without the checks' 6 us: a wrong shape shows in the product's.
        part_mk = matmul_tn(grad_y, x)
        if part_mk.shape == main_grad_mk.shape and main_grad_mk.dtype in (part_mk.dtype, torch.float32):
            return _sum(main_grad_mk, part_mk, first)
    grad_nm, x_nk = (t.reshape(t.shape[:-1].numel(), t.shape[-1]) for t in (grad_y, x))
    if grad_nm.shape[0] != x_nk.shape[0]:
        raise ValueError(f"add_matmul_tn_: x has {x_nk.shape[0]} rows, grad_y has {grad_nm.shape[0]}")
    shape = (grad_nm.shape[1], x_nk.shape[1])
    if main_grad_mk.shape != shape or (main_grad_mk.numel() and main_grad_mk.stride(1) != 1):
        raise ValueError(f"add_matmul_tn_: main_grad is {tuple(main_grad_mk.shape)} with strides "
                         f"{main_grad_mk.stride()}, needs {shape} and unit stride in the last dimension")
    if main_grad_mk.dtype not in (grad_y.dtype, torch.float32):
        raise ValueError(f"add_matmul_tn_: main_grad is {main_grad_mk.dtype}, needs torch.float32 or {grad_y.dtype}")
    if impl == "triton":
        dispatch.choose(impl, "add_matmul_tn_", {"grad_y": grad_y, "x": x}, {"main_grad": main_grad_mk})
        if grad_y.dtype == torch.float64:
            raise ValueError("add_matmul_tn_: grad_y is torch.float64, which the Triton kernel does not multiply")
        torch.ops.engine_kernels.add_matmul_tn_(main_grad_mk, grad_nm, x_nk, first)
    elif impl in ("auto", "torch", "cpu"):
        _library_sum(main_grad_mk, grad_nm, x_nk, first)
    else:
        raise ValueError(f'add_matmul_tn_: impl must be "auto", "torch" or "triton", not {impl!r}')


@torch.no_grad()
def _library_sum(main_grad_mk: torch.Tensor, grad_nm: torch.Tensor, x_nk: torch.Tensor, first: bool) -> None:
    if not grad_nm.numel() or not x_nk.numel():
        if first:
            main_grad_mk.zero_()
        return
    if grad_nm.is_cuda:
        beta = 0 if first else 1  # with 0, what main_grad held is not read
        if main_grad_mk.dtype == grad_nm.dtype:
            torch.addmm(main_grad_mk, grad_nm.t(), x_nk, beta=beta, out=main_grad_mk)
            return
        if _cublas_sums_in_fp32(grad_nm.device, grad_nm.dtype):
            torch.ops.aten.addmm.dtype_out(main_grad_mk, grad_nm.t(), x_nk, torch.float32, beta=beta, out=main_grad_mk)
            return
    _sum(main_grad_mk, matmul_tn(grad_nm, x_nk), first)


def _sum(main_grad_mk: torch.Tensor, part_mk: torch.Tensor, first: bool) -> None:
    """The first is copied, which spares reading what was there."""
    if first:
        main_grad_mk.copy_(part_mk)
    else:
        main_grad_mk.add_(part_mk)


@functools.cache
def _cublas_sums_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds a product of 16-bit matrices to an fp32 one; the first to have it wanted equal dtypes."""
    a = torch.zeros(16, 16, device=device, dtype=dtype)
    total = torch.zeros(16, 16, device=device)
    try:
        torch.ops.aten.addmm.dtype_out(total, a.t(), a, torch.float32, beta=1, out=total)
    except RuntimeError:
        return False
    return True


@triton.jit
def _sum_kernel(
    grad_ptr, x_ptr, out_ptr, n, m, k, grad_stride, x_stride, out_stride, share, split_stride,
    FIRST: tl.constexpr, PRECISION: tl.constexpr, TILE_N: tl.constexpr, TILE_M: tl.constexpr, TILE_K: tl.constexpr,
    BAND: tl.constexpr,
):
    """One tile of out [m, k] over ``share`` of the n rows; split s writes its own matrix, split_stride further on."""
    tiles_m, tiles_k = tl.cdiv(m, TILE_M), tl.cdiv(k, TILE_K)
    tile, split = tl.program_id(0), tl.program_id(1)
    # Bands of BAND rows of tiles, column by column: neighbours in time share what they read through the L2 cache.
    band = tile // (BAND * tiles_k)
    height = tl.minimum(tiles_m - band * BAND, BAND)
    within = tile % (BAND * tiles_k)
    column_m = (band * BAND + within % height) * TILE_M + tl.arange(0, TILE_M)
    first_k = within // height * TILE_K
    column_k = first_k + tl.arange(0, TILE_K)
    row = tl.arange(0, TILE_N)
    start = split * share
    stop = tl.minimum(n, start + share)
    grad_tile = grad_ptr + start.to(tl.int64) * grad_stride + row[:, None] * grad_stride + column_m[None, :]
    x_tile = x_ptr + start.to(tl.int64) * x_stride + row[:, None] * x_stride + column_k[None, :]
    total = tl.zeros((TILE_M, TILE_K), dtype=tl.float32)
    for begin in range(start, stop, TILE_N):
        inside = (begin + row < stop)[:, None]
        grad = tl.load(grad_tile, mask=inside & (column_m < m)[None, :], other=0.0)
        x = tl.load(x_tile, mask=inside & (column_k < k)[None, :], other=0.0)
        total = tl.dot(tl.trans(grad), x, total, input_precision=PRECISION)
        grad_tile += TILE_N * grad_stride
        x_tile += TILE_N * x_stride
    out_row = out_ptr + split.to(tl.int64) * split_stride + column_m.to(tl.int64)[:, None] * out_stride
    # In halves: main_grad and the sums together would not fit the registers.
    left, right = tl.split(tl.permute(tl.reshape(total, (TILE_M, 2, TILE_K // 2)), (0, 2, 1)))
    column = first_k + tl.arange(0, TILE_K // 2)
    out, inside = out_row + column[None, :], (column_m < m)[:, None] & (column < k)[None, :]
    if not FIRST:
        left += tl.load(out, mask=inside, other=0.0).to(tl.float32)
    tl.store(out, left.to(out_ptr.dtype.element_ty), mask=inside)
    column += TILE_K // 2
    out, inside = out_row + column[None, :], (column_m < m)[:, None] & (column < k)[None, :]
    if not FIRST:
        right += tl.load(out, mask=inside, other=0.0).to(tl.float32)
    tl.store(out, right.to(out_ptr.dtype.element_ty), mask=inside)


def _tiles(dtype: torch.dtype, m: int, k: int) -> dict[str, int]:
    """Tile sizes, warps and stages: 128 fp32 sums a thread where the matrix is large enough to fill such tiles."""
    if dtype == torch.float32:  # multiplied without tensor cores
        return {"TILE_N": 16, "TILE_M": 64, "TILE_K": 64, "num_warps": 4, "num_stages": 2}
    if m >= 128 and k >= 256:
        return {"TILE_N": 64, "TILE_M": 128, "TILE_K": 256, "num_warps": 8, "num_stages": 3}
    return {"TILE_N": 64, "TILE_M": 64, "TILE_K": 64, "num_warps": 4, "num_stages": 4}


@torch.library.custom_op("engine_kernels::add_matmul_tn_", mutates_args=("main_grad_mk",))
def _triton_sum(main_grad_mk: torch.Tensor, grad_nm: torch.Tensor, x_nk: torch.Tensor, first: bool) -> None:
    """Where few tiles would leave multiprocessors idle, rows are split, and the parts summed in order."""
    grad_nm, x_nk = dispatch.as_rows(grad_nm), dispatch.as_rows(x_nk)
    (n, m), k = grad_nm.shape, x_nk.shape[1]
    sizes = _tiles(grad_nm.dtype, m, k)
    tiles = jit.cdiv(m, sizes["TILE_M"]) * jit.cdiv(k, sizes["TILE_K"])
    splits = min(jit.multiprocessors(grad_nm) // max(1, tiles), n // 1024)
    options = {"PRECISION": "ieee", "BAND": 8, **sizes}
    strides = grad_nm.stride(0), x_nk.stride(0)
    if splits < 2:
        launch(_sum_kernel, (tiles, 1), grad_nm, x_nk, main_grad_mk, n, m, k, *strides, main_grad_mk.stride(0), n, 0,
               FIRST=first, **options)
        return
    share = -(-n // (splits * sizes["TILE_N"])) * sizes["TILE_N"]
    parts_smk = torch.empty(splits, m, k, dtype=torch.float32, device=grad_nm.device)
    launch(_sum_kernel, (tiles, splits), grad_nm, x_nk, parts_smk, n, m, k, *strides, k, share, m * k,
           FIRST=True, **options)
    _sum(main_grad_mk, parts_smk.sum(0), first)


@_triton_sum.register_fake
def _(main_grad_mk, grad_nm, x_nk, first):
    return None
