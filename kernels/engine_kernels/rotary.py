"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) of queries and keys.

Position p turns pair j of a head by angle[p, j]:  y_a = x_a cos - x_b sin,  y_b = x_b cos + x_a sin. The half layout
(rotate_half; Llama, Megatron) pairs elements j and j + r, the interleaved one (the paper, GPT-J) 2 j and 2 j + 1.
Elements from 2 r on pass through (partial rotary). Backward turns by the opposite angle.

Shapes: b batch, s sequence, h query heads, g groups (key/value heads), d head dimension, r rotary pairs a head
(2 r <= d). **cos and sin have r columns, one an angle.** A table that repeats its halves (Transformers, Megatron: 2 r
columns) is passed as `table[..., :r]`; that view costs no copy. Their row is the place in the sequence, or what
`positions` says. All arithmetic in fp32 (fp64 for fp64 input), rounded once.

One kernel turns Q and K in one launch, each from any strides to any strides with unit last stride; it also serves the
fused projection (`qkv_rotary`). A gradient is never turned in place: other nodes of the graph may hold the same tensor.
That costs no time, since as many bytes are moved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine_kernels import dispatch, jit
from engine_kernels.jit import launch, tl, triton


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate x [..., d] by cos, sin [..., r] (broadcast against x's leading dimensions); in fp32 (fp64 for fp64 x)."""
    wide = x if x.dtype == torch.float64 else x.float()
    r = cos.shape[-1]
    cos, sin = cos.to(wide.dtype), sin.to(wide.dtype)
    turning, rest = wide[..., : 2 * r], wide[..., 2 * r :]
    first, second = (turning[..., ::2], turning[..., 1::2]) if interleaved else turning.split((r, r), -1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    parts = (torch.stack(turned, -1).flatten(-2),) if interleaved else turned
    return torch.cat((*parts, rest), -1).to(x.dtype)


@triton.jit
def _block(
    program, in_ptr, out_ptr, cos_ptr, sin_ptr, positions_ptr, s, b, heads, members, d, r, in_s, in_b, in_g, in_h,
    out_s, out_b, out_g, out_h, angle_s, angle_b, position_b, position_s, TURN: tl.constexpr, BACKWARD: tl.constexpr,
    INTERLEAVED: tl.constexpr, POSITIONS: tl.constexpr, WIDE: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
    REST: tl.constexpr,
):
    """HEADS heads, counted through all tokens: turns their pairs and copies the REST of their elements."""
    index = program * HEADS + tl.arange(0, HEADS)
    inside, token, head = index < s * b * heads, index // heads, index % heads
    sequence, batch = (token // b).to(tl.int64), (token % b).to(tl.int64)
    group, member = (head // members).to(tl.int64), (head % members).to(tl.int64)
    source = in_ptr + (sequence * in_s + batch * in_b + group * in_g + member * in_h)[:, None]
    target = out_ptr + (sequence * out_s + batch * out_b + group * out_g + member * out_h)[:, None]
    if TURN:
        pair = tl.arange(0, PAIRS)
        mask = inside[:, None] & (pair < r)[None, :]
        row, angle = sequence * angle_s + batch * angle_b, pair[None, :]
        if POSITIONS:
            place = positions_ptr + batch * position_b + sequence * position_s
            row = tl.load(place, mask=inside, other=0).to(tl.int64) * angle_s
        cos = tl.load(cos_ptr + row[:, None] + angle, mask=mask, other=0.0).to(WIDE)
        sin = tl.load(sin_ptr + row[:, None] + angle, mask=mask, other=0.0).to(WIDE)
        if BACKWARD:
            sin = -sin
        if INTERLEAVED:  # both of a pair are loaded together, in runs of 16 bytes
            both = tl.arange(0, 2 * PAIRS)
            mask = inside[:, None] & (both < 2 * r)[None, :]
            x = tl.load(source + both[None, :], mask=mask, other=0.0).to(WIDE)
            first, second = tl.split(tl.reshape(x, (HEADS, PAIRS, 2)))
            y = tl.join(first * cos - second * sin, second * cos + first * sin)
            y = tl.reshape(y, (HEADS, 2 * PAIRS)).to(out_ptr.dtype.element_ty)
            tl.store(target + both[None, :], y, mask=mask)
        else:
            first = tl.load(source + pair[None, :], mask=mask, other=0.0).to(WIDE)
            second = tl.load(source + r + pair[None, :], mask=mask, other=0.0).to(WIDE)
            y_first, y_second = first * cos - second * sin, second * cos + first * sin
            tl.store(target + pair[None, :], y_first.to(out_ptr.dtype.element_ty), mask=mask)
            tl.store(target + r + pair[None, :], y_second.to(out_ptr.dtype.element_ty), mask=mask)
    if REST > 0:
        column = tl.arange(0, REST)
        if TURN:
            column += 2 * r
        mask = inside[:, None] & (column < d)[None, :]
        tl.store(target + column[None, :], tl.load(source + column[None, :], mask=mask), mask=mask)


@triton.jit
def _kernel(
    q_ptr, q_out, k_ptr, k_out, v_ptr, v_out, cos_ptr, sin_ptr, positions_ptr, s, b, heads, members, groups, d, r,
    q_s, q_b, q_g, q_h, qo_s, qo_b, qo_g, qo_h, k_s, k_b, k_g, ko_s, ko_b, ko_g, v_s, v_b, v_g, vo_s, vo_b, vo_g,
    angle_s, angle_b, position_b, position_s, COPY_V: tl.constexpr, BACKWARD: tl.constexpr, INTERLEAVED: tl.constexpr,
    POSITIONS: tl.constexpr, WIDE: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, Q_REST: tl.constexpr,
    K_REST: tl.constexpr, V_REST: tl.constexpr,
):
    """The first programs take Q's heads, the next K's, the last V's."""
    program = tl.program_id(0)
    q_programs = tl.cdiv(s * b * heads, HEADS)
    k_programs = tl.cdiv(s * b * groups, HEADS)
    if program < q_programs:
        _block(program, q_ptr, q_out, cos_ptr, sin_ptr, positions_ptr, s, b, heads, members, d, r,
               q_s, q_b, q_g, q_h, qo_s, qo_b, qo_g, qo_h, angle_s, angle_b, position_b, position_s,
               True, BACKWARD, INTERLEAVED, POSITIONS, WIDE, HEADS, PAIRS, Q_REST)
    elif program < q_programs + k_programs:
        _block(program - q_programs, k_ptr, k_out, cos_ptr, sin_ptr, positions_ptr, s, b, groups, 1, d, r,
               k_s, k_b, k_g, 0, ko_s, ko_b, ko_g, 0, angle_s, angle_b, position_b, position_s,
               True, BACKWARD, INTERLEAVED, POSITIONS, WIDE, HEADS, PAIRS, K_REST)
    elif COPY_V:
        _block(program - q_programs - k_programs, v_ptr, v_out, cos_ptr, sin_ptr, positions_ptr, s, b, groups, 1, d, r,
               v_s, v_b, v_g, 0, vo_s, vo_b, vo_g, 0, angle_s, angle_b, position_b, position_s,
               False, BACKWARD, INTERLEAVED, POSITIONS, WIDE, HEADS, PAIRS, V_REST)


def unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def angles(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Unit stride, and the same strides for both."""
    cos, sin = unit_stride(cos), unit_stride(sin)
    return (cos, sin) if cos.stride() == sin.stride() else (cos.contiguous(), sin.contiguous())


Pair = tuple[Tensor, Tensor | None]  # from, to; None: in place


def launch_rotary(q: Pair, k: Pair, v: Pair | None, cos: Tensor, sin: Tensor, positions_bs: Tensor | None = None, *,
                  backward: bool, interleaved: bool = False) -> None:
    """Turns q [s, b, h / m, m, d] (m members of a group) and k [s, b, g, d], and copies v [s, b, g, d]."""
    s, b, q_groups, members, d = q[0].shape
    groups, r, (cos, sin) = k[0].shape[2], cos.shape[-1], angles(cos, sin)
    # 8 pairs for each thread of 4 warps, where few turn and most are copied at most 32 elements
    heads = max(1, min(1024 // jit.next_power_of_2(r), 4096 // jit.next_power_of_2(d)))
    rest = 0 if 2 * r == d else jit.next_power_of_2(d - 2 * r)
    blocks = [-(-s * b * count // heads) for count in (q_groups * members, groups, groups if v else 0)]
    assert s * b * max(q_groups * members, groups) < 2**31
    tensors = [x for start, end in (q, k, v or k) for x in (start, start if end is None else end)]
    launch(
        _kernel, (sum(blocks) if d else 0,), *tensors, cos, sin, cos if positions_bs is None else positions_bs,
        s, b, q_groups * members, members, groups, d, r, *(stride for x in tensors for stride in x.stride()[:-1]),
        cos.stride(0), cos.stride(1) if cos.dim() == 3 else 0,
        *((0, 0) if positions_bs is None else positions_bs.stride()), COPY_V=v is not None, BACKWARD=backward,
        INTERLEAVED=interleaved, POSITIONS=positions_bs is not None, WIDE=jit.wide(q[0]), HEADS=heads,
        PAIRS=jit.next_power_of_2(r), Q_REST=0 if q[1] is None else rest, K_REST=0 if k[1] is None else rest,
        V_REST=jit.next_power_of_2(d), num_warps=4)


def _like(x: Tensor) -> Tensor:
    """New, [b, s, h, d] in memory, or [s, b, h, d] as x is."""
    b, s, h, d = x.shape
    return x.new_empty(s, b, h, d).transpose(0, 1) if x.stride(0) < x.stride(1) else x.new_empty(b, s, h, d)


def _turn(q: Tensor, k: Tensor, q_out: Tensor | None, k_out: Tensor | None, cos: Tensor, sin: Tensor,
          positions: Tensor | None, interleaved: bool, backward: bool) -> None:
    q_from, q_to = q.transpose(0, 1).unsqueeze(3), None if q_out is None else q_out.transpose(0, 1).unsqueeze(3)
    k_pair = k.transpose(0, 1), None if k_out is None else k_out.transpose(0, 1)
    launch_rotary((q_from, q_to), k_pair, None, cos, sin, positions, backward=backward, interleaved=interleaved)


@torch.library.custom_op("engine_kernels::rotary", mutates_args=())
def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool,
            backward: bool) -> tuple[Tensor, Tensor]:
    """q [b, s, h, d] and k [b, s, g, d] turned, new."""
    q, k = unit_stride(q), unit_stride(k)
    q_out, k_out = _like(q), _like(k)
    _turn(q, k, q_out, k_out, cos, sin, positions, interleaved, backward)
    return q_out, k_out


@_rotary.register_fake
def _(q, k, cos, sin, positions, interleaved, backward):
    return _like(unit_stride(q)), _like(unit_stride(k))


@torch.library.custom_op("engine_kernels::rotary_", mutates_args=("q", "k"))
def _rotary_in_place(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool
                     ) -> None:
    _turn(q, k, None, None, cos, sin, positions, interleaved, False)


def _setup_context(ctx, inputs, output) -> None:
    _, _, cos, sin, positions, ctx.interleaved, ctx.backward = inputs
    ctx.save_for_backward(cos, sin, positions)


def _autograd(ctx, dq: Tensor, dk: Tensor):
    turned = torch.ops.engine_kernels.rotary(dq, dk, *ctx.saved_tensors, ctx.interleaved, not ctx.backward)
    return *turned, None, None, None, None, None


_rotary.register_autograd(_autograd, setup_context=_setup_context)


class _InPlace(torch.autograd.Function):
    """The op in place, where autograd knows q and k by their new values from here on."""

    @staticmethod
    def forward(ctx, q, k, cos, sin, positions, interleaved):
        torch.ops.engine_kernels.rotary_(q, k, cos, sin, positions, interleaved)
        ctx.mark_dirty(q, k)
        ctx.save_for_backward(cos, sin, positions)
        ctx.interleaved = interleaved
        return q, k

    @staticmethod
    def backward(ctx, *grads):
        dq, dk = torch.ops.engine_kernels.rotary(*grads, *ctx.saved_tensors, ctx.interleaved, True)
        return dq, dk, None, None, None, None


def _checked(op: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, impl: str) -> str:
    b, s, _, d = q.shape
    if k.dim() != 4 or (k.shape[0], k.shape[1], k.shape[3]) != (b, s, d):
        raise ValueError(f"{op}: k_bsgd has shape {tuple(k.shape)}, needs [{b}, {s}, groups, {d}] as q_bshd")
    rows = "[positions, r]" if positions is not None else f"[{s}, r] or [{s}, {b}, r]"
    # One size after another: torch.compile does not find tuples of its symbolic sizes equal.
    fits = cos.dim() == 2
    if positions is None:
        fits = cos.dim() in (2, 3) and cos.shape[0] == s and (cos.dim() == 2 or cos.shape[1] == b)
    if cos.shape != sin.shape or not fits or 2 * cos.shape[-1] > d:
        raise ValueError(f"{op}: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be {rows} with 2 r <= {d} "
                         "(one column an angle, not a repeated half)")
    if positions is not None and (positions.shape != (b, s) or positions.is_floating_point()):
        raise ValueError(f"{op}: positions are {positions.dtype} {tuple(positions.shape)}, need integers [{b}, {s}]")
    others = {"cos": cos, "sin": sin} | ({} if positions is None else {"positions": positions})
    return dispatch.choose(impl, op, {"q": q, "k": k}, others, kernels=("triton",))


def _plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool
           ) -> tuple[Tensor, Tensor]:
    """`rotary` in plain torch."""
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    elif cos.dim() == 3:
        cos, sin = cos.transpose(0, 1), sin.transpose(0, 1)
    q, k = (rotary_reference(x, cos[..., None, :], sin[..., None, :], interleaved=interleaved) for x in (q, k))
    return q, k


def rotary(q_bshd: Tensor, k_bsgd: Tensor, cos: Tensor, sin: Tensor, *, positions: Tensor | None = None,
           interleaved: bool = False, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Queries and keys turned by their positions' angles, as new tensors of the same order in memory.

    cos, sin: [s, r] or [s, b, r] of any float dtype; or tables [places, r] of which `positions` [b, s] (integers, all
    within the table: a GPU does not check) names the rows: packed sequences. `interleaved`: pairs 2 j and 2 j + 1. Not
    differentiated in cos and sin. Raises ValueError for shapes that do not fit.
    """
    if _checked("rotary", q_bshd, k_bsgd, cos, sin, positions, impl) == "torch":
        return _plain(q_bshd, k_bsgd, cos, sin, positions, interleaved)
    return torch.ops.engine_kernels.rotary(q_bshd, k_bsgd, cos, sin, positions, interleaved, False)


def rotary_(q_bshd: Tensor, k_bsgd: Tensor, cos: Tensor, sin: Tensor, *, positions: Tensor | None = None,
            interleaved: bool = False, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """`rotary` in place: returns q_bshd and k_bsgd themselves; any strides with a contiguous last dimension.

    It moves as many bytes as `rotary`, which autograd and torch.compile take more easily: this one saves memory. Raises
    ValueError besides where autograd cannot follow: q or k a leaf or a view, and one of them needs a gradient.
    """
    chosen = _checked("rotary_", q_bshd, k_bsgd, cos, sin, positions, impl)
    if chosen == "torch" or torch.compiler.is_compiling():
        q, k = rotary(q_bshd, k_bsgd, cos, sin, positions=positions, interleaved=interleaved, impl=chosen)
        return q_bshd.copy_(q), k_bsgd.copy_(k)
    for name, x in (("q_bshd", q_bshd), ("k_bsgd", k_bsgd)):
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"rotary_: {name}'s last dimension has stride {x.stride(-1)}, needs 1; use rotary")
    if not (torch.is_grad_enabled() and (q_bshd.requires_grad or k_bsgd.requires_grad)):
        torch.ops.engine_kernels.rotary_(q_bshd, k_bsgd, cos, sin, positions, interleaved)
        return q_bshd, k_bsgd
    for name, x in (("q_bshd", q_bshd), ("k_bsgd", k_bsgd)):
        if x._is_view() or (x.is_leaf and x.requires_grad):
            kind = "a view of another tensor" if x._is_view() else "a leaf that needs a gradient"
            raise ValueError(f"rotary_: {name} is {kind}, which autograd cannot turn in place; use rotary")
    return _InPlace.apply(q_bshd, k_bsgd, cos, sin, positions, interleaved)
