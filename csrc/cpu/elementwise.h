// Conversions and exp() that the compiler vectorises. Included inside an instruction set's namespace: no include guard.
// Plain C only: a standard-library template instantiated here could be linked into code for an older processor.

struct bf16 {
    uint16_t bits;
};

INLINE uint32_t bits_of(float x) {
    uint32_t u;
    __builtin_memcpy(&u, &x, 4);
    return u;
}
INLINE float float_of(uint32_t u) {
    float x;
    __builtin_memcpy(&x, &u, 4);
    return x;
}

INLINE float load(const float* p) { return *p; }
INLINE float load(const bf16* p) { return float_of(uint32_t(p->bits) << 16); }
INLINE void store(float* p, float x) { *p = x; }
INLINE void store(bf16* p, float x) {  // round to nearest even; a NaN stays one (rounding could carry it into infinity)
    uint32_t u = bits_of(x);
    uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    uint32_t quiet = (u >> 16) | 0x40u;
    p->bits = uint16_t((u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

// exp(x) to about 1 ulp; results below 2^-126 are 0, from 2^127.5 on infinity; NaN stays NaN. Cephes' polynomial on
// [-ln2/2, ln2/2]; adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits of the sum.
INLINE float exp_(float x) {
    x = -88.0f > x ? -88.0f : x;
    x = 88.73f < x ? 88.73f : x;
    float shifted = x * 1.44269504088896341f + 12582912.0f;
    float n = shifted - 12582912.0f;
    float r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return p * float_of((bits_of(shifted) - 0x4b400000u + 127u) << 23);
}
