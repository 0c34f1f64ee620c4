// Binds only: argument checks, the GIL, numpy arrays. The work is in encoder.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "encoder.hpp"
#include "parallel.hpp"
#include "unicode.hpp"

namespace py = pybind11;
using namespace mainspring;
using Ids = py::array_t<int32_t, py::array::c_style>;
using Lengths = py::array_t<int64_t, py::array::c_style>;

namespace {

// (content, id, hidden, single_word, strip_left, strip_right)
using Added = std::tuple<std::string, int32_t, bool, bool, bool, bool>;

std::vector<AddedToken> added(const std::vector<Added>& tokens) {
    std::vector<AddedToken> made;
    for (const auto& [content, id, hidden, single, left, right] : tokens)
        made.push_back({content, id, hidden, single, left, right});
    return made;
}

std::unique_ptr<Encoder> make(Pattern pattern, const Ids& byte_ids, const Ids& merges,
                              std::unordered_map<std::string, int32_t> words, const std::vector<Added>& raw,
                              const std::vector<Added>& normalized, bool normal_form) {
    if (byte_ids.ndim() != 1 || byte_ids.size() != 256) throw py::value_error("byte_ids must have 256 ids");
    if (merges.ndim() != 2 || merges.shape(1) != 3) throw py::value_error("merges must be of shape [n, 3]");
    Model model{pattern, {}, {}, std::move(words), added(raw), added(normalized), normal_form};
    std::memcpy(model.byte_ids, byte_ids.data(), sizeof(model.byte_ids));
    for (py::ssize_t i = 0; i < merges.shape(0); ++i)
        model.merges.push_back({merges.data()[3 * i], merges.data()[3 * i + 1], merges.data()[3 * i + 2]});
    const py::gil_scoped_release release;
    return std::make_unique<Encoder>(model);
}

Text text_of(const py::handle& object, int64_t number) {
    if (PyUnicode_Check(object.ptr())) {
        Py_ssize_t size = 0;
        const char* data = PyUnicode_AsUTF8AndSize(object.ptr(), &size);
        if (!data) throw py::error_already_set();  // a lone surrogate: UnicodeEncodeError, a ValueError
        return {reinterpret_cast<const uint8_t*>(data), static_cast<uint64_t>(size)};
    }
    if (!PyBytes_Check(object.ptr())) throw py::type_error("text " + std::to_string(number) + " is neither str nor bytes");
    return {reinterpret_cast<const uint8_t*>(PyBytes_AS_STRING(object.ptr())),
            static_cast<uint64_t>(PyBytes_GET_SIZE(object.ptr()))};
}

std::pair<Ids, Lengths> encode(Encoder& encoder, const std::vector<Text>& texts, int32_t end_id, int threads) {
    Lengths lengths(static_cast<py::ssize_t>(texts.size()));
    int64_t* lengths_data = lengths.mutable_data();
    Encoded encoded;
    {
        const py::gil_scoped_release release;
        encoded = encoder.encode(texts.data(), static_cast<int64_t>(texts.size()), end_id, threads, lengths_data);
    }
    Ids ids(encoded.total);
    int32_t* out = ids.mutable_data();
    const py::gil_scoped_release release;
    for (auto& part : encoded.parts) {
        if (!part.empty()) std::memcpy(out, part.data(), part.size() * sizeof(int32_t));
        out += part.size();
        std::vector<int32_t>().swap(part);
    }
    return {std::move(ids), std::move(lengths)};
}

std::pair<Ids, Lengths> encode_texts(Encoder& encoder, const py::sequence& texts, int32_t end_id, int threads) {
    // Of our own: another thread may change the list while the GIL is released.
    const py::tuple held(texts);
    std::vector<Text> found;
    found.reserve(held.size());
    for (const py::handle text : held) found.push_back(text_of(text, static_cast<int64_t>(found.size())));
    return encode(encoder, found, end_id, threads);
}

std::pair<Ids, Lengths> encode_spans(Encoder& encoder, const py::buffer& buffer, const Lengths& sizes, int32_t end_id,
                                     int threads) {
    const py::buffer_info info = buffer.request();
    if (info.itemsize != 1 || info.ndim != 1 || (info.size && info.strides[0] != 1))
        throw py::value_error("the buffer must be contiguous bytes");
    std::vector<Text> found;
    found.reserve(sizes.size());
    int64_t left = info.size;
    const auto* at = static_cast<const uint8_t*>(info.ptr);
    for (py::ssize_t i = 0; i < sizes.size(); ++i) {
        const int64_t size = sizes.data()[i];
        if (size < 0 || size > left) throw py::value_error("the sizes do not fit the buffer");
        found.push_back({at, static_cast<uint64_t>(size)});
        at += size, left -= size;
    }
    if (left) throw py::value_error("the sizes do not fit the buffer");
    return encode(encoder, found, end_id, threads);
}

Text whole(const py::bytes& text) {
    const Text found = text_of(text, 0);
    if (invalid_utf8(found.data, found.size) >= 0) throw py::value_error("not UTF-8");
    return found;
}

}  // namespace

PYBIND11_MODULE(_tokenize, m) {
    m.doc() = "Byte-level BPE, the ids of Hugging Face's tokenizers.";
    py::enum_<Pattern>(m, "Pattern")
        .value("LLAMA3", Pattern::kLlama3)
        .value("QWEN2", Pattern::kQwen2)
        .value("GPT2", Pattern::kGpt2)
        .value("DIGITS_GPT2", Pattern::kDigitsGpt2)
        .value("GPT4O", Pattern::kGpt4o)
        .value("TEKKEN", Pattern::kTekken);
    py::class_<Encoder>(m, "Encoder")
        .def(py::init(&make), py::arg("pattern"), py::arg("byte_ids"), py::arg("merges"), py::arg("words"),
             py::arg("raw"), py::arg("normalized"), py::arg("normal_form"))
        .def("encode", &encode_texts, py::arg("texts"), py::arg("end_id"), py::arg("threads"))
        .def("encode_spans", &encode_spans, py::arg("buffer"), py::arg("sizes"), py::arg("end_id"), py::arg("threads"))
        .def("words", [](const Encoder& encoder, const py::bytes& text) { return encoder.words(whole(text)); });
    m.def("surely_normal", [](const py::bytes& text) {
        const Text found = whole(text);
        return surely_normal(found.data, found.size);
    });
    m.def("class_of", [](uint32_t point) {
        if (point >= 0x110000) throw py::value_error("no code point");
        return class_of(point);
    });
    m.def("available_cores", &available_cores);
}
