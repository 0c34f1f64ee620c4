"""What a kernel needs of a GPU that is not at hand: registers, spills, shared memory, occupancy; from its PTX.

    with jit.compiling(90) as found:
        rms_norm(torch.empty(8192, 4096, dtype=torch.bfloat16), weight, eps=1e-5, impl="triton")
    print([ahead.resources(compiled) for compiled in found])

Triton carries ptxas; it is asked with the options that Triton gives it, and what it reports of the kernel is read.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.cases import Case, Unfilled
from engine_kernels import jit
from engine_kernels.jit import Compiled

TARGETS = (80, 90, 100)


@dataclass(frozen=True)
class _Multiprocessor:
    """Limits of one multiprocessor (CUDA C++ programming guide, table of compute capabilities)."""

    block_shared: int  # bytes a block may take
    shared: int  # bytes of all blocks, 1 KiB a block reserved
    warps: int = 64
    blocks: int = 32
    registers: int = 65536


LIMITS = {80: _Multiprocessor(163 * 1024, 164 * 1024), 90: _Multiprocessor(227 * 1024, 228 * 1024),
          100: _Multiprocessor(227 * 1024, 228 * 1024)}


@dataclass(frozen=True)
class Resources:
    """Of one compiled kernel. ``spill_bytes``: written to local memory for want of registers, a thread.

    ``occupancy``: warps of a multiprocessor that can be resident, of the most there are, as registers, shared memory
    and block limits allow. ``wide``: the share of its global loads and stores (as written) that move 16 bytes.
    ``matrix``: the kind of matrix instruction used ("wgmma", "tcgen05", "mma" or "").
    """

    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    warps: int
    occupancy: float
    wide: float
    matrix: str
    capability: int

    @property
    def obstacle(self) -> str:
        """Why this may not be a default configuration; empty if it may."""
        if self.spill_bytes:
            return f"spills {self.spill_bytes} bytes a thread"
        limit = LIMITS[self.capability].block_shared
        if self.shared_bytes > limit:
            return f"needs {self.shared_bytes} bytes of shared memory, there are {limit}"
        return ""


def resources(compiled: Compiled) -> Resources:
    """Reads them off ``compiled.kernel.asm["ptx"]``, for the target that it was compiled for."""
    metadata, ptx = compiled.kernel.metadata, compiled.kernel.asm["ptx"]
    capability = int(metadata.target.arch)
    registers, spills, stack, static = _assembled(ptx, capability, bool(metadata.enable_fp_fusion))
    shared = metadata.shared + static
    return Resources(registers, spills, stack, shared, metadata.num_warps,
                     _occupancy(LIMITS[capability], registers, shared, metadata.num_warps), _wide_share(ptx),
                     next((kind for kind in ("wgmma", "tcgen05", "mma") if f"{kind}." in ptx), ""), capability)


@functools.lru_cache(maxsize=4096)
def _assembled(ptx: str, capability: int, fused: bool) -> tuple[int, int, int, int]:
    """-> registers a thread, bytes spilled, stack bytes, static shared bytes: ``ptxas -v`` with Triton's options."""
    from triton.backends.nvidia import compiler

    fmad = [] if fused else ["--fmad=false"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(ptx)
        source.flush()
        for register_option in (["--regAllocOptLevel=2"], []):  # Triton 3.7 passes it, 3.6 does not
            command = [compiler.get_ptxas(capability).path, "-v", "-lineinfo", *fmad, *register_option,
                       f"--gpu-name={compiler.sm_arch_from_capability(capability)}", source.name, "-o", "/dev/null"]
            finished = subprocess.run(command, capture_output=True, text=True)
            if finished.returncode == 0:
                break
    report = finished.stdout + finished.stderr
    if finished.returncode:
        raise RuntimeError(f"ptxas ended with exit code {finished.returncode}:\n{report[-2000:]}")

    def most(pattern: str) -> int:  # a device function that was not inlined has a line of its own
        return max((int(number) for number in re.findall(pattern, report)), default=0)

    return (most(r"Used (\d+) registers"), most(r"(\d+) bytes spill stores"), most(r"(\d+) bytes stack frame"),
            most(r"(\d+) bytes smem"))


def _occupancy(limits: _Multiprocessor, registers: int, shared: int, warps: int) -> float:
    """Registers are given to warps in units of 256, shared memory to blocks with 1 KiB on top."""
    warp_registers = -(-max(registers, 1) * 32 // 256) * 256
    blocks = min(limits.blocks, limits.warps // warps, limits.registers // (warp_registers * warps),
                 limits.shared // (shared + 1024))
    return blocks * warps / limits.warps


def _wide_share(ptx: str) -> float:
    """Of ld/st.global instructions and asynchronous copies; 1 for a kernel whose tiles the bulk copy engine moves."""
    widths = [int(count or 1) * int(bits) // 8 for count, bits in
              re.findall(r"\b(?:ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bfus](\d+)\b", ptx)]
    copies = r"cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], (\w+)"
    widths += [int(size, 0) for size in re.findall(copies, ptx)]
    return sum(width >= 16 for width in widths) / len(widths) if widths else 1.0


# --- the kernels of a case -------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Kernel:
    """One kernel of a case at one target."""

    op: str
    size: str
    compiled: Compiled
    resources: Resources

    @property
    def name(self) -> str:
        """The file and the function: rms_norm._forward_kernel."""
        return f"{self.compiled.kernel.src.fn.fn.__module__.rpartition('.')[2]}.{self.compiled.name}"


def compiled_kernels(cases: Iterable[Case], capability: int,
                     failed: Callable[[Case, Exception], None] | None = None) -> Iterator[Kernel]:
    """Compiles what each case launches forward and backward; kernels that were seen (same PTX) are left out.

    A case that raises is given to ``failed``, or raises where there is none.
    """
    seen: set[str] = set()
    for case in cases:
        with jit.compiling(capability) as found:
            try:
                run_both(case)
            except Exception as error:
                if failed is None:
                    raise
                failed(case, error)
        for compiled in found:
            ptx = compiled.kernel.asm["ptx"]
            if ptx not in seen:
                seen.add(ptx)
                yield Kernel(case.op, case.size, compiled, resources(compiled))


def run_both(case: Case) -> None:
    """Our implementation forward and, where it has one, backward, on inputs that are never filled."""
    arguments = case.make(Unfilled())
    outputs = case.runs["ours"](*arguments)
    outputs = [out for out in (outputs if isinstance(outputs, tuple) else (outputs,)) if isinstance(out, torch.Tensor)]
    if case.backward_bytes is not None:
        differentiable = [out for out in outputs if out.requires_grad]
        torch.autograd.backward(differentiable, [torch.empty_like(out) for out in differentiable])


def constants_text(compiled: Compiled) -> str:
    """The constexpr arguments on one line: "ROWS=1 COLUMNS=4096 ADD"; flags that are off are left out."""

    def one(name: str, value: Any) -> str:
        return name if value is True else f"{name}={value}"

    return " ".join(one(name, value) for name, value in compiled.constants.items() if value is not False)
