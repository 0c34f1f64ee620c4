"""Megatron's fused QKV projection split and its queries and keys turned by the rotary embedding, in one pass.

Shapes: s sequence, b batch, g groups (key/value heads), m query heads a group, h = g m, d head dimension, r rotary
pairs a head (2 r <= d, half layout; see `rotary`), n = g (m + 2) d. The projection holds, group by group, its query
heads, then its key head, then its value head.

C++ (csrc/cpu/rotary.h) writes q, k and v out, contiguous. Triton writes q in memory as [s, b, h, d], so that
attention's output, which takes q's order, is what the output projection reads. In place, keys turn inside the
projection and values stay: k and v are views of it. That moves 2 g d of the 2 (h + 2 g) d elements less, but keeps the
h d elements of the unturned queries as long as k and v live. Backward writes the projection's whole gradient in one
pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine_kernels import dispatch
from engine_kernels.rotary import angles, launch_rotary, rotary_reference, unit_stride


def split_qkv_rotary_reference(
    mixed_sbn: Tensor, cos: Tensor, sin: Tensor, *, num_groups: int, queries_per_group: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`split_qkv_rotary` in plain torch."""
    s, b, _ = mixed_sbn.shape
    heads = mixed_sbn.view(s, b, num_groups, queries_per_group + 2, head_dim).permute(1, 2, 3, 0, 4)
    q, k, v = heads.split((queries_per_group, 1, 1), 2)
    by_row = [t if t.dim() == 2 else t.transpose(0, 1)[:, None, None] for t in (cos, sin)]
    q = rotary_reference(q, *by_row).reshape(b, num_groups * queries_per_group, s, head_dim)
    k = rotary_reference(k, *by_row).reshape(b, num_groups, s, head_dim)
    return q, k, v.reshape(b, num_groups, s, head_dim).contiguous()


def _cpu(
    forward: bool, mixed_sbn: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, queries: int
) -> None:
    """Run the C++ kernel in either direction; last dimensions are contiguous."""
    s, b, n = mixed_sbn.shape
    groups, d = k.shape[1], k.shape[3]
    cos, sin = angles(cos.float(), sin.float())
    strides = [t.stride(i) for t, dims in ((mixed_sbn, (0, 1)), (q, (0, 1, 2)), (k, (0, 1, 2)), (v, (0, 1, 2)))
               for i in dims]
    angle = [cos.stride(0), cos.stride(1) if cos.dim() == 3 else 0]
    dispatch.extension().split_rotary(
        forward, dispatch.dtype_code(mixed_sbn), mixed_sbn.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr(),
        cos.data_ptr(), sin.data_ptr(), [s, b, groups, queries, d, cos.shape[-1]], strides + angle,
        dispatch.num_threads(s * b * n),
    )


