// engine_kernels._cpu: binds only. Every pointer is a tensor's data_ptr(); the launchers in kernels/engine_kernels/*.py
// check shapes, dtypes and strides and allocate the outputs. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <atomic>
#include <cstdint>

#include "launch.h"

namespace py = pybind11;
using namespace mainspring;
using Address = std::uintptr_t;

template <class T>
static T* at(Address address) { return reinterpret_cast<T*>(address); }

static void rms_norm_fwd(int dtype, Address x, Address residual, Address w, Address y, Address total, Address rstd,
                         int64_t n, int64_t d, int64_t x_stride, int64_t residual_stride, float eps, float offset,
                         int threads) {
    RmsNorm a{};
    a.dtype = dtype, a.d = d, a.x_stride = x_stride, a.extra_stride = residual_stride, a.eps = eps, a.offset = offset;
    a.extra = at<void>(residual), a.total = at<void>(total);
    a.x = at<void>(x), a.w = at<float>(w), a.out = at<void>(y), a.rstd = at<float>(rstd);
    split_rows(n, threads, [&](int64_t begin, int64_t end, int) { kernels().rms_norm_fwd(a, begin, end); });
}

static void rms_norm_bwd(int dtype, Address x, Address dy, Address dtotal, Address w, Address rstd, Address dx,
                         Address dw_partial, int64_t n, int64_t d, int64_t x_stride, int64_t dy_stride,
                         int64_t dtotal_stride, float offset, int threads) {
    RmsNorm a{};
    a.dtype = dtype, a.d = d, a.x_stride = x_stride, a.dy_stride = dy_stride, a.extra_stride = dtotal_stride;
    a.offset = offset, a.extra = at<void>(dtotal);
    a.x = at<void>(x), a.dy = at<void>(dy), a.w = at<float>(w), a.out = at<void>(dx), a.rstd = at<float>(rstd);
    a.dw_partial = at<float>(dw_partial);
    split_rows(n, threads, [&](int64_t begin, int64_t end, int thread) {
        kernels().rms_norm_bwd(a, begin, end, a.dw_partial + thread * d);
    });
}

// strides: mixed s, b; q b, h, s; k b, h, s; v b, h, s; angles s, b.  sizes: s, b, groups, queries, d, half.
static void split_rotary(bool forward, int dtype, Address mixed, Address q, Address k, Address v, Address cos,
                         Address sin, const std::array<int64_t, 6>& sizes, const std::array<int64_t, 13>& strides,
                         int threads) {
    SplitRotary a{};
    a.dtype = dtype;
    a.s = sizes[0], a.b = sizes[1], a.groups = sizes[2], a.queries = sizes[3], a.d = sizes[4], a.half = sizes[5];
    a.mixed_s = strides[0], a.mixed_b = strides[1];
    a.q_b = strides[2], a.q_h = strides[3], a.q_s = strides[4];
    a.k_b = strides[5], a.k_h = strides[6], a.k_s = strides[7];
    a.v_b = strides[8], a.v_h = strides[9], a.v_s = strides[10];
    a.angle_s = strides[11], a.angle_b = strides[12];
    a.mixed = at<void>(mixed), a.q = at<void>(q), a.k = at<void>(k), a.v = at<void>(v);
    a.cos = at<float>(cos), a.sin = at<float>(sin);
    auto kernel = forward ? kernels().split_rotary_fwd : kernels().split_rotary_bwd;
    split_rows(a.s * a.b, threads, [&](int64_t begin, int64_t end, int) { kernel(a, begin, end); });
}

static SwiGlu swiglu(int dtype, Address x, Address weights, Address out, int64_t f, int64_t x_stride, bool clamped,
                     float alpha, float limit) {
    SwiGlu a{};
    a.dtype = dtype, a.clamped = clamped, a.alpha = alpha, a.limit = limit, a.f = f, a.x_stride = x_stride;
    a.x = at<void>(x), a.weights = at<float>(weights), a.out = at<void>(out);
    return a;
}

static void swiglu_fwd(int dtype, Address x, Address weights, Address y, int64_t n, int64_t f, int64_t x_stride,
                       bool clamped, float alpha, float limit, int threads) {
    const SwiGlu a = swiglu(dtype, x, weights, y, f, x_stride, clamped, alpha, limit);
    split_rows(n, threads, [&](int64_t begin, int64_t end, int) { kernels().swiglu_fwd(a, begin, end); });
}

static void swiglu_bwd(int dtype, Address x, Address dy, Address weights, Address dx, Address dweights, int64_t n,
                       int64_t f, int64_t x_stride, int64_t dy_stride, bool clamped, float alpha, float limit,
                       int threads) {
    SwiGlu a = swiglu(dtype, x, weights, dx, f, x_stride, clamped, alpha, limit);
    a.dy_stride = dy_stride, a.dy = at<void>(dy), a.dweights = at<float>(dweights);
    split_rows(n, threads, [&](int64_t begin, int64_t end, int) { kernels().swiglu_bwd(a, begin, end); });
}

static void cross_entropy_stats(int dtype, Address logits, Address labels, Address stats, int64_t n, int64_t v,
                                int64_t valid, int64_t stride, int64_t vocab_start, bool logit_sum, bool entropy,
                                int threads) {
    CrossEntropy a{};
    a.dtype = dtype, a.n = n, a.v = v, a.valid = valid, a.stride = stride, a.vocab_start = vocab_start;
    a.logits = at<void>(logits), a.labels = at<int64_t>(labels), a.stats = at<float>(stats);
    a.logit_sum = logit_sum, a.entropy = entropy;
    split_rows(n, threads, [&](int64_t begin, int64_t end, int) { kernels().cross_entropy_stats(a, begin, end); });
}

