"""split_qkv_rotary against float64, and its formula against Transformers' and Megatron's."""

from __future__ import annotations

import importlib
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_kernels.rotary import rotary_reference, split_qkv_rotary, split_qkv_rotary_reference

DTYPES = [torch.float32, torch.bfloat16]


def angles(*rows_and_pairs):
    theta = torch.rand(rows_and_pairs) * 1000
    return theta.cos(), theta.sin()


def pair(cos, sin, g, m, d):
    """The kernel and the reference as functions of the projection alone."""
    layout = {"num_groups": g, "queries_per_group": m, "head_dim": d}
    return (lambda x: split_qkv_rotary(x, cos, sin, **layout, impl="cpu"),
            lambda x: split_qkv_rotary_reference(x, cos, sin, **layout))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("s", "b", "g", "m", "d", "r"), [
    (16, 2, 2, 2, 64, 32), (5, 3, 1, 4, 10, 5), (7, 1, 3, 1, 24, 4), (1, 1, 1, 1, 2, 1), (3, 2, 2, 1, 8, 0),
    (0, 2, 1, 1, 8, 4), (4, 0, 1, 1, 8, 4), (33, 2, 1, 3, 17, 8),
])
def test_values_and_gradients(compare, threads, dtype, s, b, g, m, d, r):
    compare(*pair(*angles(s, r), g, m, d), torch.randn(s, b, g * (m + 2) * d, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(compare, instruction_set, dtype):
    compare(*pair(*angles(9, 20), 2, 3, 50), torch.randn(9, 2, 500, dtype=dtype))


@settings(max_examples=25, deadline=None)
@given(s=st.integers(1, 12), b=st.integers(1, 3), g=st.integers(1, 3), m=st.integers(1, 3), d=st.integers(1, 40),
       data=st.data())
def test_any_shape(s, b, g, m, d, data):
    cos, sin = angles(s, data.draw(st.integers(0, d // 2)))
    x = torch.randn(s, b, g * (m + 2) * d)
    kernel, reference = pair(cos, sin, g, m, d)
    for ours, exact in zip(kernel(x), reference(x.double()), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)
        assert ours.is_contiguous()


def test_positions_of_their_own_for_each_sequence(compare):
    compare(*pair(*angles(6, 3, 8), 2, 2, 16), torch.randn(6, 3, 2 * 4 * 16))


def test_strided_projection_and_gradients(compare):
    kernel, reference = pair(*angles(6, 8), 2, 2, 16)
    for view in (lambda x: x.transpose(0, 1)[:, :, :128], lambda x: x.transpose(0, 1)[:, :, ::2]):
        def strided(function, x, v=view):  # contiguous outputs, but gradients that arrive transposed
            return tuple(t.permute(3, 2, 1, 0) for t in function(v(x)))
        compare(partial(strided, kernel), partial(strided, reference), torch.randn(4, 6, 256))


def test_angles_as_the_front_half_of_a_repeated_table(compare):
    cos, sin = angles(6, 8)
    table = torch.cat((cos, cos), -1)
    x = torch.randn(6, 2, 4 * 16)
    ours = pair(table[:, :8], sin, 1, 2, 16)[0](x)
    assert all(map(torch.equal, ours, pair(cos, sin, 1, 2, 16)[0](x)))


def test_reference_equals_transformers():
    llama = importlib.import_module("transformers.models.llama.modeling_llama")
    cos, sin = angles(12, 16)
    q, k = torch.randn(2, 4, 12, 32), torch.randn(2, 2, 12, 32)
    table = [torch.cat((t, t), -1)[None] for t in (cos, sin)]
    for x, expected in zip((q, k), llama.apply_rotary_pos_emb(q, k, *table), strict=True):
        torch.testing.assert_close(rotary_reference(x, cos, sin), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rotary_dim", [32, 16])
@pytest.mark.filterwarnings("ignore")
def test_kernel_equals_megatron(rotary_dim):
    megatron = importlib.import_module("megatron.core.models.common.embeddings.rope_utils")
    s, b, g, m, d = 12, 2, 2, 3, 32
    theta = torch.rand(s, rotary_dim // 2) * 100
    freqs = torch.cat((theta, theta), -1)[:, None, None]
    mixed = torch.randn(s, b, g * (m + 2) * d)
    heads = mixed.view(s, b, g, m + 2, d)
    config = SimpleNamespace(apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=False)
    rope = partial(megatron.apply_rotary_pos_emb, freqs=freqs, config=config, cp_group=object())
    q = rope(heads[:, :, :, :m].reshape(s, b, g * m, d)).permute(1, 2, 0, 3)
    k = rope(heads[:, :, :, m]).permute(1, 2, 0, 3)
    v = heads[:, :, :, m + 1].permute(1, 2, 0, 3)
    ours = pair(theta.cos(), theta.sin(), g, m, d)[0](mixed)
    for mine, expected in zip(ours, (q, k, v), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)


def test_nan_stays_in_its_pair():
    x = torch.randn(2, 1, 3 * 8)
    x[1, 0, 1] = float("nan")
    q, k, v = pair(*angles(2, 4), 1, 1, 8)[0](x)
    assert q.isnan().nonzero().tolist() == [[0, 0, 1, 1], [0, 0, 1, 5]]
    assert not k.isnan().any()
    assert not v.isnan().any()


def test_torch_library_contract():
    cos, sin = angles(5, 4)
    mixed = torch.randn(5, 2, 2 * 4 * 8, requires_grad=True)
    torch.library.opcheck(torch.ops.engine_kernels.split_qkv_rotary_fwd.default, (mixed, cos, sin, 2, 2, 8))
    grads = (torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8))
    torch.library.opcheck(torch.ops.engine_kernels.split_qkv_rotary_bwd.default, (*grads, cos, sin))


def test_shapes_that_do_not_fit_are_named():
    mixed = torch.randn(5, 2, 64)
    layout = {"num_groups": 2, "queries_per_group": 2, "head_dim": 8}
    with pytest.raises(ValueError, match=r"65 columns, 2 groups of 2 \+ 2 heads of 8 need 64"):
        split_qkv_rotary(torch.randn(5, 2, 65), *angles(5, 4), **layout)
    for cos, sin in (angles(4, 4), angles(5, 5), (torch.ones(5, 4), torch.ones(5, 3)), angles(2, 5, 4)):
        with pytest.raises(ValueError, match=r"must be \[5, r\]"):
            split_qkv_rotary(mixed, cos, sin, **layout)
