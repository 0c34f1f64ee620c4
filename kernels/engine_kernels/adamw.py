"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101): one step of many tensors in one launch, with 2-byte state.

    g = grad * grad_scale,  w = w (1 - lr·decay),  m = m + (1 - beta1) (g - m),  v = beta2 v + (1 - beta2) g²
    w = w - lr / (1 - beta1^step) · m / (sqrt(v) / sqrt(1 - beta2^step) + eps)

computed in fp32 and stored as what the tensors are:
    moments   fp32, or bf16 rounded stochastically: v moves by less than half of bf16's last place in a step
    weights   fp32; or bf16 with an int16 remainder, which together are exactly an fp32 number: the remainder is its low
              16 bits, read as signed, and the bf16 its high 16 bits, one more where the remainder is negative (so it is
              the nearest bf16, ties away from zero); or bf16 alone, rounded stochastically

Random bits are Philox4x32-7 (Salmon et al. 2011) keyed by the tensor, counting elements and steps: a run that is
resumed repeats them, and a ``Place`` that says where a shard lies in the whole parameter frees them of the layout.
Tensors are found through a table of addresses on the device, which is made again only when addresses change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine_kernels import dispatch
from engine_kernels.jit import launch, tl, triton
from engine_kernels.stochastic import ROUNDS, join_master, round_stochastic, split_master

_BLOCK = {True: 4096, False: 1024}  # elements of a program, by whether tensors are in groups of eight
_COLUMNS = tl.constexpr(11)  # of the table: five addresses, elements, key, start, run, count, index
_TABLES = 64  # kept; an optimizer needs one for each of its groups


class Place(NamedTuple):
    """Where a tensor's elements lie in the whole parameter, of which they are a shard; ``key`` tells parameters apart.

    Element i is number n = start + i of this rank's part, and of the whole n + (n // run · (count - 1) + index) · run:
    part ``index`` of ``count``, in runs of ``run`` consecutive elements. Random bits follow from key and number.
    """

    key: int = 0
    start: int = 0
    run: int = 1 << 62
    count: int = 1
    index: int = 0


def adamw_reference(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, lr: float, beta1: float,
                    beta2: float, eps: float, weight_decay: float, step: int, grad_scale: Tensor | float = 1.0
                    ) -> tuple[Tensor, Tensor, Tensor]:
    """-> the new (param, exp_avg, exp_avg_sq), in fp32 (fp64 for fp64 param), nothing rounded to fewer bits."""
    wide = param.dtype if param.dtype == torch.float64 else torch.float32
    w, g, m, v = (t.to(wide) for t in (param, grad, exp_avg, exp_avg_sq))
    g = g * grad_scale
    m = m + (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * g * g
    denominator = v.sqrt() / (1 - beta2**step) ** 0.5 + eps
    return w * (1 - lr * weight_decay) - lr / (1 - beta1**step) * (m / denominator), m, v


@triton.jit
def _random(key, group, lane, step, use: tl.constexpr, GROUPED: tl.constexpr, N_ROUNDS: tl.constexpr):
    """16 random bits an element: half-word ``lane`` of the 128 bits of its group of eight."""
    low, high = (group & 0xFFFFFFFF).to(tl.uint32), (group >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(
        key, low, high, step.to(tl.uint32), tl.full((), use, tl.uint32), N_ROUNDS)
    if GROUPED:  # [n] groups -> [n, 8]
        words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (group.shape[0], 4))
        random = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (group.shape[0], 8))
    else:
        word = tl.where(lane < 4, tl.where(lane < 2, a, b), tl.where(lane < 6, c, d))
        random = tl.where(lane % 2 == 0, word & 0xFFFF, word >> 16)
    return random


@triton.jit
def _rounded(x, random):
    """x rounded to bf16 up or down with probabilities that make x its mean. Not finite: to the nearest."""
    bits = x.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, (bits + random) & 0xFFFF0000, bits).to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit(do_not_specialize=["step"])
