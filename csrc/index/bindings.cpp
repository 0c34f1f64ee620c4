// Binds only: argument checks, the GIL, numpy arrays. The work is in format, samples, gather and packing.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <vector>

#include "format.hpp"
#include "gather.hpp"
#include "packing.hpp"
#include "samples.hpp"

namespace py = pybind11;
using namespace mainspring;
using Int64s = py::array_t<int64_t, py::array::c_style>;

namespace {

// Views into a mapped .idx are unaligned, so array_t (which may copy them) is not for them.
template <class T>
Unaligned<T> view(const py::array& array, const char* name) {
    const auto type = array.dtype();
    if (type.kind() != 'i' || type.itemsize() != static_cast<py::ssize_t>(sizeof(T)) || array.ndim() != 1 ||
        !(array.flags() & py::array::c_style))
        throw py::type_error(std::string(name) + " must be a contiguous one-dimensional array of " +
                             std::to_string(8 * sizeof(T)) + "-bit integers");
    return {static_cast<const char*>(array.data())};
}

py::tuple parse(const py::buffer& idx) {
    const py::buffer_info info = idx.request();
    Layout layout{};
    {
        py::gil_scoped_release release;
        layout = parse_index(static_cast<const char*>(info.ptr), static_cast<uint64_t>(info.size * info.itemsize));
    }
    return py::make_tuple(layout.dtype_code, layout.sequences, layout.document_indices, layout.tokens,
                          layout.sizes_at, layout.pointers_at, layout.documents_at);
}

py::bytes encode(const py::array& sizes, int dtype_code) {
    return index_bytes(view<int32_t>(sizes, "sizes"), sizes.size(), dtype_code);
}

Int64s shuffled(int64_t count, uint64_t seed, uint64_t epoch, uint64_t purpose) {
    if (count < 0) throw py::value_error("count must not be negative");
    Int64s order(count);
    int64_t* data = order.mutable_data();
    py::gil_scoped_release release;
    shuffle(stream_key(seed, epoch, purpose), count, data);
    return order;
}

Int64s starts(const py::array& sizes, const Int64s& order, int64_t stride, int64_t count) {
    const auto sizes_view = view<int32_t>(sizes, "sizes");
    if (order.size() != sizes.size()) throw py::value_error("order and sizes differ in length");
    if (stride < 1 || count < 0) throw py::value_error("stride must be positive, count not negative");
    Int64s out(std::vector<py::ssize_t>{static_cast<py::ssize_t>(count), 2});
    int64_t* data = out.mutable_data();
    const int64_t* order_data = order.data();
    const int64_t documents = order.size();
    py::gil_scoped_release release;
    sample_starts(sizes_view, order_data, documents, stride, count, data);
    return out;
}

py::tuple blended(const Int64s& weights, Int64s deficits, Int64s counts, int64_t steps) {
    const int64_t sources = weights.size();
    if (sources < 1 || sources > 65535) throw py::value_error("a blend has 1 to 65535 sources");
    if (deficits.size() != sources || counts.size() != sources || steps < 0)
        throw py::value_error("weights, deficits and counts differ in length");
    Int64s new_deficits(sources, deficits.data()), new_counts(sources, counts.data()), block(steps);
    py::array_t<uint16_t> source(steps);
    const int64_t* w = weights.data();
    int64_t *d = new_deficits.mutable_data(), *c = new_counts.mutable_data(), *b = block.mutable_data();
    uint16_t* s = source.mutable_data();
    {
        py::gil_scoped_release release;
        blend(w, sources, d, c, steps, s, b);
    }
    return py::make_tuple(source, block, new_deficits, new_counts);
}

py::tuple gathered(const py::buffer& bin, int dtype_code, const py::array& sizes, const py::array& pointers,
                   const py::object& order, const Int64s& pieces, Int64s tokens, Int64s labels) {
    const py::buffer_info info = bin.request();
    Corpus corpus{static_cast<const char*>(info.ptr), static_cast<int64_t>(info.size * info.itemsize), dtype_code,
                  view<int32_t>(sizes, "sizes"), view<int64_t>(pointers, "pointers"), nullptr, sizes.size()};
    Int64s order_array;
    if (!order.is_none()) {
        order_array = order.cast<Int64s>();
        corpus.order = order_array.data();
    }
    if (pointers.size() != sizes.size() || (corpus.order && order_array.size() != sizes.size()))
        throw py::value_error("sizes, pointers and order differ in length");
    if (pieces.ndim() != 2 || pieces.shape(1) != 4) throw py::value_error("pieces must have four columns");
    if (tokens.size() != labels.size()) throw py::value_error("tokens and labels differ in size");
    const int64_t *rows = pieces.data(), count = pieces.shape(0), capacity = tokens.size();
    int64_t *t = tokens.mutable_data(), *l = labels.mutable_data();
    Range seen{};
    {
        py::gil_scoped_release release;
        seen = gather(corpus, rows, count, t, l, capacity);
    }
    return py::make_tuple(seen.low, seen.high);
}

Int64s as_array(const std::vector<int64_t>& values) {
    Int64s array(static_cast<py::ssize_t>(values.size()));
    std::copy(values.begin(), values.end(), array.mutable_data());
    return array;
}

py::tuple packed(const py::array_t<int32_t, py::array::c_style>& sizes, const Int64s& order, int64_t capacity) {
    if (sizes.ndim() != 1 || order.ndim() != 1 || order.size() != sizes.size())
        throw py::value_error("order and sizes differ in length");
    if (capacity < 1) throw py::value_error("capacity must be positive");
    const int32_t* sizes_data = sizes.data();
    const int64_t *order_data = order.data(), count = order.size();
    Packing packing;
    {
        py::gil_scoped_release release;
        packing = pack(sizes_data, order_data, count, capacity);
    }
    return py::make_tuple(as_array(packing.items), as_array(packing.starts));
}

}  // namespace

PYBIND11_MODULE(_index, m) {
    m.doc() = "Megatron .bin/.idx files, sample order and blends. Everything long runs without the GIL.";
    m.def("parse_index", &parse, py::arg("idx"));
    m.def("index_bytes", &encode, py::arg("sizes"), py::arg("dtype_code"));
    m.def("item_size", &item_size, py::arg("dtype_code"));
    m.def("shuffled", &shuffled, py::arg("count"), py::arg("seed"), py::arg("epoch"), py::arg("purpose"));
    m.def("sample_starts", &starts, py::arg("sizes"), py::arg("order"), py::arg("stride"), py::arg("count"));
    m.def("blend", &blended, py::arg("weights"), py::arg("deficits"), py::arg("counts"), py::arg("steps"));
    m.def("gather", &gathered, py::arg("bin"), py::arg("dtype_code"), py::arg("sizes"), py::arg("pointers"),
          py::arg("order"), py::arg("pieces"), py::arg("tokens").noconvert(), py::arg("labels").noconvert());
    m.def("pack", &packed, py::arg("sizes").noconvert(), py::arg("order").noconvert(), py::arg("capacity"));
}
