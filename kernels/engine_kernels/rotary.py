"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), fused with the split of Megatron's QKV projection.

Half layout (rotate_half): element j of a head is paired with element j + r, and position p turns the pair by
angle[p, j]:  y_j = x_j cos - x_{j+r} sin,  y_{j+r} = x_{j+r} cos + x_j sin;  elements from 2 r on pass through
(partial rotary). Backward turns by the opposite angle.

Shapes: s sequence, b batch, g groups (key/value heads), h query heads = g * queries_per_group, d head dimension,
r rotary pairs a head (2 r <= d), n = g * (queries_per_group + 2) * d. The fused projection holds, group by group, its
query heads, then its key head, then its value head. **cos and sin have r columns, one an angle, in fp32.** A table that
repeats its halves (Transformers, Megatron: 2 r columns) is passed as `table[..., :r]`; that view costs no copy.
C++: csrc/cpu/rotary.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine_kernels import dispatch


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [..., d] by cos, sin [..., r] (broadcast against x's leading dimensions); in fp32 (fp64 for fp64 x)."""
    wide = x if x.dtype == torch.float64 else x.float()
    r = cos.shape[-1]
    first, second, rest = wide.split((r, r, x.shape[-1] - 2 * r), -1)
    cos, sin = cos.to(wide.dtype), sin.to(wide.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1).to(x.dtype)


def split_qkv_rotary_reference(
    mixed_sbn: Tensor, cos: Tensor, sin: Tensor, *, num_groups: int, queries_per_group: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`split_qkv_rotary` in plain torch."""
    s, b, _ = mixed_sbn.shape
    heads = mixed_sbn.view(s, b, num_groups, queries_per_group + 2, head_dim).permute(1, 2, 3, 0, 4)
    q, k, v = heads.split((queries_per_group, 1, 1), 2)
    angles = [t if t.dim() == 2 else t.transpose(0, 1)[:, None, None] for t in (cos, sin)]
    q = rotary_reference(q, *angles).reshape(b, num_groups * queries_per_group, s, head_dim)
    k = rotary_reference(k, *angles).reshape(b, num_groups, s, head_dim)
    return q, k, v.reshape(b, num_groups, s, head_dim).contiguous()


def _launch(
    forward: bool, mixed_sbn: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, queries: int
) -> None:
    """Run the kernel in either direction; last dimensions are contiguous, cos and sin are strided alike."""
    s, b, n = mixed_sbn.shape
    groups, d = k.shape[1], k.shape[3]
    strides = [t.stride(i) for t, dims in ((mixed_sbn, (0, 1)), (q, (0, 1, 2)), (k, (0, 1, 2)), (v, (0, 1, 2)))
               for i in dims]
    angle = [cos.stride(0), cos.stride(1) if cos.dim() == 3 else 0]
    dispatch.extension().split_rotary(
        forward, dispatch.dtype_code(mixed_sbn), mixed_sbn.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr(),
        cos.data_ptr(), sin.data_ptr(), [s, b, groups, queries, d, cos.shape[-1]], strides + angle,
        dispatch.num_threads(s * b * n),
    )


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _angles(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """fp32, unit stride, and the same strides for both."""
    cos, sin = _unit_stride(cos.float()), _unit_stride(sin.float())
    return (cos, sin) if cos.stride() == sin.stride() else (cos.contiguous(), sin.contiguous())


@torch.library.custom_op("engine_kernels::split_qkv_rotary_fwd", mutates_args=(), device_types="cpu")
def _forward(
    mixed: Tensor, cos: Tensor, sin: Tensor, groups: int, queries: int, d: int
) -> tuple[Tensor, Tensor, Tensor]:
    s, b, _ = mixed.shape
    q = torch.empty(b, groups * queries, s, d, dtype=mixed.dtype)
    k = torch.empty(b, groups, s, d, dtype=mixed.dtype)
    v = torch.empty(b, groups, s, d, dtype=mixed.dtype)
    if k.numel():
        _launch(True, _unit_stride(mixed), q, k, v, *_angles(cos, sin), queries)
    return q, k, v


@_forward.register_fake
def _(mixed: Tensor, cos: Tensor, sin: Tensor, groups: int, queries: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    s, b, _ = mixed.shape
    return (mixed.new_empty(b, groups * queries, s, d), mixed.new_empty(b, groups, s, d),
            mixed.new_empty(b, groups, s, d))


@torch.library.custom_op("engine_kernels::split_qkv_rotary_bwd", mutates_args=(), device_types="cpu")
def _backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    b, h, s, d = dq.shape
    groups = dk.shape[1]
    dmixed = torch.empty(s, b, (h + 2 * groups) * d, dtype=dq.dtype)
    if dmixed.numel():
        grads = (_unit_stride(dq), _unit_stride(dk), _unit_stride(dv))
        _launch(False, dmixed, *grads, *_angles(cos, sin), h // groups)
    return dmixed


@_backward.register_fake
def _(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    b, h, s, d = dq.shape
    return dq.new_empty(s, b, (h + 2 * dk.shape[1]) * d)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _autograd(ctx, dq: Tensor, dk: Tensor, dv: Tensor):
    dmixed = torch.ops.engine_kernels.split_qkv_rotary_bwd(dq, dk, dv, *ctx.saved_tensors)
    return dmixed, None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def split_qkv_rotary(
    mixed_sbn: Tensor,
    cos_sr: Tensor,
    sin_sr: Tensor,
    *,
    num_groups: int,
    queries_per_group: int,
    head_dim: int,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Split the fused QKV projection [s, b, g*(queries_per_group+2)*d] and rotate its queries and keys, in one pass.

    cos_sr, sin_sr: fp32 [s, r] (or [s, b, r] for positions that differ between sequences), r = rotary dimensions / 2,
    2 r <= d; not differentiated. Returns q [b, h, s, d], k [b, g, s, d], v [b, g, s, d], contiguous, as
    scaled_dot_product_attention takes them. Raises ValueError for shapes that do not fit.
    """
    s, b, n = mixed_sbn.shape
    if n != num_groups * (queries_per_group + 2) * head_dim or num_groups < 1 or queries_per_group < 1:
        raise ValueError(f"split_qkv_rotary: mixed_sbn has {n} columns, {num_groups} groups of "
                         f"{queries_per_group} + 2 heads of {head_dim} need "
                         f"{num_groups * (queries_per_group + 2) * head_dim}")
    rows = cos_sr.shape[:-1]
    if cos_sr.shape != sin_sr.shape or (rows != (s,) and rows != (s, b)) or 2 * cos_sr.shape[-1] > head_dim:
        raise ValueError(f"split_qkv_rotary: cos {tuple(cos_sr.shape)} and sin {tuple(sin_sr.shape)} must be [{s}, r] "
                         f"or [{s}, {b}, r] with 2 r <= {head_dim} (one column an angle, not a repeated half)")
    if dispatch.choose(impl, "split_qkv_rotary", {"mixed": mixed_sbn}, {"cos": cos_sr, "sin": sin_sr}, kernels=("cpu",)) == "torch":
        return split_qkv_rotary_reference(mixed_sbn, cos_sr, sin_sr, num_groups=num_groups,
                                          queries_per_group=queries_per_group, head_dim=head_dim)
    return torch.ops.engine_kernels.split_qkv_rotary_fwd(
        mixed_sbn, cos_sr, sin_sr, num_groups, queries_per_group, head_dim
    )