static void cross_entropy_grad(int dtype, Address logits, Address labels, Address max, Address sum_exp, Address weight,
                               int64_t n, int64_t v, int64_t valid, int64_t stride, int64_t vocab_start, float on_label,
                               float elsewhere, float z_loss, int threads) {
    CrossEntropy a{};
    a.dtype = dtype, a.n = n, a.v = v, a.valid = valid, a.stride = stride, a.vocab_start = vocab_start;
    a.logits = at<void>(logits), a.labels = at<int64_t>(labels), a.max = at<float>(max);
    a.sum_exp = at<float>(sum_exp), a.weight = at<float>(weight);
    a.on_label = on_label, a.elsewhere = elsewhere, a.z_loss = z_loss;
    split_rows(n, threads, [&](int64_t begin, int64_t end, int) { kernels().cross_entropy_grad(a, begin, end); });
}

// strides: b, h, s of q, k, v, dout, out.  sizes: segments, s, t, window, groups, queries, d.
using AttentionSizes = std::array<int64_t, 7>;

static Attention attention(int dtype, const std::array<Address, 6>& in, Address out, Address lse,
                           const AttentionSizes& sizes, const std::array<int64_t, 15>& strides, float scale) {
    Attention a{};
    a.dtype = dtype, a.scale = scale;
    a.rows_s = sizes[1], a.rows_t = sizes[2], a.window = sizes[3], a.groups = sizes[4], a.queries = sizes[5], a.d = sizes[6];
    a.q_b = strides[0], a.q_h = strides[1], a.q_s = strides[2], a.k_b = strides[3], a.k_h = strides[4];
    a.k_s = strides[5], a.v_b = strides[6], a.v_h = strides[7], a.v_s = strides[8];
    a.dout_b = strides[9], a.dout_h = strides[10], a.dout_s = strides[11];
    a.out_b = strides[12], a.out_h = strides[13], a.out_s = strides[14];
    a.q = at<void>(in[0]), a.k = at<void>(in[1]), a.v = at<void>(in[2]), a.dout = at<void>(in[3]);
    a.sinks = at<float>(in[4]), a.segments = at<int64_t>(in[5]);
    a.out = at<void>(out), a.lse = at<float>(lse);
    return a;
}

static int64_t attention_workspace(int dtype, int64_t s, int64_t t, int64_t d, bool backward) {
    Attention a{};
    a.dtype = dtype, a.s = s, a.t = t, a.d = d;
    return kernels().attention_workspace(a, backward);
}

// Segments cost what their documents' lengths make them: a thread that is done takes the next.
template <class Kernel>
static void attention_tasks(const Attention& a, int64_t segments, Address workspace, int64_t bytes, int threads,
                            Kernel kernel) {
    std::atomic<int64_t> next{0};
    const int64_t tasks = segments * a.groups;
    split_rows(threads, threads, [&](int64_t, int64_t, int thread) {
        for (int64_t task = next++; task < tasks; task = next++)
            kernel(a, task, task + 1, at<char>(workspace) + thread * bytes);
    });
}

static void attention_fwd(int dtype, const std::array<Address, 6>& in, Address out, Address lse, Address workspace,
                          int64_t bytes, const AttentionSizes& sizes, const std::array<int64_t, 15>& strides,
                          float scale, int threads) {
    const Attention a = attention(dtype, in, out, lse, sizes, strides, scale);
    attention_tasks(a, sizes[0], workspace, bytes, threads, kernels().attention_fwd);
}

static void attention_bwd(int dtype, const std::array<Address, 6>& in, Address out, Address lse,
                          const std::array<Address, 3>& grads, Address workspace, int64_t bytes,
                          const AttentionSizes& sizes, const std::array<int64_t, 15>& strides, float scale,
                          int threads) {
    Attention a = attention(dtype, in, out, lse, sizes, strides, scale);
    a.dq = at<void>(grads[0]), a.dk = at<void>(grads[1]), a.dv = at<void>(grads[2]);
    attention_tasks(a, sizes[0], workspace, bytes, threads, kernels().attention_bwd);
}

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "Mainspring's CPU kernels: addresses, sizes, strides in elements, dtype code (0 fp32, 1 bf16), threads.";
    auto def = [&m](const char* name, auto* function) {
        m.def(name, function, py::call_guard<py::gil_scoped_release>());
    };
    def("rms_norm_fwd", rms_norm_fwd);
    def("rms_norm_bwd", rms_norm_bwd);
    def("split_rotary", split_rotary);
    def("swiglu_fwd", swiglu_fwd);
    def("swiglu_bwd", swiglu_bwd);
    def("cross_entropy_stats", cross_entropy_stats);
    def("cross_entropy_grad", cross_entropy_grad);
    def("attention_workspace", attention_workspace);
    def("attention_fwd", attention_fwd);
    def("attention_bwd", attention_bwd);
    m.def("instruction_set", [] { return kernels().name; }, "in use: avx512_bf16, avx512, avx2 or plain");
    m.def("use_instruction_set", &choose_kernels, "for tests: switch the whole process; False when it cannot run here");
}
