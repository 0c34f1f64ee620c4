"""The profile's suite: names to kinds, time to idle, and the engine's step on a CPU."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from benchmarks import bench_profile
from benchmarks.harness import ROOT
from benchmarks.workers import profile_worker


@pytest.mark.parametrize(("name", "kind"), [
    ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT", "GEMM"),
    ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "GEMM"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_128x128x128", "attention"),
    ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
    ("rms_norm_backward_kernel", "norm"),
    ("fp8_outputs_norm_kernel", "fp8 quantisation"),
    ("swiglu_forward_kernel", "activation"),
    ("qkv_rotary_kernel", "rotary"),
    ("cross_entropy_forward_kernel", "loss"),
    ("adamw_kernel", "optimizer"),
    ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<2>>", "optimizer"),
    ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::NormTwoOps<float>>>", "optimizer"),
    ("grouped_gemm_rows_kernel", "GEMM"),
    ("moe_permute_scatter_kernel", "routing"),
    ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
    ("Memcpy HtoD (Pageable -> Device)", "copies"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", "copies"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>", "elementwise"),
    ("void at::native::(anonymous namespace)::indexSelectLargeIndex<float>", "embedding"),
    ("something_new", "other"),
])
def test_a_kernel_is_told_by_its_name(name, kind):
    assert profile_worker.kind_of(name) == kind


def test_idle_is_what_the_step_takes_beyond_the_union_of_kernels():
    events = [("gemm", 0.0, 1.0), ("adamw_kernel", 0.5, 1.5), ("gemm", 3.0, 4.0)]
    assert profile_worker.busy_seconds((start, end) for _, start, end in events) == 2.5
    found = profile_worker.summarise(events, step_seconds=2.0, steps=2)
    assert found["kinds"] == {"GEMM": 1.0, "optimizer": 0.5, "idle": 0.75}
    assert found["kernels"][0] == {"name": "gemm", "kind": "GEMM", "seconds": 1.0, "calls": 1.0}


def test_what_ran_on_the_gpu():
    def event(name, start, end, device="DeviceType.CUDA", annotation=False):
        return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), device_type=device,
                               is_user_annotation=annotation)

    profiler = SimpleNamespace(events=lambda: [
        event("gemm", 10.0, 30.0), event("aten::mm", 0.0, 50.0, device="DeviceType.CPU"),
        event("Optimizer.step", 0.0, 99.0, annotation=True)])
    assert profile_worker._kernel_events(profiler) == [("gemm", 10e-6, 30e-6)]


def test_the_engines_step_on_a_cpu():
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int)
    bench_profile.add_options(parser.add_argument_group())
    step, *rows = bench_profile.run(parser.parse_args(
        ["--threads", "1", "--profile-model", "tiny", "--profile-precision", "fp32", "--profile-steps", "2",
         "--device", "cpu"]))
    assert not step.failed
    by_name = {row.name: row.values for row in rows}
    assert by_name["tiny fp32 GEMM"]["ms"] > 0
    assert {"tiny fp32 attention", "tiny fp32 optimizer", "tiny fp32 norm", "tiny fp32 idle"} <= set(by_name)
    assert by_name["tiny fp32 kernel 1"]["ms"] >= by_name["tiny fp32 kernel 2"]["ms"]
    assert by_name["tiny fp32 GEMM"]["what"]


NAMES = """
from benchmarks.workers import profile_worker
profile_worker.name_kernels_by_file()
import torch
from engine_kernels import jit
from engine_kernels.rms_norm import rms_norm
with jit.compiling(90) as found:
    rms_norm(torch.empty(4, 64), torch.empty(64), eps=1e-5, impl="triton")
print([compiled.kernel.metadata.name for compiled in found])
"""


def test_our_kernels_are_called_by_their_file(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", NAMES], env=environment, capture_output=True, text=True)
    assert done.stdout == "['rms_norm_forward_kernel']\n", done.stderr
