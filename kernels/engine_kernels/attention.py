"""Causal attention with grouped queries (Dao 2023, arXiv:2307.08691; Ainslie et al. 2023, arXiv:2305.13245).

    out = softmax(scale * q k^T, keys up to the query's own position) v,  query head i reads key group i // (h / g)

The queries are the last of the keys' positions: a chunk of a sequence against what precedes it, or new tokens against
a cache. A window hides all but the last keys up to the query's own (Beltagy et al. 2020, arXiv:2004.05150). A sink is
a logit of the head in the softmax without a value: sum + exp(sink) is the denominator (Xiao et al. 2023,
arXiv:2309.17453; learned in GPT-OSS). In rows of documents (documents.py) a query sees only its own document's keys,
and those of the prefix that this goes on from (prefixes.py).

Shapes: b batch, h query heads, g key/value groups (g divides h), s queries, t >= s keys, d head dimension. Which kernel
runs: attention_backends.py. The C++ kernel is here: beside its inputs and `out` the forward pass saves lse [b, h, s]
fp32, the log of each query's denominator; the backward pass recomputes the probabilities. It never repeats keys and
values, skips tiles above the diagonal and before the window, and in bf16 multiplies with AVX512_BF16 where there is one
(fp32 sums; elsewhere wholly in fp32). Its unit of parallel work is one group of a row or of a document. C++:
csrc/cpu/attention.h.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from engine_kernels import attention_backends as backends
from engine_kernels import dispatch
from engine_kernels.attention_flash import flash_on_cpu, varlen
from engine_kernels.attention_flex import flex
from engine_kernels.attention_packages import flash_attn, transformer_engine
from engine_kernels.attention_sdpa import Call, sdpa, visible
from engine_kernels.documents import Documents
from engine_kernels.prefixes import before_documents, visible_keys


def causal_attention_reference(
    q_bhsd: Tensor, k_bgtd: Tensor, v_bgtd: Tensor, scale: float, window: int | None = None,
    sinks_h: Tensor | None = None, documents: Documents | None = None,
) -> Tensor:
    """The formula in plain torch, with all scores in fp32 (fp64 for fp64 input)."""
    q, k, v = (x if x.dtype == torch.float64 else x.float() for x in (q_bhsd, k_bgtd, v_bgtd))
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    if documents is None:
        mask = visible(q.shape[2], k.shape[2], window, q.device)
    else:
        mask = visible_keys(documents, window, q.device)[:, None]
    scores_bhst = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
    if sinks_h is not None:
        sinks_bhs1 = sinks_h.to(q.dtype)[:, None, None].expand(*q.shape[:3], 1)
        scores_bhst = torch.cat((scores_bhst, sinks_bhs1), -1)
    return (scores_bhst.softmax(-1)[..., : k.shape[2]] @ v).to(q_bhsd.dtype)


def _arguments(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, out: Tensor, sinks: Tensor | None, window: int,
               segments: Tensor, backward: bool) -> tuple[list[int], Tensor, int, list[int], list[int], int]:
    """Addresses, workspace, its bytes a thread, sizes, strides, threads."""
    (b, h, s, d), (g, t), n = q.shape, k.shape[1:3], len(segments)
    most_s, most_t = (s, t) if n == b else segments[:, [2, 4]].amax(0).tolist()
    threads = max(1, min(dispatch.num_threads(b * h * s * min(window, most_t)), n * g))
    size = dispatch.extension().attention_workspace(dispatch.dtype_code(q), most_s, most_t, d, backward)
    workspace = torch.empty(threads * size, dtype=torch.uint8)
    strides = [stride for x in (q, k, v, dout, out) for stride in x.stride()[:3]]
    addresses = [*(x.data_ptr() for x in (q, k, v, dout)), 0 if sinks is None else sinks.data_ptr(),
                 segments.data_ptr()]
    return addresses, workspace, size, [n, s, t, min(window, t), g, h // g, d], strides, threads


@functools.lru_cache(maxsize=64)
def _whole_rows(b: int, s: int, t: int) -> Tensor:
    """A segment for each row; see documents.Documents.table."""
    return torch.tensor([(row, 0, s, 0, t, row) for row in range(b)], dtype=torch.int64)


def _empty_out(q: Tensor) -> Tensor:
    b, h, s, d = q.shape
    return q.new_empty(s, b, h, d).permute(1, 2, 0, 3)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("engine_kernels::causal_attention_fwd", mutates_args=(), device_types="cpu")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, segments: Tensor | None, scale: float, window: int,
    chunks: int,
) -> tuple[Tensor, Tensor]:
    """-> out [b, h, s, d] (in memory [s, b, h, d]), lse [b, h, s] fp32. `chunks`: see the backward pass."""
    out, lse = _empty_out(q), torch.empty(q.shape[:3], dtype=torch.float32)
    if out.numel():
        q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
        wide = None if sinks is None else sinks.float().contiguous()
        parts = _whole_rows(q.shape[0], q.shape[2], k.shape[2]) if segments is None else segments
        inputs, workspace, size, sizes, strides, threads = _arguments(q, k, v, q, out, wide, window, parts, False)
        dispatch.extension().attention_fwd(
            dispatch.dtype_code(q), inputs, out.data_ptr(), lse.data_ptr(), workspace.data_ptr(), size, sizes, strides,
            scale, threads)
    return out, lse


@_forward.register_fake
def _(q, k, v, sinks, segments, scale, window, chunks):
    return _empty_out(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("engine_kernels::causal_attention_bwd", mutates_args=(), device_types="cpu")
def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Tensor | None, scale: float,
    window: int, chunks: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """A key may be seen from several chunks of queries: each chunk has gradients of all keys, summed at the end."""
    new = torch.empty if segments is None and dout.numel() else torch.zeros  # keys that no query sees have no segment
    dq = torch.empty(q.shape, dtype=q.dtype) if dout.numel() else torch.zeros(q.shape, dtype=q.dtype)
    dk, dv = (new(chunks, *x.shape, dtype=q.dtype) for x in (k, v))
    if dout.numel():
        q, k, v, dout = (_unit_stride(x) for x in (q, k, v, dout))
        parts = _whole_rows(q.shape[0], q.shape[2], k.shape[2]) if segments is None else segments
        inputs, workspace, size, sizes, strides, threads = _arguments(q, k, v, dout, out, None, window, parts, True)
        dispatch.extension().attention_bwd(
            dispatch.dtype_code(q), inputs, out.data_ptr(), lse.data_ptr(), [x.data_ptr() for x in (dq, dk, dv)],
            workspace.data_ptr(), size, sizes, strides, scale, threads)
    if chunks > 1:
        dk, dv = (x.sum(0, keepdim=True, dtype=torch.float32).to(x.dtype) for x in (dk, dv))
    return dq, dk.view(k.shape), dv.view(v.shape)


@_backward.register_fake
def _(dout, q, k, v, out, lse, segments, scale, window, chunks):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, sinks, segments, ctx.scale, ctx.window, ctx.chunks = inputs
    ctx.save_for_backward(q, k, v, sinks, segments, *output)


def _autograd(ctx, dout: Tensor, _dlse: Tensor):
    q, k, v, sinks, segments, out, lse = ctx.saved_tensors
    grads = torch.ops.engine_kernels.causal_attention_bwd(dout, q, k, v, out, lse, segments, ctx.scale, ctx.window,
                                                          ctx.chunks)
    dsinks = None
    if sinks is not None:  # a sink's probability times (its value's part of dout, which is 0, less dout . out)
        share_bhs = torch.exp(sinks.float()[:, None] - lse)
        dsinks = -(share_bhs * (dout.float() * out.float()).sum(-1)).sum((0, 2)).to(sinks.dtype)
    return (*grads, dsinks, None, None, None, None)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _cpu(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    window, documents = k.shape[2] if call.window is None else call.window, call.documents
    segments, chunks = (None, 1) if documents is None else (documents.table(call.window), documents.parts)
    return torch.ops.engine_kernels.causal_attention_fwd(q, k, v, call.sinks, segments, call.scale, window, chunks)[0]


def _serve(chosen: str, request: backends.Request, machine: backends.Machine) -> Callable[..., Tensor]:
    """The function of a backend."""
    if chosen == "flash" and request.device == "cpu" and request.sinks:
        return flash_on_cpu
    if chosen == "flash_attn":
        return functools.partial(flash_attn, package=backends.flash_attn_package(request, machine))
    own = {"cpu": _cpu, "varlen": varlen, "flex": flex, "transformer_engine": transformer_engine}
    return own.get(chosen) or functools.partial(sdpa, kernel=chosen)


def _check(q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: Tensor | None, documents: Documents | None
           ) -> None:
    (b, h, s, d), (g, t) = q.shape, k.shape[1:3]
    if k.shape != (b, g, t, d) or v.shape != k.shape or g < 1 or h % g or s > t:
        raise ValueError(f"causal_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} "
                         "must be [b, h, s, d], [b, g, t, d] and [b, g, t, d] with g dividing h and s <= t")
    if (window is not None and window < 1) or (sinks is not None and sinks.shape != (h,)):
        raise ValueError(f"causal_attention: window {window} must be positive, and sinks one for each of {h} heads")
    if documents is not None and (len(documents.boundaries_b), documents.queries, documents.length) != (b, s, t):
        raise ValueError(f"causal_attention: documents are {len(documents.boundaries_b)} rows of {documents.queries} "
                         f"queries and {documents.length} keys, but q has {b} of {s}, and k {t}")
    if q.dtype != k.dtype or q.dtype != v.dtype or q.device != k.device or q.device != v.device:
        raise ValueError(f"causal_attention: q, k and v must have one dtype and device, not {q.dtype} on {q.device}, "
                         f"{k.dtype} on {k.device} and {v.dtype} on {v.device}")


def causal_attention(
    q_bhsd: Tensor, k_bgtd: Tensor, v_bgtd: Tensor, *, scale: float | None = None, window: int | None = None,
    sinks: Tensor | None = None, dropout: float = 0.0, documents: Documents | None = None, impl: str = "auto",
) -> Tensor:
    """softmax(scale * q k^T + causal mask) v for q [b, h, s, d], k and v [b, g, t, d], g dividing h -> [b, h, s, d].

    The queries are the last s of the t positions, 1 <= s <= t, or with `documents` those of its chunks, each against
    the keys of its own document and of its prefix. scale defaults to 1 / sqrt(d). A query sees the last `window` keys
    up to its own (None: all). `sinks` [h]: a logit of each query head that takes part in the softmax and brings no
    value. Any strides with unit stride in d. The C++ kernel's result is [s, b, h, d] in memory:
    `.permute(2, 0, 1, 3).flatten(2)`, what Megatron's output projection takes, is a view of it. `impl`: "auto", "torch"
    (scaled_dot_product_attention as torch chooses) or one of attention_backends.BACKENDS. Raises ValueError for
    arguments that do not fit, and for a backend that cannot serve them.
    """
    _check(q_bhsd, k_bgtd, v_bgtd, window, sinks, documents)
    if documents is not None:
        k_bgtd, v_bgtd, documents = before_documents(k_bgtd, v_bgtd, documents)
    (s, d), t = q_bhsd.shape[2:], k_bgtd.shape[2]
    factor = d**-0.5 if scale is None else scale
    if window is not None and documents is None and t > s + window - 1:  # the others no query sees
        t = s + window - 1
        k_bgtd, v_bgtd = k_bgtd[:, :, -t:], v_bgtd[:, :, -t:]
    if window is not None and window >= t:
        window = None
    device = q_bhsd.device
    grad = torch.is_grad_enabled() and (q_bhsd.requires_grad or k_bgtd.requires_grad or v_bgtd.requires_grad)
    request = backends.Request(
        device.type, q_bhsd.dtype, d, s, t, window, sinks is not None, documents is not None, dropout, grad,
        torch.are_deterministic_algorithms_enabled())
    machine = backends.this_machine(device.type, device.index)
    call = Call(factor, window, sinks, dropout, documents)
    return _serve(backends.choose(impl, request, machine), request, machine)(q_bhsd, k_bgtd, v_bgtd, call)
