// The part of the module that is in blend_bindings.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace mainspring {

void bind_blend(pybind11::module_& m);

}  // namespace mainspring
