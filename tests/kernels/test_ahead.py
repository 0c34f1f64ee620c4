"""Every kernel compiles for GPUs that are not at hand, at its default configurations, without spills."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import ahead, bench_ahead, hardware
from benchmarks.cases import Case, cases_of, cases_that_import, ops
from benchmarks.harness import ROOT

KERNELS = ROOT / "kernels/engine_kernels"


@dataclasses.dataclass(frozen=True)
class Report:
    """What ``run.py ahead`` said of all cases and targets."""

    targets: tuple[int, ...]
    exit_code: int
    errors: str
    rows: list[dict]
    page: str

    def kernels(self) -> set[str]:
        """"file.function" of every kernel that was compiled."""
        return {name for row in self.rows for name in re.findall(r"\b(\w+\.\w+) ", row["name"] + " ")}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """One process without the interpreter. All targets, or, where the page was written from these very sources by this
    version of Triton, and so says what the others' kernels need, sm_90 alone: a minute less."""
    folder = tmp_path_factory.mktemp("ahead")
    known = f"from sources {bench_ahead.fingerprint()};" in (ROOT / "docs/kernels.md").read_text()
    targets = (90,) if known else ahead.TARGETS
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "benchmarks/run.py", "ahead", "--json", folder / "out.json", "--docs", folder / "kernels.md",
         "--targets", *map(str, targets)],
        cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (folder / "out.json").exists(), done.stderr
    rows = json.loads((folder / "out.json").read_text())["suites"]["ahead"]
    errors = "\n".join(line for line in done.stderr.splitlines() if line.startswith("FAILED")) or done.stderr
    return Report(targets, done.returncode, errors, rows, (folder / "kernels.md").read_text())


def test_every_kernel_compiles_for_every_target_without_spills(report):
    assert report.exit_code == 0, report.errors
    for target in report.targets:
        assert any(row["name"].endswith(f"sm_{target}") for row in report.rows)
    for row in report.rows:
        assert row["values"]["spilled bytes"] == 0
        assert 16 <= row["values"]["registers"] <= 255
        assert 0 < row["values"]["occupancy %"] <= 100


def entry_kernels(path: Path) -> set[str]:
    """Functions under @triton.jit that no other such function of the file calls: those that are launched."""
    functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)
                 and any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)]
    called = {call.func.id for function in functions for call in ast.walk(function)
              if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)}
    return {function.name for function in functions} - called


def test_no_kernel_is_without_a_case(report):
    """A helper that other files' kernels call is compiled with them, and must not look as if it were forgotten."""
    imported = set(re.findall(r"\b_?\w+\b", " ".join(
        line for path in KERNELS.glob("*.py") for line in path.read_text().splitlines()
        if line.startswith("from engine_kernels."))))
    compiled = report.kernels()
    forgotten = [f"{path.stem}.{name}" for path in KERNELS.glob("*.py") for name in entry_kernels(path)
                 if name not in imported and f"{path.stem}.{name}" not in compiled]
    assert not forgotten, f"benchmarks/cases has no case that launches {forgotten}"


@pytest.mark.parametrize("op", ops())
def test_cases_are_whole(op):
    """Each file reads, at both scales; every case names our kernel and a reference."""
    for scale in ("full", "tiny"):
        found = cases_of(op, scale)
        assert found, f"{op} has no cases at scale {scale}"
        names = [(case.op, case.size) for case in found]
        assert len(set(names)) == len(names)
        for case in found:
            assert "ours" in case.runs
            assert case.exact is not None or "eager" in case.runs
            assert case.forward_bytes > 0
            assert (case.backward_bytes is None) == (case.backward_flops is None)
            assert bench_ahead.arithmetic_of(case) in hardware.H200.flops


def without_numbers(page: str, targets: tuple[int, ...]) -> list[str]:
    """The resource table's rows by op, kernel, constants and target."""
    rows = ["|".join(line.split("|")[:5]) for line in page.splitlines() if "| sm_" in line]
    return sorted(row for row in rows if row.endswith(tuple(f"| sm_{target} " for target in targets)))


def test_the_page_has_all_targets_and_no_spills():
    rows = [line.split("|") for line in (ROOT / "docs/kernels.md").read_text().splitlines() if "| sm_" in line]
    ops = {target: {row[1] for row in rows if row[4] == f" sm_{target} "} for target in ahead.TARGETS}
    assert ops[80] == ops[90] == ops[100]
    assert len(ops[90]) > 20
    assert {row[6].strip() for row in rows} == {"0"}


