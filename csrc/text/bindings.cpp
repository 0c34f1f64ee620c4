// Binds only: Python strings as arrays of code units, the GIL. The work is in scan, repetition, languages and leaks.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "languages.hpp"
#include "leaks.hpp"
#include "repetition.hpp"
#include "scan.hpp"

namespace py = pybind11;
using namespace mainspring;

namespace {

// Below this a release of the GIL costs more than it lets others do.
constexpr int64_t LONG = 1 << 14;

// A str as it lies in memory; bytes are decoded as UTF-8 first. `owner` keeps it alive.
struct Source {
    py::object owner;
    Text text;
};

Source source_of(const py::handle& given) {
    py::object owner = py::reinterpret_borrow<py::object>(given);
    if (PyBytes_Check(given.ptr())) {
        owner = py::reinterpret_steal<py::object>(
            PyUnicode_DecodeUTF8(PyBytes_AS_STRING(given.ptr()), PyBytes_GET_SIZE(given.ptr()), "surrogatepass"));
        if (!owner) throw py::error_already_set();
    } else if (!PyUnicode_Check(given.ptr())) {
        throw py::type_error("text must be str or UTF-8 bytes");
    }
    PyObject* text = owner.ptr();
    return {owner, {PyUnicode_DATA(text), PyUnicode_GET_LENGTH(text), static_cast<int>(PyUnicode_KIND(text)),
                    PyUnicode_IS_ASCII(text) != 0}};
}

template <class Work>
auto unlocked(const Source& source, const Work& work) {
    if (source.text.size < LONG) return work(source.text);
    py::gil_scoped_release release;
    return work(source.text);
}

Statistics scanned(const py::object& text) { return unlocked(source_of(text), scan); }

py::tuple repeated(const py::object& text, const std::vector<int>& top, const std::vector<int>& duplicate) {
    const Source source = source_of(text);
    const Repetition found = unlocked(source, [&](const Text& t) { return repetition(t, top, duplicate); });
    return py::make_tuple(found.characters, found.top, found.duplicate);
}

py::tuple hinted(const FunctionWords& words, const py::object& text) {
    const Source source = source_of(text);
    const Hints found = unlocked(source, [&](const Text& t) { return words.hints(t); });
    return py::make_tuple(found.scripts, found.words, found.hits, found.kinds);
}

int64_t add_item(Leaks& leaks, const py::object& text, int set) { return leaks.add(source_of(text).text, set); }

py::list found_leaks(const Leaks& leaks, const py::object& text) {
    const Source source = source_of(text);
    const std::vector<Leak> found = unlocked(source, [&](const Text& t) { return leaks.find(t); });
    py::list list;
    for (const Leak& leak : found) list.append(py::make_tuple(leak.set, leak.first, leak.last));
    return list;
}

}  // namespace

PYBIND11_MODULE(_text, m) {
    m.doc() = "What a document looks like: counts for the cleaning rules, repetition, language, evaluation sets.";
    py::class_<Statistics> statistics(m, "Statistics");
    statistics.def_readonly("characters", &Statistics::characters)
        .def_readonly("letters", &Statistics::letters)
        .def_readonly("digits", &Statistics::digits)
        .def_readonly("spaces", &Statistics::spaces)
        .def_readonly("newlines", &Statistics::newlines)
        .def_readonly("replacements", &Statistics::replacements)
        .def_readonly("hashes", &Statistics::hashes)
        .def_readonly("ellipses", &Statistics::ellipses)
        .def_readonly("words", &Statistics::words)
        .def_readonly("alphabetic_words", &Statistics::alphabetic_words)
        .def_readonly("longest_word", &Statistics::longest_word)
        .def_readonly("longest_space", &Statistics::longest_space)
        .def_readonly("schemes", &Statistics::schemes)
        .def_readonly("urls", &Statistics::urls)
        .def_readonly("url_characters", &Statistics::url_characters)
        .def_readonly("lines", &Statistics::lines)
        .def_readonly("line_characters", &Statistics::line_characters)
        .def_readonly("repeated_lines", &Statistics::repeated_lines)
        .def_readonly("repeated_line_characters", &Statistics::repeated_line_characters)
        .def_readonly("paragraphs", &Statistics::paragraphs)
        .def_readonly("repeated_paragraphs", &Statistics::repeated_paragraphs)
        .def_readonly("repeated_paragraph_characters", &Statistics::repeated_paragraph_characters)
        .def_readonly("short_lines", &Statistics::short_lines)
        .def_readonly("bullet_lines", &Statistics::bullet_lines)
        .def_readonly("ellipsis_lines", &Statistics::ellipsis_lines)
        .def_readonly("ended_lines", &Statistics::ended_lines)
        .def_readonly("mend", &Statistics::mend);
    m.def("scan", &scanned, py::arg("text"));
    m.def("repetition", &repeated, py::arg("text"), py::arg("top"), py::arg("duplicate"));
    py::class_<FunctionWords>(m, "FunctionWords")
        .def(py::init<const std::vector<std::vector<std::u32string>>&>(), py::arg("words"))
        .def("hints", &hinted, py::arg("text"));
    py::class_<Leaks>(m, "Leaks")
        .def(py::init<int, int>(), py::arg("n"), py::arg("shortest"))
        .def("add", &add_item, py::arg("text"), py::arg("set"))
        .def("finish", &Leaks::finish)
        .def("find", &found_leaks, py::arg("text"));
}
