// Binds only: argument checks, the GIL, numpy arrays.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_tokenize, m) { m.doc() = ""; }
