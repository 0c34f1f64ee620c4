"""Every kernel compiled for GPUs that are not at hand: registers, spills, shared memory, occupancy.

    python benchmarks/run.py ahead [--ahead-ops rms_norm ...] [--targets 90] [--docs docs/kernels.md]

Compiles what each case of ``benchmarks/cases`` launches, forward and backward, at the sizes of real models, for sm_80,
sm_90 and sm_100; nothing runs and no GPU is needed (TRITON_INTERPRET must not be set). ``occupancy``: resident warps of
those that a multiprocessor can hold; ``16-byte``: share of the global loads and stores that are so wide. A kernel that
spills or needs more shared memory than there is fails the run. ``--docs`` writes the page that shows all this, with the
bytes and FLOPs of each op.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import inspect
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path

from benchmarks import ahead, hardware
from benchmarks.cases import Case, cases_that_import
from benchmarks.harness import ROOT, Row

COMMAND = "python benchmarks/run.py ahead --docs docs/kernels.md"


def add_options(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--ahead-ops", nargs="+", default=(), metavar="OP", help="only files of benchmarks/cases that "
                        "begin so")
    parser.add_argument("--targets", nargs="+", type=int, choices=ahead.TARGETS, default=ahead.TARGETS)
    parser.add_argument("--ahead-scale", choices=["full", "tiny"], default="full")
    parser.add_argument("--docs", type=Path, help="write the page here")


def run(options: argparse.Namespace) -> Iterator[Row]:
    """A row for each kernel (with its constants) and target."""
    files, broken = cases_that_import(options.ahead_scale, options.ahead_ops)
    cases = [case for members in files.values() for case in members]
    for op, error in broken.items():
        yield Row(op, {}, failed=error)
    found: dict[int, list[ahead.Kernel]] = {}
    for capability in options.targets:
        failed: dict[str, Exception] = {}
        found[capability] = list(ahead.compiled_kernels(
            cases, capability, lambda case, error, failed=failed: failed.update({f"{case.op} {case.size}": error})))
        for name, error in failed.items():
            yield Row(f"{name} sm_{capability}", {}, failed=f"{type(error).__name__}: {error}"[:2000])
        yield from map(_row, found[capability])
    if options.docs:
        options.docs.write_text(page(files, found))


def _row(kernel: ahead.Kernel) -> Row:
    needs = kernel.resources
    name = f"{kernel.op} {kernel.size} {kernel.name} {ahead.constants_text(kernel.compiled)} sm_{needs.capability}"
    return Row(name, {"registers": needs.registers, "spilled bytes": needs.spill_bytes,
                      "shared bytes": needs.shared_bytes, "warps": needs.warps, "occupancy %": 100 * needs.occupancy,
                      "16-byte %": 100 * needs.wide, "matrix": needs.matrix or None}, failed=needs.obstacle)


def fingerprint() -> str:
    """Of all that decides what is compiled: the kernels, the cases, how they are compiled, and Triton's version."""
    digest = hashlib.sha256(importlib.metadata.version("triton").encode())
    for path in sorted([*ROOT.glob("kernels/engine_kernels/*.py"), *ROOT.glob("benchmarks/cases/*.py"),
                        ROOT / "benchmarks/ahead.py"]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


# --- the page --------------------------------------------------------------------------------------------------------

def page(files: Mapping[str, Sequence[Case]], kernels: Mapping[int, Sequence[ahead.Kernel]]) -> str:
    """docs/kernels.md."""
    return work(files) + "\n" + needs(kernels)


def work(files: Mapping[str, Sequence[Case]]) -> str:
    """The first part: what each op must move and compute."""
    peaks = hardware.H200
    lines = [
        "# Kernels", "",
        f"Written by `{COMMAND}` from sources {fingerprint()}; a test holds it to the code.", "",
        "## What each op must move and compute", "",
        "Bytes are those that no implementation avoids: each input read once, each output written once. The floor is "
        "the longer of moving the bytes and doing the FLOPs on an H200 by its data sheet "
        f"({peaks.bandwidth / 1e12:.1f} TB/s; {peaks.flops['bf16'] / 1e12:.0f} TFLOP/s dense bf16, twice that in fp8). "
        "A copy through PyTorch moves about 4.3 TB/s there, so 90% of the paper's rate is what a kernel can hope for; "
        "`benchmarks/run.py kernels_gpu` measures both on the GPU at hand and gives shares of the measured copy.", "",
    ]
    for name, members in files.items():
        lines += [f"### {name}", "", _docstring(name), "",
                  "| op | size | forward MB | forward GFLOP | floor µs | backward MB | backward GFLOP | floor µs |",
                  "|---|---|--:|--:|--:|--:|--:|--:|"]
        for case in members:
            cells = [case.op, case.size, *_work_cells(case, case.forward_bytes, case.forward_flops),
                     *_work_cells(case, case.backward_bytes, case.backward_flops)]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _work_cells(case: Case, moved: float | None, flops: float | None) -> list[str]:
    if moved is None:
        return ["-", "-", "-"]
    floor = hardware.H200.floor_seconds(moved, flops or 0, arithmetic_of(case))
    return [f"{moved / 1e6:,.1f}", f"{(flops or 0) / 1e9:,.2f}", f"{floor * 1e6:,.1f}"]


def arithmetic_of(case: Case) -> str:
    """The kind of matrix arithmetic its FLOPs are done in: ``notes["arithmetic"]``, bf16 where it says nothing."""
    return case.notes.get("arithmetic", "bf16")


def _docstring(name: str) -> str:
    return inspect.cleandoc(import_module(f"benchmarks.cases.{name}").__doc__ or "")


def needs(kernels: Mapping[int, Sequence[ahead.Kernel]]) -> str:
    """The second part: what the compiled kernels need of each GPU, kernels of equal needs at several sizes once."""
    lines = [
        "## What the kernels need", "",
        "Compiled ahead of time by Triton for A100 (sm_80), H100 and H200 (sm_90) and B200 (sm_100), at the default "
        "configurations of the sizes above. None spills registers, and a test sees to it. Occupancy is the share of a "
        "multiprocessor's warps that can be resident; 16-byte is the share of global loads and stores that are so "
        "wide.", "",
        "| op | kernel | constants | target | registers | spilled bytes | shared bytes | warps | occupancy | 16-byte |",
        "|---|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    rows: dict[tuple[str, str, str], dict[int, ahead.Resources]] = {}
    for capability, found in kernels.items():
        for kernel in found:
            name = (kernel.op, kernel.name, ahead.constants_text(kernel.compiled))
            known = rows.setdefault(name, {}).get(capability)
            if known is None or known.registers < kernel.resources.registers:  # of several specialisations the worst
                rows[name][capability] = kernel.resources
    for (op, kernel, constants), by_target in rows.items():
        for r in by_target.values():
            cells = [op, f"`{kernel}`", constants, f"sm_{r.capability}", str(r.registers), str(r.spill_bytes),
                     f"{r.shared_bytes:,}", str(r.warps), f"{100 * r.occupancy:.0f}%", f"{100 * r.wide:.0f}%"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