def _parts(mixed_sbn: Tensor, groups: int, queries: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of its queries [s, b, g, m, d], keys and values [s, b, g, d]."""
    heads = mixed_sbn.unflatten(2, (groups, queries + 2, d))
    return heads[:, :, :, :queries], heads[:, :, :, queries], heads[:, :, :, queries + 1]


def _grouped(x_bhsd: Tensor, groups: int) -> Tensor:
    """[b, h, s, d] as [s, b, g, m, d]."""
    return x_bhsd.permute(2, 0, 1, 3).unflatten(2, (groups, x_bhsd.shape[1] // groups))


@torch.library.custom_op("engine_kernels::split_qkv_rotary_fwd", mutates_args=())
def _forward(
    mixed: Tensor, cos: Tensor, sin: Tensor, groups: int, queries: int, d: int, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _outputs(mixed, cos, sin, groups, queries, d, impl)
    mixed = unit_stride(mixed)
    if k.numel() and impl == "triton":
        q_from, k_from, v_from = _parts(mixed, groups, queries, d)
        launch_rotary((q_from, _grouped(q, groups)), (k_from, k.permute(2, 0, 1, 3)), (v_from, v.permute(2, 0, 1, 3)),
                      cos, sin, backward=False)
    elif k.numel():
        _cpu(True, mixed, q, k, v, cos, sin, queries)
    return q, k, v


@_forward.register_fake
def _outputs(mixed, cos, sin, groups, queries, d, impl):
    s, b, _ = mixed.shape
    if impl == "cpu":
        return tuple(mixed.new_empty(b, heads, s, d) for heads in (groups * queries, groups, groups))
    return tuple(mixed.new_empty(s, b, heads, d).permute(1, 2, 0, 3) for heads in (groups * queries, groups, groups))


@torch.library.custom_op("engine_kernels::split_qkv_rotary_", mutates_args=("mixed",))
def _in_place(mixed: Tensor, cos: Tensor, sin: Tensor, groups: int, queries: int, d: int) -> Tensor:
    """Turns the keys inside the projection; -> the queries, turned."""
    s, b, _ = mixed.shape
    q = mixed.new_empty(s, b, groups, queries, d)
    q_from, k, _v = _parts(mixed, groups, queries, d)
    launch_rotary((q_from, q), (k, None), None, cos, sin, backward=False)
    return q.flatten(2, 3).permute(1, 2, 0, 3)


@_in_place.register_fake
def _(mixed, cos, sin, groups, queries, d):
    return mixed.new_empty(*mixed.shape[:2], groups * queries, d).permute(1, 2, 0, 3)


@torch.library.custom_op("engine_kernels::split_qkv_rotary_bwd", mutates_args=())
def _backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, impl: str) -> Tensor:
    dmixed = _dmixed(dq, dk, dv, cos, sin, impl)
    groups, queries, d = dk.shape[1], dq.shape[1] // dk.shape[1], dq.shape[3]
    dq, dk, dv = unit_stride(dq), unit_stride(dk), unit_stride(dv)
    if dmixed.numel() and impl == "triton":
        q_to, k_to, v_to = _parts(dmixed, groups, queries, d)
        launch_rotary((_grouped(dq, groups), q_to), (dk.permute(2, 0, 1, 3), k_to), (dv.permute(2, 0, 1, 3), v_to),
                      cos, sin, backward=True)
    elif dmixed.numel():
        _cpu(False, dmixed, dq, dk, dv, cos, sin, queries)
    return dmixed


@_backward.register_fake
def _dmixed(dq, dk, dv, cos, sin, impl):
    b, h, s, d = dq.shape
    return dq.new_empty(s, b, (h + 2 * dk.shape[1]) * d)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])
    ctx.impl = inputs[-1]


def _autograd(ctx, dq: Tensor, dk: Tensor, dv: Tensor):
    dmixed = torch.ops.engine_kernels.split_qkv_rotary_bwd(dq, dk, dv, *ctx.saved_tensors, ctx.impl)
    return dmixed, None, None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


class _InPlace(torch.autograd.Function):
    """The op in place. The projection is marked as changed and returned, so that autograd knows it by its new value:
    a node that saved the old one (a linear layer does not) raises in backward, and so does whoever uses the new one.
    """

    @staticmethod
    def forward(ctx, mixed, cos, sin, groups, queries, d):
        q = torch.ops.engine_kernels.split_qkv_rotary_(mixed, cos, sin, groups, queries, d)
        ctx.mark_dirty(mixed)
        ctx.save_for_backward(cos, sin)
        ctx.set_materialize_grads(False)
        _, k, v = _parts(mixed, groups, queries, d)
        outputs = q, k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)
        ctx.shapes = [x.shape for x in outputs]
        return *outputs, mixed

    @staticmethod
    def backward(ctx, *grads):
        *parts, dwhole = grads
        if dwhole is not None:
            raise RuntimeError("split_qkv_rotary: mixed_sbn was used again after its keys had been turned inside it; "
                               "use in_place=False")
        some = next((part for part in parts if part is not None), None)
        if some is None:
            return (None,) * 6
        parts = [some.new_zeros(shape) if part is None else part for part, shape in zip(parts, ctx.shapes, strict=True)]
        dmixed = torch.ops.engine_kernels.split_qkv_rotary_bwd(*parts, *ctx.saved_tensors, "triton")
        return dmixed, None, None, None, None, None


def _to_overwrite(mixed: Tensor) -> Tensor | None:
    """The projection as the kernel may write into it and autograd follow; None where it may not.

    Of a view with several results autograd refuses to follow. But a linear layer with a bias returns its product in
    another shape: such a view of the whole is taken for the tensor itself, and whoever saved it is still told.
    """
    sizes = zip(mixed.stride(), mixed.shape, strict=True)
    if mixed.stride(-1) != 1 or any(not stride and size > 1 for stride, size in sizes):
        return None
    if not (torch.is_grad_enabled() and mixed.requires_grad):
        return mixed
    base = mixed._base if mixed._base is not None else mixed
    if base.numel() != mixed.numel() or (base.is_leaf and base.requires_grad):
        return None
    if not mixed._is_view():
        return mixed
    whole = torch.ops.aten._unsafe_view(mixed, mixed.shape)
    torch.autograd.graph.increment_version(mixed)  # not before: of a changed view autograd would ask how it came to be
    return whole


def _check(mixed_sbn: Tensor, cos: Tensor, sin: Tensor, num_groups: int, queries_per_group: int, head_dim: int) -> None:
    s, b, n = mixed_sbn.shape
    needed = num_groups * (queries_per_group + 2) * head_dim
    if n != needed or num_groups < 1 or queries_per_group < 1:
        raise ValueError(f"split_qkv_rotary: mixed_sbn has {n} columns, {num_groups} groups of "
                         f"{queries_per_group} + 2 heads of {head_dim} need {needed}")
    # One size after another: torch.compile does not find tuples of its symbolic sizes equal.
    fits = cos.shape == sin.shape and cos.dim() in (2, 3) and cos.shape[0] == s and 2 * cos.shape[-1] <= head_dim
    if not fits or (cos.dim() == 3 and cos.shape[1] != b):
        raise ValueError(f"split_qkv_rotary: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be [{s}, r] "
                         f"or [{s}, {b}, r] with 2 r <= {head_dim} (one column an angle, not a repeated half)")


def split_qkv_rotary(
    mixed_sbn: Tensor,
    cos_sr: Tensor,
    sin_sr: Tensor,
    *,
    num_groups: int,
    queries_per_group: int,
    head_dim: int,
    in_place: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Split the fused QKV projection [s, b, g*(queries_per_group+2)*d] and rotate its queries and keys, in one pass.

    cos_sr, sin_sr: [s, r] (or [s, b, r] for positions that differ between sequences), r = rotary dimensions / 2,
    2 r <= d; not differentiated. Returns q [b, h, s, d], k [b, g, s, d], v [b, g, s, d] with contiguous last dimension,
    as scaled_dot_product_attention takes them. `in_place`: mixed_sbn is nobody else's and may be overwritten, where the
    Triton kernel runs and autograd can follow; k and v are then views of it. Raises ValueError for shapes that do not
    fit; backward raises RuntimeError if mixed_sbn was used after it had been overwritten.
    """
    _check(mixed_sbn, cos_sr, sin_sr, num_groups, queries_per_group, head_dim)
    chosen = dispatch.choose(impl, "split_qkv_rotary", {"mixed": mixed_sbn}, {"cos": cos_sr, "sin": sin_sr})
    if chosen == "torch":
        return split_qkv_rotary_reference(mixed_sbn, cos_sr, sin_sr, num_groups=num_groups,
                                          queries_per_group=queries_per_group, head_dim=head_dim)
    layout = num_groups, queries_per_group, head_dim
    if chosen == "triton" and in_place and not torch.compiler.is_compiling():
        whole = _to_overwrite(mixed_sbn)
        if whole is not None:
            return _InPlace.apply(whole, cos_sr, sin_sr, *layout)[:3]
    return torch.ops.engine_kernels.split_qkv_rotary_fwd(mixed_sbn, cos_sr, sin_sr, *layout, chosen)
