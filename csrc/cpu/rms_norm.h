// y = x * rstd * (w + offset), rstd = 1 / sqrt(mean(x^2) + eps). Backward, with g = dy * (w + offset), xhat = x * rstd:
// dx = rstd * (g - xhat * mean(g * xhat)), dw = sum over rows of dy * xhat. With a residual x is first the rounded sum of
// both, and dx has the sum's own gradient added.

template <class T>
void rms_norm_fwd_rows(const RmsNorm& a, int64_t begin, int64_t end) {
    const int64_t d = a.d;
    const float offset = a.offset;
    const float* __restrict w = a.w;
    for (int64_t i = begin; i < end; ++i) {
        const T* __restrict x = static_cast<const T*>(a.x) + i * a.x_stride;
        T* __restrict y = static_cast<T*>(a.out) + i * d;
        if (a.extra) {
            const T* __restrict residual = static_cast<const T*>(a.extra) + i * a.extra_stride;
            T* __restrict total = static_cast<T*>(a.total) + i * d;
            SIMD
            for (int64_t j = 0; j < d; ++j) store(total + j, load(x + j) + load(residual + j));
            x = total;
        }
        float squares = 0;
        SIMD_SUM(squares)
        for (int64_t j = 0; j < d; ++j) {
            float xj = load(x + j);
            squares += xj * xj;
        }
        const float rstd = 1.0f / __builtin_sqrtf(squares / float(d) + a.eps);
        a.rstd[i] = rstd;
        SIMD
        for (int64_t j = 0; j < d; ++j) store(y + j, load(x + j) * rstd * (w[j] + offset));
    }
}

template <class T>
void rms_norm_bwd_rows(const RmsNorm& a, int64_t begin, int64_t end, float* __restrict dw) {
    const int64_t d = a.d;
    const float offset = a.offset;
    const float* __restrict w = a.w;
    for (int64_t j = 0; j < d; ++j) dw[j] = 0;
    for (int64_t i = begin; i < end; ++i) {
        const T* __restrict x = static_cast<const T*>(a.x) + i * a.x_stride;
        const T* __restrict dy = static_cast<const T*>(a.dy) + i * a.dy_stride;
        const T* __restrict dtotal = a.extra ? static_cast<const T*>(a.extra) + i * a.extra_stride : nullptr;
        T* __restrict dx = static_cast<T*>(a.out) + i * d;
        float dot = 0;
        SIMD_SUM(dot)
        for (int64_t j = 0; j < d; ++j) dot += load(dy + j) * (w[j] + offset) * load(x + j);
        const float rstd = a.rstd[i];
        const float c = dot * rstd / float(d);
        SIMD
        for (int64_t j = 0; j < d; ++j) {
            float xhat = load(x + j) * rstd, g = load(dy + j);
            dw[j] += g * xhat;
            store(dx + j, rstd * (g * (w[j] + offset) - xhat * c) + (dtotal ? load(dtotal + j) : 0.0f));
        }
    }
}

void rms_norm_fwd(const RmsNorm& a, int64_t begin, int64_t end) {
    a.dtype == kFloat32 ? rms_norm_fwd_rows<float>(a, begin, end) : rms_norm_fwd_rows<bf16>(a, begin, end);
}
void rms_norm_bwd(const RmsNorm& a, int64_t begin, int64_t end, float* dw) {
    a.dtype == kFloat32 ? rms_norm_bwd_rows<float>(a, begin, end, dw) : rms_norm_bwd_rows<bf16>(a, begin, end, dw);
}