def _kernel(
    table_ptr, blocks_ptr, scale_ptr, step, lr, kept, beta1, rest1, beta2, rest2, eps, root2, rate,
    PARAM: tl.constexpr, GRAD: tl.constexpr, M: tl.constexpr, V: tl.constexpr, MASTER: tl.constexpr,
    SCALED: tl.constexpr, GROUPED: tl.constexpr, N_ROUNDS: tl.constexpr, BLOCK: tl.constexpr,
):
    """``GROUPED``: every tensor's elements are whole groups of eight, at addresses divisible by 16."""
    place = tl.load(blocks_ptr + tl.program_id(0))
    row = table_ptr + (place >> 40) * _COLUMNS
    w_ptr = tl.load(row).to(tl.pointer_type(PARAM))
    g_ptr = tl.load(row + 1).to(tl.pointer_type(GRAD))
    m_ptr = tl.load(row + 2).to(tl.pointer_type(M))
    v_ptr = tl.load(row + 3).to(tl.pointer_type(V))
    r_ptr = tl.load(row + 4).to(tl.pointer_type(tl.int16))
    n, key, start = tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
    run, count, index = tl.load(row + 8), tl.load(row + 9), tl.load(row + 10)
    first = (place & 0xFFFFFFFFFF) * BLOCK
    if GROUPED:
        w_ptr, g_ptr, r_ptr = tl.multiple_of(w_ptr, 16), tl.multiple_of(g_ptr, 16), tl.multiple_of(r_ptr, 16)
        m_ptr, v_ptr, n = tl.multiple_of(m_ptr, 16), tl.multiple_of(v_ptr, 16), tl.multiple_of(n, 8)
        eights = first + tl.arange(0, BLOCK // 8) * 8
        i = eights[:, None] + tl.arange(0, 8)[None, :]
        number = start + eights
    else:
        i = first + tl.arange(0, BLOCK)
        number = start + i
    if count > 1:
        number += (number // run * (count - 1) + index) * run
    group, lane = number // 8, number % 8
    inside = i < n
    g = tl.load(g_ptr + i, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        g *= tl.load(scale_ptr)
    w = tl.load(w_ptr + i, mask=inside, other=0.0)
    if MASTER == "remainder":
        remainder = tl.load(r_ptr + i, mask=inside, other=0).to(tl.int32)
        bits = (w.to(tl.int16, bitcast=True).to(tl.int32) << 16) + remainder
        w = bits.to(tl.float32, bitcast=True)
    else:
        w = w.to(tl.float32)
    m = tl.load(m_ptr + i, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + i, mask=inside, other=0.0).to(tl.float32)
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    w = w * kept - rate * (m / (tl.sqrt(v) * root2 + eps))
    if m_ptr.dtype.element_ty == tl.bfloat16:
        tl.store(m_ptr + i, _rounded(m, _random(key, group, lane, step, 0, GROUPED, N_ROUNDS)), mask=inside)
    else:
        tl.store(m_ptr + i, m, mask=inside)
    if v_ptr.dtype.element_ty == tl.bfloat16:
        tl.store(v_ptr + i, _rounded(v, _random(key, group, lane, step, 1, GROUPED, N_ROUNDS)), mask=inside)
    else:
        tl.store(v_ptr + i, v, mask=inside)
    if MASTER == "remainder":
        bits = w.to(tl.int32, bitcast=True)
        tl.store(r_ptr + i, (bits & 0xFFFF).to(tl.int16), mask=inside)
        high = ((bits.to(tl.uint32, bitcast=True) + 0x8000) >> 16).to(tl.uint16)
        tl.store(w_ptr + i, high.to(tl.bfloat16, bitcast=True), mask=inside)
    elif MASTER == "stochastic":
        tl.store(w_ptr + i, _rounded(w, _random(key, group, lane, step, 2, GROUPED, N_ROUNDS)), mask=inside)
    else:
        tl.store(w_ptr + i, w, mask=inside)


_tables: dict[tuple, list[tuple[bool, Tensor, Tensor]]] = {}


def _found(tensors: list[list[Tensor]], places: list[int]) -> list[tuple[bool, Tensor, Tensor]]:
    """(whether in groups of eight, table, blocks) of each launch: one, and one for tensors of other alignment."""
    device = tensors[0][0].device
    addresses = tuple(t.data_ptr() for kind in tensors for t in kind)
    known = (addresses, tuple(t.numel() for t in tensors[0]), tuple(places), len(tensors), device)
    if known not in _tables:
        if len(_tables) >= _TABLES:
            del _tables[next(iter(_tables))]
        _tables[known] = _made(tensors, places, device)
    return _tables[known]


def _made(tensors: list[list[Tensor]], places: list[int], device: torch.device) -> list[tuple[bool, Tensor, Tensor]]:
    by_group: dict[bool, list[list[int]]] = {}
    for i, param in enumerate(tensors[0]):
        if not param.numel():
            continue
        at = [kind[i].data_ptr() for kind in tensors] + [0] * (5 - len(tensors))
        key, start, run, count, index = places[5 * i : 5 * i + 5]
        whole = all(number % 8 == 0 for number in (start, run, param.numel())) and all(a % 16 == 0 for a in at)
        by_group.setdefault(whole, []).append([*at, param.numel(), key, start, run, count, index])
    found = []
    for whole, rows in sorted(by_group.items(), reverse=True):
        table = torch.tensor(rows, dtype=torch.int64)
        counts = (table[:, 5] + _BLOCK[whole] - 1) // _BLOCK[whole]
        tensor = torch.repeat_interleave(torch.arange(len(rows)), counts)
        first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        blocks = (tensor << 40) + torch.arange(len(tensor)) - first
        if device.type == "cuda":  # from pinned memory: the host does not wait
            table, blocks = (t.pin_memory().to(device, non_blocking=True) for t in (table, blocks))
        found.append((whole, table, blocks))
    return found


@torch.library.custom_op("engine_kernels::adamw_", mutates_args=("params", "exp_avgs", "exp_avg_sqs", "remainders"))
def _adamw(params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
           remainders: Sequence[Tensor], places: Sequence[int], grad_scale: Tensor | None, lr: float, beta1: float,
           beta2: float, eps: float, weight_decay: float, step: int) -> None:
    """One step in one launch. ``places``: five numbers a tensor; ``remainders``: none, or one a tensor."""
    kinds = [list(kind) for kind in (params, grads, exp_avgs, exp_avg_sqs, remainders) if len(kind)]
    types = [getattr(tl, str(kind[0].dtype).removeprefix("torch.")) for kind in kinds[:4]]
    master = "remainder" if len(kinds) == 5 else "plain" if params[0].dtype == torch.float32 else "stochastic"
    for grouped, table, blocks in _found(kinds, list(places)):
        launch(_kernel, (len(blocks),), table, blocks, grad_scale if grad_scale is not None else table,
               step, lr, 1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2, eps, (1 - beta2**step) ** -0.5,
               lr / (1 - beta1**step), PARAM=types[0], GRAD=types[1], M=types[2], V=types[3], MASTER=master,
               SCALED=grad_scale is not None, GROUPED=grouped, N_ROUNDS=ROUNDS, BLOCK=_BLOCK[grouped],
               num_warps=8 if grouped else 4)


@_adamw.register_fake
def _(params, grads, exp_avgs, exp_avg_sqs, remainders, places, grad_scale, lr, beta1, beta2, eps, weight_decay, step):
    return None


def _plain(w: Tensor, grad: Tensor, m: Tensor, v: Tensor, remainder: Tensor | None, place: Place, step: int,
           numbers: dict) -> None:
    """The same step of one tensor in plain torch, with the same random bits."""
    before = w if remainder is None else join_master(w, remainder)
    new = adamw_reference(before, grad, m, v, step=step, **numbers)
    for use, (target, value) in enumerate(((m, new[1]), (v, new[2]))):
        _store(target, value, place, step, use)
    if remainder is None:
        _store(w, new[0], place, step, 2)
    else:
        high, low = split_master(new[0])
        w.copy_(high)
        remainder.copy_(low)


def _store(target: Tensor, value: Tensor, place: Place, step: int, use: int) -> None:
    target.copy_(value if target.dtype == torch.float32 else round_stochastic(value, place, step, use))


def _check(kinds: dict[str, Sequence[Tensor]]) -> None:
    """Raises ValueError that names the argument."""
    params = kinds["params"]
    for name, tensors in kinds.items():
        if len(tensors) != len(params):
            raise ValueError(f"adamw_: {name} has {len(tensors)} tensors, needs {len(params)}")
        allowed = (torch.int16,) if name == "remainders" else (torch.float32, torch.bfloat16)
        for i, t in enumerate(tensors):
            if t.dtype not in allowed or t.dtype != tensors[0].dtype:
                names = " or ".join(str(one).removeprefix("torch.") for one in allowed)
                raise ValueError(f"adamw_: {name}[{i}] is {t.dtype}, needs {names}, one for all")
            if t.numel() != params[i].numel() or not t.is_contiguous() or t.device != params[0].device:
                raise ValueError(f"adamw_: {name}[{i}] is {tuple(t.shape)} on {t.device}, needs {params[i].numel()} "
                                 f"contiguous elements on {params[0].device}")
    if "remainders" in kinds and params[0].dtype != torch.bfloat16:
        raise ValueError(f"adamw_: remainders are for bfloat16 params, not {params[0].dtype}")


@torch.no_grad()
def adamw_(params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
           remainders: Sequence[Tensor] | None = None, *, lr: float, beta1: float, beta2: float, eps: float,
           weight_decay: float, step: int, grad_scale: Tensor | None = None, places: Sequence[Place] | None = None,
           impl: str = "auto") -> None:
    """One AdamW step in place, of contiguous tensors of any shapes (a flat buffer is a list of one).

    ``params``, ``grads`` and moments are each fp32 or bf16; bf16 params have ``remainders`` (int16) or are rounded
    stochastically. ``step`` counts from 1. ``grad_scale``: one fp32 number on the device, multiplied into gradients,
    which stay as they are. ``places``: where random bits come from. Raises ValueError that names the argument.
    """
    if not params:
        return
    kinds = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    _check(kinds if remainders is None else kinds | {"remainders": remainders})
    if places is None:
        places = [Place(key) for key in range(len(params))]
    elif len(places) != len(params):
        raise ValueError(f"adamw_: places has {len(places)} items, needs {len(params)}")
    same, others = {"params": params[0]}, {"grads": grads[0]}
    chosen = dispatch.choose(impl, "adamw", same, others if grad_scale is None else others | {"grad_scale": grad_scale},
                             kernels=("triton",))
    numbers = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    if chosen == "triton":
        flat = [number for place in places for number in place]
        torch.ops.engine_kernels.adamw_(params, grads, exp_avgs, exp_avg_sqs, remainders or [], flat, grad_scale,
                                        **numbers, step=step)
        return
    if all(kind[0].dtype == torch.float32 for kind in kinds.values()):
        scaled = list(grads) if grad_scale is None else [grad * grad_scale for grad in grads]
        count = torch.tensor(float(step), device=params[0].device)
        torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
            list(params), scaled, list(exp_avgs), list(exp_avg_sqs), [], [count] * len(params), lr=lr, beta1=beta1,
            beta2=beta2, weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False)
        return
    scale = 1.0 if grad_scale is None else grad_scale
    for i in range(len(params)):
        _plain(params[i], grads[i], exp_avgs[i], exp_avg_sqs[i], None if remainders is None else remainders[i],
               places[i], step, numbers | {"grad_scale": scale})
