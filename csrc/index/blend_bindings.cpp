// Binds blend.hpp: argument checks, the GIL, numpy arrays.
#include "blend_bindings.hpp"

#include <pybind11/numpy.h>

#include "blend.hpp"

namespace py = pybind11;
using Int64s = py::array_t<int64_t, py::array::c_style>;

namespace mainspring {
namespace {

Blend blend_of(const Int64s& weights) {
    if (weights.ndim() != 1) throw py::value_error("weights must have one dimension");
    return Blend(weights.data(), weights.size());
}

Int64s counts(const Int64s& weights, int64_t position) {
    const Blend blend = blend_of(weights);
    Int64s found(blend.sources());
    int64_t* data = found.mutable_data();
    py::gil_scoped_release release;
    blend.counts(position, data);
    return found;
}

int64_t rank(const Int64s& weights, int64_t source, int64_t own) { return blend_of(weights).rank(source, own); }

int64_t earliest(const Int64s& weights, const Int64s& own) {
    if (own.ndim() != 1 || own.size() != weights.size()) throw py::value_error("weights and own differ in length");
    return blend_of(weights).earliest(own.data());
}

py::tuple range(const Int64s& weights, int64_t first, int64_t count, int threads) {
    const Blend blend = blend_of(weights);
    if (count < 0) throw py::value_error("count must not be negative");
    py::array_t<uint16_t> source(count);
    Int64s own(count);
    uint16_t* s = source.mutable_data();
    int64_t* o = own.mutable_data();
    {
        py::gil_scoped_release release;
        blend.range(first, count, threads, s, o);
    }
    return py::make_tuple(source, own);
}

py::tuple locate(const Int64s& weights, const Int64s& positions) {
    const Blend blend = blend_of(weights);
    if (positions.ndim() != 1) throw py::value_error("positions must have one dimension");
    const int64_t* data = positions.data();
    const int64_t count = positions.size();
    Int64s source(count), own(count);
    int64_t *s = source.mutable_data(), *o = own.mutable_data();
    {
        py::gil_scoped_release release;
        blend.locate(data, count, s, o);
    }
    return py::make_tuple(source, own);
}

}  // namespace

void bind_blend(py::module_& m) {
    m.def("blend_counts", &counts, py::arg("weights"), py::arg("position"));
    m.def("blend_rank", &rank, py::arg("weights"), py::arg("source"), py::arg("own"));
    m.def("blend_earliest", &earliest, py::arg("weights"), py::arg("own"));
    m.def("blend_range", &range, py::arg("weights"), py::arg("first"), py::arg("count"), py::arg("threads") = 0);
    m.def("blend_locate", &locate, py::arg("weights"), py::arg("positions"));
}

}  // namespace mainspring