def test_the_page_is_up_to_date(report):
    """Work: to the digit. Needs: the same kernels and targets; registers differ by the compiler's version."""
    written, fix = (ROOT / "docs/kernels.md").read_text(), f"docs/kernels.md is old: {bench_ahead.COMMAND}"
    files, errors = cases_that_import("full")
    assert not errors
    assert written.startswith(bench_ahead.work(files)), fix
    assert without_numbers(written, report.targets) == without_numbers(report.page, report.targets), fix


# --- what the report is made of --------------------------------------------------------------------------------------

@pytest.mark.parametrize(("registers", "shared", "warps", "capability", "share"), [
    (32, 0, 4, 90, 1.0),
    (64, 0, 4, 90, 0.5),  # 65536 / (64 * 128) = 8 blocks of 4 warps
    (65, 0, 4, 90, 0.4375),  # registers are given by 8 a thread
    (32, 100_000, 8, 90, 0.25),  # two blocks' shared memory
    (32, 100_000, 8, 80, 0.125),
    (16, 0, 1, 90, 0.5),  # 32 blocks at most
    (255, 230_000, 8, 90, 0.125),
])
def test_occupancy(registers, shared, warps, capability, share):
    assert ahead._occupancy(ahead.LIMITS[capability], registers, shared, warps) == share


def needs(**changes) -> ahead.Resources:
    return ahead.Resources(**({"registers": 64, "spill_bytes": 0, "stack_bytes": 0, "shared_bytes": 1024, "warps": 4,
                               "occupancy": 0.5, "wide": 1.0, "matrix": "", "capability": 90} | changes))


def test_what_is_no_default_configuration():
    assert needs().obstacle == ""
    assert needs(spill_bytes=4).obstacle == "spills 4 bytes a thread"
    assert needs(shared_bytes=200 * 1024).obstacle == ""
    assert needs(shared_bytes=200 * 1024, capability=80).obstacle == (
        "needs 204800 bytes of shared memory, there are 166912")


def test_the_share_of_wide_accesses():
    ptx = """ld.global.v4.b32 {a, b, c, d}, [x]; st.global.b16 [y], a; @p ld.global.L1::evict_last.v2.b64 {a, b}, [x];
             cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2; ld.shared.b32 a, [x];"""
    assert ahead._wide_share(ptx) == 3 / 4
    assert ahead._wide_share("ld.param.u64 a, [x];") == 1.0


SPILLING = '''
import torch
from engine_kernels import jit
from benchmarks import ahead
from benchmarks.cases import Case
import fat_kernel
def run(x):
    y = torch.empty_like(x)
    jit.launch(fat_kernel.fat, (1,), x, y, SIZE=32768, num_warps=4)
    return y
case = Case("fat", "1", lambda new: (new.normal(32768),), {"ours": run}, 1.0, 1.0)
for kernel in ahead.compiled_kernels([case], 90):
    print(kernel.name, kernel.resources.obstacle)
'''
FAT_KERNEL = '''
from engine_kernels.jit import tl, triton
@triton.jit
def fat(x_ptr, y_ptr, SIZE: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, SIZE)).to(tl.float32)
    tl.store(y_ptr + tl.arange(0, SIZE), x / tl.sum(x, 0))
'''


def test_a_kernel_that_spills_is_found(tmp_path):
    (tmp_path / "fat_kernel.py").write_text(FAT_KERNEL)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run([sys.executable, "-c", SPILLING], env=environment, capture_output=True, text=True)
    assert re.fullmatch(r"fat_kernel\.fat spills \d+ bytes a thread\n", done.stdout), done.stdout + done.stderr


def test_the_floor_is_the_longer_of_bytes_and_arithmetic():
    peaks = hardware.peaks("NVIDIA H200")
    assert peaks is hardware.H200
    assert peaks.floor_seconds(4.8e9, 1e9) == pytest.approx(1e-3)
    assert peaks.floor_seconds(4.8e9, 9.89e12) == pytest.approx(1e-2)
    assert peaks.floor_seconds(0, 1.979e12, "fp8") == pytest.approx(1e-3)
    assert hardware.peaks("Voodoo 2") is None


def test_a_broken_file_of_cases_is_an_error_beside_the_others(tmp_path, monkeypatch):
    import benchmarks.cases

    def broken(op: str, scale: str) -> list[Case]:
        if op == "bad":
            raise ImportError("no such kernel")
        return []

    monkeypatch.setattr(benchmarks.cases, "ops", lambda: ["bad", "good"])
    monkeypatch.setattr(benchmarks.cases, "cases_of", broken)
    assert cases_that_import("tiny") == ({"good": []}, {"bad": "ImportError: no such kernel"})
