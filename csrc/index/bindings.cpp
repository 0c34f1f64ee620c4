// Binds only: argument checks, the GIL, numpy arrays. The work is in format, samples, gather and packing.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <memory>
#include <string>
#include <system_error>
#include <vector>

#include "blend_bindings.hpp"
#include "corpus.hpp"
#include "format.hpp"
#include "gather.hpp"
#include "map.hpp"
#include "packing.hpp"
#include "random.hpp"
#include "samples.hpp"

namespace py = pybind11;
using namespace mainspring;
using Int64s = py::array_t<int64_t, py::array::c_style>;

namespace {

// ---- files ---------------------------------------------------------------------------------------------------------

py::str file_name(const std::string& path) {  // as os.fsdecode does
    return py::reinterpret_steal<py::str>(PyUnicode_DecodeFSDefaultAndSize(path.data(), py::ssize_t(path.size())));
}

std::shared_ptr<Map> mapped(const std::string& path) {
    try {
        const py::gil_scoped_release release;
        return std::make_shared<Map>(path);
    } catch (const std::system_error& error) {
        const int code = error.code().value();
        PyErr_SetObject(PyExc_OSError, py::make_tuple(code, error.code().message(), file_name(path)).ptr());
        throw py::error_already_set();
    }
}

py::tuple identity(const Map& map) {
    const Identity& found = map.identity();
    return py::make_tuple(found.device, found.inode, found.bytes, found.modified, found.changed);
}

Layout header_of(const py::buffer_info& info) {
    return read_header(static_cast<const char*>(info.ptr), static_cast<uint64_t>(info.size * info.itemsize));
}

py::tuple header(const py::buffer& idx) {
    const Layout layout = header_of(idx.request());
    return py::make_tuple(layout.dtype_code, layout.sequences, layout.document_indices, layout.sizes_at,
                          layout.pointers_at, layout.documents_at);
}

int64_t checked(const py::buffer& idx, int threads) {
    const py::buffer_info info = idx.request();
    const Layout layout = header_of(info);
    const py::gil_scoped_release release;
    return check_tables(static_cast<const char*>(info.ptr), layout, threads);
}

std::shared_ptr<Corpus> corpus_of(const py::iterable& pairs) {
    std::vector<Pair> found;
    for (const py::handle each : pairs) {
        const auto pair = each.cast<py::tuple>();
        if (pair.size() != 3) throw py::value_error("a pair is (idx, bin, tokens)");
        found.push_back({pair[0].cast<std::shared_ptr<Map>>(), pair[1].cast<std::shared_ptr<Map>>(),
                         pair[2].cast<int64_t>()});
    }
    return std::make_shared<Corpus>(found);
}

// ---- orders --------------------------------------------------------------------------------------------------------

Int64s shuffled(int64_t count, uint64_t seed, uint64_t epoch, uint64_t purpose) {
    if (count < 0) throw py::value_error("count must not be negative");
    Int64s order(count);
    int64_t* data = order.mutable_data();
    py::gil_scoped_release release;
    shuffle(stream_key(seed, epoch, purpose), count, data);
    return order;
}

Int64s permuted(const Int64s& places, int64_t count, uint64_t seed, uint64_t epoch, uint64_t purpose) {
    if (count < 0) throw py::value_error("count must not be negative");
    Int64s images(places.size());
    int64_t* out = images.mutable_data();
    const int64_t *from = places.data(), size = places.size();
    const py::gil_scoped_release release;
    const Permutation permutation(stream_key(seed, epoch, purpose), count);
    for (int64_t i = 0; i < size; ++i) {
        if (from[i] < 0 || from[i] >= count) throw std::out_of_range("a place outside the permutation");
        out[i] = permutation(from[i]);
    }
    return images;
}

Int64s totals_of(const Corpus& corpus, int threads) {
    Int64s totals(group_count(corpus.documents()));
    int64_t* out = totals.mutable_data();
    const py::gil_scoped_release release;
    group_tokens(corpus, out, threads);
    return totals;
}

std::unique_ptr<SampleOrder> order_of(std::shared_ptr<Corpus> corpus, const Int64s& totals, int64_t seq_length,
                                      uint64_t seed) {
    return std::make_unique<SampleOrder>(std::move(corpus), totals.data(), totals.size(), seq_length, seed);
}

py::tuple located(const SampleOrder& order, const Int64s& turns) {
    const int64_t *from = turns.data(), size = turns.size();
    Int64s epochs(size), blocks(size);
    int64_t *e = epochs.mutable_data(), *b = blocks.mutable_data();
    {
        const py::gil_scoped_release release;
        for (int64_t i = 0; i < size; ++i) {
            if (from[i] < 0) throw std::out_of_range("a block before the first");
            e[i] = from[i] / order.blocks();
            b[i] = order.epoch(e[i], 0)->blocks(from[i] % order.blocks());
        }
    }
    return py::make_tuple(epochs, blocks);
}

Int64s starts(const SampleOrder& order, int64_t epoch, const Int64s& blocks) {
    if (epoch < 0) throw py::value_error("epochs are counted from 0");
    const int64_t *from = blocks.data(), size = blocks.size();
    Int64s out(std::vector<py::ssize_t>{static_cast<py::ssize_t>(size), 2});
    int64_t* to = out.mutable_data();
    const py::gil_scoped_release release;
    const auto held = order.epoch(epoch, 0);
    for (int64_t i = 0; i < size; ++i) {
        if (from[i] < 0 || from[i] >= order.blocks()) throw std::out_of_range("no such block");
        SampleOrder::Walk walk(order, *held, from[i] * order.seq_length());
        to[2 * i + 1] = walk.offset();
        const Document document = walk.next();
        to[2 * i] = document.shard->first_document + document.number;
    }
    return out;
}

// ---- batches -------------------------------------------------------------------------------------------------------

// Rows of a batch as pieces of one source: a row of a length up to seq_length lies in one block or straddles two.
Int64s pieces_of(const Int64s& positions, int64_t length, int64_t seq_length) {
    if (length < 1 || length > seq_length) throw py::value_error("length must be in [1, seq_length]");
    std::vector<int64_t> rows;
    for (int64_t row = 0; row < positions.size(); ++row) {
        const int64_t position = positions.data()[row], block = position / seq_length, offset = position % seq_length;
        if (position < 0) throw py::value_error("a position is negative");
        const int64_t head = std::min(length, seq_length - offset), out = row * length;
        rows.insert(rows.end(), {0, block, offset, head, out});
        if (head < length) rows.insert(rows.end(), {0, block + 1, 0, length - head, out + head});
    }
    Int64s out(std::vector<py::ssize_t>{static_cast<py::ssize_t>(rows.size() / 5), 5});
    std::copy(rows.begin(), rows.end(), out.mutable_data());
    return out;
}

Batch batch_of(Int64s& tokens, Int64s& labels, const Int64s& pieces, py::ssize_t columns, int threads) {
    if (pieces.ndim() != 2 || pieces.shape(1) != columns)
        throw py::value_error("pieces must have " + std::to_string(columns) + " columns");
    if (tokens.size() != labels.size()) throw py::value_error("tokens and labels differ in size");
    return {tokens.mutable_data(), labels.mutable_data(), tokens.size(), threads};
}

py::list gathered(const py::iterable& sources, const Int64s& pieces, Int64s tokens, Int64s labels, int threads) {
    std::vector<const SampleOrder*> orders;
    for (const py::handle source : sources) orders.push_back(source.cast<const SampleOrder*>());
    const Batch batch = batch_of(tokens, labels, pieces, 5, threads);
    const int64_t *rows = pieces.data(), count = pieces.shape(0);
    std::vector<Range> seen;
    {
        const py::gil_scoped_release release;
        seen = gather_blocks(orders, rows, count, batch);
    }
    py::list ranges;
    for (const Range& range : seen) ranges.append(py::make_tuple(range.low, range.high));
    return ranges;
}

py::tuple rows_of(const Corpus& corpus, const Int64s& pieces, Int64s tokens, Int64s labels, int threads) {
    const Batch batch = batch_of(tokens, labels, pieces, 3, threads);
    const int64_t *rows = pieces.data(), count = pieces.shape(0);
    Range seen{};
    {
        const py::gil_scoped_release release;
        seen = gather_rows(corpus, rows, count, batch);
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

void bind_files(py::module_& m) {
    static py::handle truncated = py::exception<Truncated>(m, "Truncated").release();
    py::register_exception_translator([](std::exception_ptr pointer) {
        try {
            if (pointer) std::rethrow_exception(pointer);
        } catch (const Truncated& error) {
            PyErr_SetObject(truncated.ptr(), py::make_tuple(file_name(error.path), error.bytes).ptr());
        }
    });
    py::class_<Map, std::shared_ptr<Map>>(m, "Map", py::buffer_protocol())
        .def(py::init(&mapped), py::arg("path"))
        .def_buffer([](const Map& map) {
            return py::buffer_info(const_cast<char*>(map.data()), 1, py::format_descriptor<uint8_t>::format(), 1,
                                   {map.bytes()}, {1}, true);
        })
        .def("__len__", &Map::bytes)
        .def_property_readonly("identity", &identity)
        .def("unchanged", &Map::unchanged);
    m.def("read_header", &header, py::arg("idx"));
    m.def("check_tables", &checked, py::arg("idx"), py::arg("threads") = 0);
    py::class_<Corpus, std::shared_ptr<Corpus>>(m, "Corpus")
        .def(py::init(&corpus_of), py::arg("pairs"))
        .def_property_readonly("documents", &Corpus::documents)
        .def_property_readonly("tokens", &Corpus::tokens)
        .def("group_tokens", &totals_of, py::arg("threads") = 0)
        .def("gather", &rows_of, py::arg("pieces"), py::arg("tokens").noconvert(), py::arg("labels").noconvert(),
             py::arg("threads") = 1);
}

void bind_orders(py::module_& m) {
    py::class_<SampleOrder>(m, "SampleOrder")
        .def(py::init(&order_of), py::arg("corpus"), py::arg("totals").noconvert(), py::arg("seq_length"),
             py::arg("seed"), py::keep_alive<1, 3>())
        .def_property_readonly("blocks", &SampleOrder::blocks)
        .def("locate", &located, py::arg("turns"))
        .def("starts", &starts, py::arg("epoch"), py::arg("blocks"));
    m.def("permuted", &permuted, py::arg("places"), py::arg("count"), py::arg("seed"), py::arg("epoch"),
          py::arg("purpose"));
    m.def("pieces", &pieces_of, py::arg("positions"), py::arg("length"), py::arg("seq_length"));
    m.def("gather", &gathered, py::arg("sources"), py::arg("pieces"), py::arg("tokens").noconvert(),
          py::arg("labels").noconvert(), py::arg("threads") = 1);
}

}  // namespace

PYBIND11_MODULE(_index, m) {
    m.doc() = "Megatron .bin/.idx files, sample order and blends. Everything long runs without the GIL.";
    m.def("item_size", &item_size, py::arg("dtype_code"));
    m.def("shuffled", &shuffled, py::arg("count"), py::arg("seed"), py::arg("epoch"), py::arg("purpose"));
    bind_blend(m);
    bind_files(m);
    bind_orders(m);
    m.def("pack", &packed, py::arg("sizes").noconvert(), py::arg("order").noconvert(), py::arg("capacity"));
}
