// Binds only: argument checks, the GIL, numpy arrays. The work is in exact, words, minhash and near.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <vector>

#include "exact.hpp"
#include "file.hpp"
#include "minhash.hpp"
#include "near.hpp"
#include "words.hpp"

namespace py = pybind11;
using namespace mainspring;

namespace {

using Words = py::array_t<uint64_t, py::array::c_style>;

py::array_t<uint32_t> as_array(const std::vector<Duplicate>& found) {
    static_assert(sizeof(Duplicate) == 16, "four numbers a row");
    py::array_t<uint32_t> out(std::vector<py::ssize_t>{static_cast<py::ssize_t>(found.size()), 4});
    if (!found.empty()) std::memcpy(out.mutable_data(), found.data(), found.size() * sizeof(Duplicate));
    return out;
}

// What encode(allocate) writes, without the GIL, straight into a new bytes object.
template <class Encode>
py::bytes bytes_of(const Encode& encode) {
    py::object made;
    const Allocate allocate = [&](uint64_t size) {
        const py::gil_scoped_acquire hold;
        made = py::reinterpret_steal<py::object>(PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(size)));
        if (!made) throw py::error_already_set();
        return PyBytes_AS_STRING(made.ptr());
    };
    {
        py::gil_scoped_release release;
        encode(allocate);
    }
    return made;
}

py::bytes run_bytes(const Words& digests) {
    if (digests.ndim() != 2 || digests.shape(1) != 2) throw py::value_error("digests must be [documents, 2]");
    const uint64_t* data = digests.data();
    const auto count = static_cast<uint64_t>(digests.shape(0));
    return bytes_of([&](const Allocate& allocate) { encode_run(data, count, allocate); });
}

py::array_t<uint32_t> duplicates(const std::vector<std::string>& paths, uint64_t part, uint64_t parts) {
    std::vector<Duplicate> found;
    {
        py::gil_scoped_release release;
        found = exact_duplicates(paths, part, parts);
    }
    return as_array(found);
}

py::dict header_of(const std::string& path) {
    const Header h = InputFile(path).header();
    py::dict out;
    out["key_words"] = h.key_words;
    out["sections"] = h.sections;
    out["records"] = h.records;
    out["rows"] = h.rows;
    out["permutations"] = h.permutations;
    return out;
}

// The texts of a tuple, which keeps them alive: strings as UTF-8, bytes as they are.
std::vector<Text> texts_of(const py::tuple& items) {
    std::vector<Text> texts;
    texts.reserve(items.size());
    for (const py::handle item : items) {
        Py_ssize_t size = 0;
        const char* data = nullptr;
        if (PyUnicode_Check(item.ptr())) {
            data = PyUnicode_AsUTF8AndSize(item.ptr(), &size);
        } else if (PyBytes_Check(item.ptr())) {
            data = PyBytes_AS_STRING(item.ptr());
            size = PyBytes_GET_SIZE(item.ptr());
        } else {
            throw py::type_error("a text is str or bytes");
        }
        if (data == nullptr) throw py::error_already_set();  // a lone surrogate
        texts.push_back({data, static_cast<uint64_t>(size)});
    }
    return texts;
}

// The texts that lie one after another in a buffer.
std::vector<Text> texts_of(const py::buffer_info& info, const Words& lengths) {
    const char* data = static_cast<const char*>(info.ptr);
    uint64_t left = static_cast<uint64_t>(info.size * info.itemsize);
    std::vector<Text> texts;
    texts.reserve(lengths.size());
    for (py::ssize_t i = 0; i < lengths.size(); ++i) {
        const uint64_t size = lengths.data()[i];
        if (size > left) throw py::value_error("the lengths are longer than the buffer");
        texts.push_back({data, size});
        data += size;
        left -= size;
    }
    return texts;
}

py::array_t<uint32_t> sign(const Minhash& minhash, const std::vector<Text>& texts, int threads, int set = -1) {
    py::array_t<uint32_t> out(
        std::vector<py::ssize_t>{static_cast<py::ssize_t>(texts.size()), minhash.permutations()});
    uint32_t* data = out.mutable_data();
    py::gil_scoped_release release;
    minhash.sign(texts, threads, data, set);
    return out;
}

py::bytes signature_bytes(const py::array_t<uint32_t, py::array::c_style>& signatures, uint64_t bands, uint64_t rows,
                          uint64_t settings, int threads) {
    if (signatures.ndim() != 2) throw py::value_error("signatures must be [documents, permutations]");
    const uint32_t* data = signatures.data();
    const auto documents = static_cast<uint64_t>(signatures.shape(0));
    const auto permutations = static_cast<uint64_t>(signatures.shape(1));
    return bytes_of([&](const Allocate& allocate) {
        encode_signatures(data, documents, permutations, {bands, rows}, settings, threads, allocate);
    });
}

