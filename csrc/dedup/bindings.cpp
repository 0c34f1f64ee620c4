// Binds only: argument checks, the GIL, numpy arrays. The work is in exact, words, minhash and candidates.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <vector>

#include "exact.hpp"
#include "file.hpp"

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

py::bytes run_bytes(const Words& digests) {
    if (digests.ndim() != 2 || digests.shape(1) != 2) throw py::value_error("digests must be [documents, 2]");
    const uint64_t* data = digests.data();
    const auto count = static_cast<uint64_t>(digests.shape(0));
    std::string out;
    {
        py::gil_scoped_release release;
        out = encode_run(data, count);
    }
    return out;
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
    m.def("header", &header_of, py::arg("path"));
}
