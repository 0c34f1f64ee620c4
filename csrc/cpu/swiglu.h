// y = silu(gate) * up, gate = x[:, :f], up = x[:, f:]. Backward recomputes s = sigmoid(gate):
// dgate = dy * up * s * (1 + gate * (1 - s)), dup = dy * gate * s.

template <class T>
void swiglu_fwd_rows(const SwiGlu& a, int64_t begin, int64_t end) {
    const int64_t f = a.f;
    for (int64_t i = begin; i < end; ++i) {
        const T* __restrict gate = static_cast<const T*>(a.x) + i * a.x_stride;
        const T* __restrict up = gate + f;
        T* __restrict y = static_cast<T*>(a.out) + i * f;
        SIMD
        for (int64_t j = 0; j < f; ++j) {
            float g = load(gate + j);
            store(y + j, g / (1.0f + exp_(-g)) * load(up + j));
        }
    }
}

template <class T>
void swiglu_bwd_rows(const SwiGlu& a, int64_t begin, int64_t end) {
    const int64_t f = a.f;
    for (int64_t i = begin; i < end; ++i) {
        const T* __restrict gate = static_cast<const T*>(a.x) + i * a.x_stride;
        const T* __restrict up = gate + f;
        const T* __restrict dy = static_cast<const T*>(a.dy) + i * a.dy_stride;
        T* __restrict dgate = static_cast<T*>(a.out) + i * 2 * f;
        T* __restrict dup = dgate + f;
        SIMD
        for (int64_t j = 0; j < f; ++j) {
            float g = load(gate + j), grad = load(dy + j);
            float e = exp_(-g), s = 1.0f / (1.0f + e);
            // 1 - s from e itself: the difference would lose every digit at large gates (and e = inf means s = 0).
            float one_minus = s > 0.0f ? e * s : 1.0f;
            store(dgate + j, grad * load(up + j) * s * (1.0f + g * one_minus));
            store(dup + j, grad * g * s);
        }
    }
}

void swiglu_fwd(const SwiGlu& a, int64_t begin, int64_t end) {
    a.dtype == kFloat32 ? swiglu_fwd_rows<float>(a, begin, end) : swiglu_fwd_rows<bf16>(a, begin, end);
}
void swiglu_bwd(const SwiGlu& a, int64_t begin, int64_t end) {
    a.dtype == kFloat32 ? swiglu_bwd_rows<float>(a, begin, end) : swiglu_bwd_rows<bf16>(a, begin, end);
}
