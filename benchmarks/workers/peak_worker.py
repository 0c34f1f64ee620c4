"""The peak that a CPU's MFU is measured against: the best rate of a large matrix product in a precision.

Through torch and through the engine's way (oneDNN on AMD processors, where torch's fp32 goes to MKL at half the rate).
"""

from __future__ import annotations

from benchmarks.workers.protocol import serve


def build(config: dict):
    """Facts: {"fp32": FLOP/s, "bf16": FLOP/s}; the best of several shapes and repetitions, memory already touched."""
    import time

    import torch

    from engine_kernels.linear import matmul_nt

    torch.set_num_threads(config["threads"])
    peaks = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        best = 0.0
        for size in config["sizes"]:
            a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
            for product in (torch.mm, matmul_nt):
                for _ in range(config["repeats"]):
                    started = time.perf_counter()
                    product(a, b)
                    best = max(best, 2 * size**3 / (time.perf_counter() - started))
        peaks[name] = best
    return (lambda index: 0.0), peaks


if __name__ == "__main__":
    serve(build)
