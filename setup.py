"""The C++ extensions and nothing else; everything that is metadata stands in pyproject.toml."""

import os
import sys
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

ParallelCompile("MAINSPRING_BUILD_JOBS", default=0).install()  # 0: as many files at once as there are cores

LINUX = sys.platform.startswith("linux")

# torch's wheel brings libgomp under the same SONAME, so one OpenMP pool serves both.
openmp = ["-fopenmp"] if LINUX else []
# csrc/cpu holds the kernels once for each instruction set and picks at run time, so a wheel runs on any x86-64.
fast = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
# `make sanitize`: the data extensions under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]
checked = sanitizers if os.environ.get("MAINSPRING_SANITIZE") else []

# Each a folder of csrc/ and a module of engine: no torch, threads of their own.
DATA = ("index", "tokenize", "text", "dedup")


def data_extension(name: str) -> Pybind11Extension:
    folder = f"csrc/{name}"
    return Pybind11Extension(
        f"engine._{name}", sorted(glob(f"{folder}/*.cpp")), cxx_std=17, include_dirs=[folder, "csrc/common"],
        extra_compile_args=["-O3", "-pthread", *checked], extra_link_args=["-pthread", *checked],
        depends=[*glob(f"{folder}/*.hpp"), *glob(f"{folder}/*.inc"), *glob("csrc/common/*.hpp")],
    )  # fmt: skip


cpu_kernels = Pybind11Extension("engine_kernels._cpu", sorted(glob("csrc/cpu/*.cpp")), cxx_std=17,
                                extra_compile_args=fast + openmp, extra_link_args=openmp, include_dirs=["csrc/cpu"],
                                depends=glob("csrc/cpu/*.h"))

setup(
    cmdclass={"build_ext": build_ext},
    ext_modules=[*(data_extension(name) for name in DATA), *([] if checked else [cpu_kernels])],
)