// keep(unit) -> None or [documents] bool; called with the GIL, from the thread that called pairs.
py::bytes pairs(const std::vector<std::string>& paths, const py::object& keep, const PairOptions& options) {
    py::array_t<bool, py::array::c_style> mask;
    const Mask of_unit = [&](uint64_t unit, uint64_t documents) -> const uint8_t* {
        const py::gil_scoped_acquire hold;
        const py::object given = keep.is_none() ? py::none() : keep(unit);
        if (given.is_none()) return nullptr;
        mask = py::array_t<bool, py::array::c_style>::ensure(given);
        if (!mask || mask.ndim() != 1 || static_cast<uint64_t>(mask.size()) != documents)
            throw py::type_error("keep of unit " + std::to_string(unit) + " is not one bool for each of its " +
                                 std::to_string(documents) + " documents");
        return reinterpret_cast<const uint8_t*>(mask.data());
    };
    return bytes_of([&](const Allocate& allocate) { encode_pairs(near_pairs(paths, of_unit, options), allocate); });
}

py::bytes pair_bytes(const py::array_t<uint32_t, py::array::c_style>& rows) {
    if (rows.ndim() != 2 || rows.shape(1) != 4) throw py::value_error("pairs must be [pairs, 4]");
    std::vector<Duplicate> found(static_cast<size_t>(rows.shape(0)));
    if (!found.empty()) std::memcpy(found.data(), rows.data(), found.size() * sizeof(Duplicate));
    return bytes_of([&](const Allocate& allocate) { encode_pairs(found, allocate); });
}

py::array_t<uint32_t> clusters(const std::vector<std::string>& paths, uint64_t units, uint64_t pairs_at_once) {
    std::vector<Duplicate> found;
    {
        py::gil_scoped_release release;
        found = near_clusters(paths, units, pairs_at_once);
    }
    return as_array(found);
}

py::array_t<uint64_t> shingles(const py::bytes& text, int words) {
    const std::string_view view = text;
    Shingler shingler(words);
    const std::vector<uint64_t>& found = words ? shingler.shingles(view.data(), view.size())
                                               : shingler.word_hashes(view.data(), view.size());
    return py::array_t<uint64_t>(static_cast<py::ssize_t>(found.size()), found.data());
}

}  // namespace

PYBIND11_MODULE(_dedup, m) {
    m.doc() = "Exact and near duplicates over files of fingerprints; no torch, the GIL released.";
    py::register_exception_translator([](std::exception_ptr pointer) {
        try {
            if (pointer) std::rethrow_exception(pointer);
        } catch (const FileError& error) {
            const py::tuple arguments = py::make_tuple(error.path, std::string(error.what()));
            PyErr_SetObject(PyExc_ValueError, arguments.ptr());
        }
    });
    m.def("run_bytes", &run_bytes, py::arg("digests"));
    m.def("exact_duplicates", &duplicates, py::arg("paths"), py::arg("part"), py::arg("parts"));
    py::class_<Minhash>(m, "Minhash")
        .def(py::init<int, int, uint64_t>(), py::arg("permutations"), py::arg("words"), py::arg("seed"))
        .def("sign", [](const Minhash& self, const py::tuple& texts, int threads, int set) {
            return sign(self, texts_of(texts), threads, set);
        }, py::arg("texts"), py::arg("threads"), py::arg("instruction_set") = -1)
        .def("sign_packed", [](const Minhash& self, const py::buffer& buffer, const Words& lengths, int threads) {
            const py::buffer_info info = buffer.request();
            return sign(self, texts_of(info, lengths), threads);
        }, py::arg("buffer"), py::arg("lengths"), py::arg("threads"));
    m.def("instruction_sets", &instruction_sets);
    m.def("signature_bytes", &signature_bytes, py::arg("signatures"), py::arg("bands"), py::arg("rows"),
          py::arg("settings"), py::arg("threads") = 1);
    m.def("pairs", [](const std::vector<std::string>& paths, const py::object& keep, uint64_t band, uint64_t part,
                      uint64_t parts, uint64_t matches, uint64_t settings) {
        return pairs(paths, keep, {band, part, parts, matches, settings});
    }, py::arg("paths"), py::arg("keep"), py::arg("band"), py::arg("part"), py::arg("parts"), py::arg("matches"),
          py::arg("settings"));
    m.def("pair_bytes", &pair_bytes, py::arg("pairs"));
    m.def("clusters", &clusters, py::arg("paths"), py::arg("units"), py::arg("pairs_at_once"));
    m.def("character", [](uint32_t code) {
        const Character found = character(code);
        return py::make_tuple(static_cast<int>(found.kind), found.lower);
    }, py::arg("code"));
    m.def("shingles", &shingles, py::arg("text"), py::arg("words"));
    m.def("header", &header_of, py::arg("path"));
}
