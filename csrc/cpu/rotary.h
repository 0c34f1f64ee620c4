// Megatron's fused QKV projection -> rotated q, rotated k and v in attention's layout, and back. Half layout: element j
// of a head is paired with j + half; (a, b) -> (a cos - b sin, b cos + a sin). Backward rotates by the opposite angle.
// A row is one (batch, position), position running fastest so that every head is written as one stream.

template <class T>
INLINE void rotate(const T* __restrict in, T* __restrict out, const float* __restrict cos, const float* __restrict sin,
                   int64_t half, int64_t d, float sign) {
    SIMD
    for (int64_t j = 0; j < half; ++j) {
        float a = load(in + j), b = load(in + half + j), c = cos[j], s = sin[j] * sign;
        store(out + j, a * c - b * s);
        store(out + half + j, b * c + a * s);
    }
    for (int64_t j = 2 * half; j < d; ++j) out[j] = in[j];
}

template <class T>
INLINE void copy(const T* __restrict in, T* __restrict out, int64_t d) {
    for (int64_t j = 0; j < d; ++j) out[j] = in[j];
}

template <class T, bool kForward>
void split_rotary_rows(const SplitRotary& a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const int64_t ib = row / a.s, is = row % a.s;
        const float* cos = a.cos + is * a.angle_s + ib * a.angle_b;
        const float* sin = a.sin + is * a.angle_s + ib * a.angle_b;
        T* mixed = static_cast<T*>(a.mixed) + is * a.mixed_s + ib * a.mixed_b;
        T* q = static_cast<T*>(a.q) + ib * a.q_b + is * a.q_s;
        T* k = static_cast<T*>(a.k) + ib * a.k_b + is * a.k_s;
        T* v = static_cast<T*>(a.v) + ib * a.v_b + is * a.v_s;
        for (int64_t g = 0; g < a.groups; ++g) {
            for (int64_t i = 0; i < a.queries; ++i, q += a.q_h, mixed += a.d) {
                if (kForward) rotate(mixed, q, cos, sin, a.half, a.d, 1.0f);
                else rotate(q, mixed, cos, sin, a.half, a.d, -1.0f);
            }
            if (kForward) rotate(mixed, k, cos, sin, a.half, a.d, 1.0f), copy(mixed + a.d, v, a.d);
            else rotate(k, mixed, cos, sin, a.half, a.d, -1.0f), copy(v, mixed + a.d, a.d);
            k += a.k_h, v += a.v_h, mixed += 2 * a.d;
        }
    }
}

void split_rotary_fwd(const SplitRotary& a, int64_t begin, int64_t end) {
    a.dtype == kFloat32 ? split_rotary_rows<float, true>(a, begin, end) : split_rotary_rows<bf16, true>(a, begin, end);
}
void split_rotary_bwd(const SplitRotary& a, int64_t begin, int64_t end) {
    a.dtype == kFloat32 ? split_rotary_rows<float, false>(a, begin, end)
                        : split_rotary_rows<bf16, false>(a, begin, end);
}
