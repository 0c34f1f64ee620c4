"""The two C++ extensions and nothing else; everything that is metadata stands in pyproject.toml."""

import sys
from glob import glob

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

LINUX = sys.platform.startswith("linux")

# torch's wheel brings libgomp under the same SONAME, so one OpenMP pool serves both.
openmp = ["-fopenmp"] if LINUX else []
# csrc/cpu holds the kernels once for each instruction set and picks at run time, so a wheel runs on any x86-64.
fast = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]

setup(
    cmdclass={"build_ext": build_ext},
    ext_modules=[
        Pybind11Extension("engine._index", sorted(glob("csrc/index/*.cpp")), cxx_std=17,
                          extra_compile_args=["-O3"], include_dirs=["csrc/index"],
                          depends=glob("csrc/index/*.hpp")),
        Pybind11Extension("engine_kernels._cpu", sorted(glob("csrc/cpu/*.cpp")), cxx_std=17,
                          extra_compile_args=fast + openmp, extra_link_args=openmp, include_dirs=["csrc/cpu"],
                          depends=glob("csrc/cpu/*.h")),
    ],
)
