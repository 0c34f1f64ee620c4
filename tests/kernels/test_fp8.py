"""fp8 quantisation: torch's conversion bit for bit, scales, maxima, transposes, saturation, what is not finite."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine_kernels import fp8
from engine_kernels.fp8 import E4M3, E5M2, amax_bits, quantise, quantise_reference, scale_of
from engine_kernels.fp8_linear import transpose

TYPES = [E4M3, E5M2]
SHAPES = [(70, 130), (1, 1), (129, 3), (1, 515)]


def same(ours: Tensor, exact: Tensor) -> bool:
    """Bit for bit, but for the sign of a NaN."""
    ours, exact = ours.cpu(), exact.cpu()
    nan = exact.float().isnan()
    return (ours.shape == exact.shape and torch.equal(ours.float().isnan(), nan)
            and torch.equal(ours.view(torch.uint8)[~nan], exact.view(torch.uint8)[~nan]))


def equal(ours: fp8.Quantised, exact: fp8.Quantised) -> bool:
    pairs = [(ours.scale, exact.scale), (ours.scale_k, exact.scale_k)]
    found = [torch.equal(a.cpu().nan_to_num(-1), b.cpu().nan_to_num(-1)) for a, b in pairs if b is not None]
    found.append(same(ours.q_nk, exact.q_nk))
    if exact.q_km is not None:
        assert ours.q_km is not None
        found.append(same(ours.q_km, exact.q_km))
    return all(found)


@pytest.fixture(params=[True, False], ids=["native", "by integers"])
def conversion(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to convert: the processor's (or the interpreter's), and that of GPUs before sm_90."""
    if not request.param or not torch.cuda.is_available():
        monkeypatch.setattr(fp8, "native", lambda: request.param)


@pytest.mark.parametrize("dtype", TYPES)
def test_every_kind_of_number_is_rounded_as_torch_does(device, conversion, dtype):
    """Any bits, and all values of the type with their neighbours and the middles between them."""
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    values = values[values.isfinite()].sort().values
    middles = (values[1:] + values[:-1]) / 2
    close = torch.cat([values, middles])
    close = torch.cat([close, *(torch.nextafter(close, torch.tensor(end)) for end in (-torch.inf, torch.inf))])
    bits = torch.randint(-(2**31), 2**31, (8192,)).int().view(torch.float32)
    x = torch.cat([close, bits, torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0])])[None]
    q = quantise(x.to(device), dtype, scale=torch.ones(1, device=device), impl="triton").q_nk
    top = torch.finfo(dtype).max
    assert same(q, x.clamp(-top, top).to(dtype))
    assert q[0, -5:-2].float().tolist()[:2] == [top, -top]
    assert q[0, -3].float().isnan()


@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference(device, conversion, shape, rowwise):
    for dtype in TYPES:
        for wide, power_of_2 in ((torch.bfloat16, True), (torch.float32, False)):
            x = (torch.randn(shape) * torch.logspace(-12, 4, shape[1])).to(device, wide)
            for transposed in (False, True):
                how = {"rowwise": rowwise, "transpose": transposed, "power_of_2": power_of_2}
                assert equal(quantise(x, dtype, impl="triton", **how), quantise_reference(x, dtype, **how)), how


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_scales_and_transposes_by_their_definition(device, impl):
    x = torch.randn(37, 50, device=device) * 3
    for dtype in TYPES:
        top = torch.finfo(dtype).max
        q = quantise(x, dtype, transpose=True, impl=impl)
        assert x.abs().max() <= top * q.scale < 2 * x.abs().max()
        assert q.scale.log2().frac().item() == 0
        assert same(q.q_nk, (x / q.scale).to(dtype))  # exact: a power of two
        assert q.q_km is not None
        assert q.q_km.shape == (50, 48)
        assert same(q.q_km[:, :37], q.q_nk.t())
        assert not q.q_km[:, 37:].float().any()
        rows = quantise(x, dtype, rowwise=True, transpose=True, power_of_2=False, impl=impl)
        torch.testing.assert_close(rows.scale, x.abs().amax(1) / top)
        assert rows.q_km is not None
        assert rows.scale_k is not None
        torch.testing.assert_close(rows.scale_k, x.abs().amax(0) / top)
        step = {E4M3: 2**-3, E5M2: 2**-2}[dtype] / 2
        for back in (rows.q_nk.float() * rows.scale[:, None], (rows.q_km[:, :37].float() * rows.scale_k[:, None]).t(),
                     q.q_nk.float() * q.scale):
            torch.testing.assert_close(back, x, rtol=1.01 * step, atol=x.abs().max().item() * 2**-15)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(0, 150), k=st.integers(0, 150), seed=st.integers(0, 2**31), rowwise=st.booleans(),
       exponent=st.integers(-40, 36), dtype=st.sampled_from(TYPES))
