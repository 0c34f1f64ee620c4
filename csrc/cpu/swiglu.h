// y = w * gate * sigmoid(alpha gate) * up, gate = x[:, :f], up = x[:, f:]; clamped: gate at most limit, up within
// +-limit, and up + 1 in up's place. w: one a row, or 1. Backward recomputes s = sigmoid(alpha gate):
// dgate = w dy up s (1 + alpha gate (1 - s)), dup = w dy gate s, dw = sum over the row of dy gate s up;
// past a clamp the gradient is 0. A NaN is not clamped: it fails both comparisons.

template <bool kClamped>
INLINE float clamped_gate(float g, float limit) { return kClamped && g > limit ? limit : g; }
template <bool kClamped>
INLINE float clamped_up(float u, float limit) {
    if (!kClamped) return u;
    u = u > limit ? limit : u;
    return (u < -limit ? -limit : u) + 1.0f;
}

template <class T, bool kClamped>
void swiglu_fwd_rows(const SwiGlu& a, int64_t begin, int64_t end) {
    const int64_t f = a.f;
    const float alpha = a.alpha, limit = a.limit;
    for (int64_t i = begin; i < end; ++i) {
        const T* __restrict gate = static_cast<const T*>(a.x) + i * a.x_stride;
        const T* __restrict up = gate + f;
        T* __restrict y = static_cast<T*>(a.out) + i * f;
        const float w = a.weights ? a.weights[i] : 1.0f;
        SIMD
        for (int64_t j = 0; j < f; ++j) {
            float g = clamped_gate<kClamped>(load(gate + j), limit), u = clamped_up<kClamped>(load(up + j), limit);
            store(y + j, g / (1.0f + exp_(-alpha * g)) * u * w);
        }
    }
}

template <class T, bool kClamped, bool kWeighted>
void swiglu_bwd_rows(const SwiGlu& a, int64_t begin, int64_t end) {
    const int64_t f = a.f;
    const float alpha = a.alpha, limit = a.limit;
    for (int64_t i = begin; i < end; ++i) {
        const T* __restrict gate = static_cast<const T*>(a.x) + i * a.x_stride;
        const T* __restrict up = gate + f;
        const T* __restrict dy = static_cast<const T*>(a.dy) + i * a.dy_stride;
        T* __restrict dgate = static_cast<T*>(a.out) + i * 2 * f;
        T* __restrict dup = dgate + f;
        const float w = kWeighted ? a.weights[i] : 1.0f;
        float sum = 0.0f;
        SIMD_SUM(sum)
        for (int64_t j = 0; j < f; ++j) {
            float raw_gate = load(gate + j), raw_up = load(up + j), grad = load(dy + j);
            float g = clamped_gate<kClamped>(raw_gate, limit), u = clamped_up<kClamped>(raw_up, limit);
            float e = exp_(-alpha * g), s = 1.0f / (1.0f + e);
            // 1 - s from e itself: the difference would lose every digit at large gates (and e = inf means s = 0).
            float one_minus = s > 0.0f ? e * s : 1.0f;
            if (kWeighted) sum += grad * g * s * u;
            grad *= w;
            float to_gate = grad * u * s * (1.0f + alpha * g * one_minus), to_up = grad * g * s;
            store(dgate + j, kClamped && raw_gate > limit ? 0.0f : to_gate);
            store(dup + j, kClamped && (raw_up > limit || raw_up < -limit) ? 0.0f : to_up);
        }
        if (kWeighted) a.dweights[i] = sum;
    }
}

template <class T>
void swiglu_fwd_of(const SwiGlu& a, int64_t begin, int64_t end) {
    a.clamped ? swiglu_fwd_rows<T, true>(a, begin, end) : swiglu_fwd_rows<T, false>(a, begin, end);
}
template <class T, bool kClamped>
void swiglu_bwd_of(const SwiGlu& a, int64_t begin, int64_t end) {
    a.weights ? swiglu_bwd_rows<T, kClamped, true>(a, begin, end) : swiglu_bwd_rows<T, kClamped, false>(a, begin, end);
}

void swiglu_fwd(const SwiGlu& a, int64_t begin, int64_t end) {
    a.dtype == kFloat32 ? swiglu_fwd_of<float>(a, begin, end) : swiglu_fwd_of<bf16>(a, begin, end);
}
void swiglu_bwd(const SwiGlu& a, int64_t begin, int64_t end) {
    if (a.dtype == kFloat32) a.clamped ? swiglu_bwd_of<float, true>(a, begin, end) : swiglu_bwd_of<float, false>(a, begin, end);
    else a.clamped ? swiglu_bwd_of<bf16, true>(a, begin, end) : swiglu_bwd_of<bf16, false>(a, begin, end);
}
