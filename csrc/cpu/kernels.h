// The table of CPU kernels that every instruction-set translation unit (isa_*.cpp) fills.
//
// A kernel is a serial function over the rows [begin, end): launch.h splits the rows over OpenMP threads. So nothing
// compiled for AVX-512 contains a parallel region, and no compiler has to carry target flags into outlined code.
// Tensors are addresses, sizes and strides in elements; the last dimension is always contiguous.
#pragma once
#include <cstdint>

namespace mainspring {

enum DType : int { kFloat32 = 0, kBFloat16 = 1 };

struct RmsNorm {  // y = x * rstd * (w + offset); x [n, d], w [d] fp32, rstd [n] fp32
    int dtype;
    int64_t d, x_stride, dy_stride, extra_stride;
    float eps, offset;
    const void *x, *dy;
    const void* extra;  // or null: forward the residual that x is added to, backward the gradient of that sum
    const float* w;
    float* rstd;
    void* out;          // y forward, dx backward; [n, d] contiguous
    void* total;        // forward x + extra, where there is an extra
    float* dw_partial;  // [threads, d]
};

struct SplitRotary {  // mixed [s, b, groups * (queries + 2) * d], q [b, groups * queries, s, d], k, v [b, groups, s, d]
    int dtype;
    int64_t s, b, groups, queries, d, half;  // half: rotary pairs a head
    int64_t mixed_s, mixed_b;
    int64_t q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s;
    int64_t angle_s, angle_b;
    void *mixed, *q, *k, *v;  // read or written, by direction
    const float *cos, *sin;   // [s, (b,) half]
};

struct SwiGlu {  // gate = x[:, :f], up = x[:, f:]; the formula: swiglu.h
    int dtype;
    bool clamped;
    float alpha, limit;
    int64_t f, x_stride, dy_stride;
    const void *x, *dy;
    const float* weights;  // [n], or null
    float* dweights;       // [n], where there are weights
    void* out;             // y [n, f] forward, dx [n, 2 f] backward; contiguous
};

struct CrossEntropy {  // logits [n, v]; columns from `valid` on are padding
    int dtype;
    int64_t n, v, valid, stride, vocab_start;
    void* logits;           // overwritten with the gradient by cross_entropy_grad
    const int64_t* labels;  // [n], in the whole vocabulary
    float* stats;           // [s, n]: max, sum of exp, target, hit, and by the flags sum of logits, sum of exp times logit
    bool logit_sum, entropy;
    const float *max, *sum_exp, *weight;  // [n] each, of the whole vocabulary
    float on_label, elsewhere, z_loss;    // 1 - smoothing, smoothing / classes, coefficient of logsumexp^2
};

struct Attention {  // causal; q [b, groups * queries, rows_s, d], k, v [b, groups, rows_t, d], in segments
    int dtype;
    int64_t s, t, window, groups, queries, d;  // of a segment: s queries, the last of its t keys' positions
    int64_t rows_s, rows_t;
    const int64_t* segments;  // [n, 6]: row of q, first query, s, first key, t, row of dk and dv
    float scale;
    int64_t q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, dout_b, dout_h, dout_s, out_b, out_h, out_s;
    const void *q, *k, *v, *dout;
    void* out;
    const float* sinks;   // [h], or null
    float* lse;           // [b, h, rows_s], log of the sum of exp(score)
    void *dq, *dk, *dv;   // contiguous
};

struct Kernels {
    const char* name;
    void (*rms_norm_fwd)(const RmsNorm&, int64_t begin, int64_t end);
    void (*rms_norm_bwd)(const RmsNorm&, int64_t begin, int64_t end, float* dw);
    void (*split_rotary_fwd)(const SplitRotary&, int64_t begin, int64_t end);
    void (*split_rotary_bwd)(const SplitRotary&, int64_t begin, int64_t end);
    void (*swiglu_fwd)(const SwiGlu&, int64_t begin, int64_t end);
    void (*swiglu_bwd)(const SwiGlu&, int64_t begin, int64_t end);
    void (*cross_entropy_stats)(const CrossEntropy&, int64_t begin, int64_t end);
    void (*cross_entropy_grad)(const CrossEntropy&, int64_t begin, int64_t end);
    int64_t (*attention_workspace)(const Attention&, bool backward);  // bytes a thread
    void (*attention_fwd)(const Attention&, int64_t begin, int64_t end, char* workspace);
    void (*attention_bwd)(const Attention&, int64_t begin, int64_t end, char* workspace);
};

extern const Kernels kernels_plain;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;
#endif

}  // namespace mainspring