def test_any_shape(n, k, seed, rowwise, exponent, dtype):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = (torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent).to(device)
    how = {"rowwise": rowwise, "transpose": True}
    assert equal(quantise(x, dtype, impl="triton", **how), quantise_reference(x, dtype, **how))
    assert amax_bits(x, impl="triton").view(torch.float32).item() == (x.abs().max().item() if x.numel() else 0.0)


def test_strided_rows(device):
    x = torch.randn(40, 96, device=device)
    for view in (x[:, :33], x[::2], x[:, ::3], x.t()):
        exact = quantise_reference(view.contiguous(), E4M3, transpose=True)
        assert equal(quantise(view, E4M3, transpose=True, impl="triton"), exact)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_zeros_and_what_is_not_finite(device, impl):
    zeros = quantise(torch.zeros(20, 30, device=device), E4M3, rowwise=True, transpose=True, impl=impl)
    assert zeros.scale.tolist() == [1.0] * 20
    assert not zeros.q_nk.float().any()
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = torch.ones(20, 30, device=device)
        x[3, 4] = bad
        assert quantise(x, E5M2, impl=impl).scale.isnan().all()
        rows = quantise(x, E5M2, rowwise=True, transpose=True, impl=impl)
        assert rows.scale_k is not None
        assert rows.scale.isnan().nonzero().tolist() == [[3]]
        assert rows.scale_k.isnan().nonzero().tolist() == [[4]]


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_known_scales_saturate_and_maxima_are_measured(device, impl):
    x, scale = torch.randn(33, 65, device=device), torch.full((1,), 2.0**-8, device=device)
    measured = torch.zeros(1, dtype=torch.int32, device=device)
    q = quantise(x, E4M3, scale=scale, measured=measured, impl=impl)
    assert q.scale is scale
    assert q.q_nk.float().abs().max() == 448
    assert same(q.q_nk, (x * 256).clamp(-448, 448).to(E4M3))
    assert measured.view(torch.float32).item() == x.abs().max().item()
    quantise(x / 2, E4M3, scale=scale, measured=measured, impl=impl)
    assert measured.view(torch.float32).item() == x.abs().max().item()  # raised, never lowered
    other = amax_bits(x * 16)
    assert torch.equal(quantise(x, E4M3, amax=other, impl=impl).scale, scale_of(other, E4M3))


def test_the_maximum_does_not_depend_on_the_order(device):
    x = torch.randn(500, 300, device=device)
    found = {amax_bits(x[torch.randperm(500)], impl="triton").item() for _ in range(5)}
    assert found == {x.abs().max().view(torch.int32).item()}


def test_transpose(device):
    for n, k in ((5, 70), (16, 16), (130, 3)):
        q = torch.randn(n, k, device=device).to(E5M2)
        ours = transpose(q, impl="triton")
        assert ours.shape == (k, fp8.aligned(n))
        assert same(ours[:, :n].contiguous(), q.t().contiguous())
        assert same(ours, transpose(q, impl="torch"))


def test_torch_library_contract(device):
    x = torch.randn(20, 30, device=device)
    one, bits = torch.ones(1, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    ops = torch.ops.engine_kernels
    torch.library.opcheck(ops.fp8_amax.default, (x,))
    torch.library.opcheck(ops.fp8_transpose.default, (x.to(E4M3).view(torch.uint8),))
    for arguments in ((E4M3, False, True, None, None, None, True), (E5M2, True, True, None, None, None, True),
                      (E4M3, False, False, one, None, bits, True), (E4M3, False, True, None, bits, None, False)):
        torch.library.opcheck(ops.fp8_quantise.default, (x, *arguments))


def test_refusals_name_the_argument(device):
    x, one = torch.randn(4, 8, device=device), torch.ones(1, device=device)
    bits = torch.zeros(1, dtype=torch.int32, device=device)
    for message, call in {
        r"x has shape \(4,\), needs two dimensions": lambda: quantise(x[:, 0], E4M3),
        r"dtype must be torch.float8_e4m3fn or torch.float8_e5m2, not": lambda: quantise(x, torch.float16),
        r"scale is torch.int32 of shape \(1,\), needs torch.float32": lambda: quantise(x, E4M3, scale=bits),
        r"amax is torch.float32 of shape \(1,\), needs torch.int32": lambda: quantise(x, E4M3, amax=one),
        r"scale is of a whole tensor, but rowwise is true": lambda: quantise(x, E4M3, scale=one, rowwise=True),
        r"scale and amax are both given": lambda: quantise(x, E4M3, scale=one, amax=bits),
        r"q is torch.float32 of shape \(4, 8\), needs an fp8 matrix": lambda: transpose(x),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(RuntimeError, match=r"quantise: x is torch.float64, needs float32, bfloat16 or float16"):
        quantise(x.double(), E4M3, impl="triton")
    with pytest.raises(RuntimeError, match="x is on meta"):
        quantise(x.to("meta"), E4M3, impl="triton")
    with pytest.raises(ValueError, match=r'impl must be one of "auto", "torch", "triton", not .cpu.'):
        amax_bits(x, impl="cpu")
