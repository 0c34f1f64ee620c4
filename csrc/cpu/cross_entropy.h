// One shard of the vocabulary. stats: max, sum of exp(logit - max), the label's logit, whether the label is the first
// maximum; one pass over memory, in blocks that stay in L1 (maximum, then exponentials; the sum is rescaled when the
// maximum grows). What only smoothing and the entropy need comes from a second pass. An ignored row is not read.
// grad: logits <- ((1 + 2 z_loss lse) exp(logit - max) / sum - on_label onehot - elsewhere) * weight, lse = max + log sum.

template <class T>
void cross_entropy_more_stats(const CrossEntropy& a, const T* __restrict x, float top, float* __restrict stats) {
    const float shift = top == -__builtin_inff() ? 0.0f : top;
    double logits = 0, times = 0;
    for (int64_t from = 0; from < a.valid; from += 1024) {
        const int64_t to = from + 1024 < a.valid ? from + 1024 : a.valid;
        float block_logits = 0, block_times = 0;
        SIMD_SUM(block_logits)
        for (int64_t j = from; j < to; ++j) block_logits += load(x + j);
        SIMD_SUM(block_times)
        for (int64_t j = from; j < to; ++j) {
            const float below = load(x + j) - shift;
            block_times += exp_(below) * (below < -100.0f ? -100.0f : below);  // -inf: 0 * 100
        }
        logits += block_logits, times += block_times;
    }
    stats[4 * a.n] = a.logit_sum ? float(logits) : 0.0f;
    stats[5 * a.n] = a.entropy ? float(times) : 0.0f;
}

template <class T>
void cross_entropy_stats_rows(const CrossEntropy& a, int64_t begin, int64_t end) {
    constexpr int64_t kBlock = 1024;
    const float kNegInf = -__builtin_inff();
    for (int64_t i = begin; i < end; ++i) {
        const T* __restrict x = static_cast<const T*>(a.logits) + i * a.stride;
        float* __restrict stats = a.stats + i;
        if (a.labels[i] < 0) {
            for (int64_t k = 0; k < (a.logit_sum || a.entropy ? 6 : 4); ++k) stats[k * a.n] = k ? 0.0f : kNegInf;
            continue;
        }
        float top = kNegInf;
        double sum = 0;
        for (int64_t from = 0; from < a.valid; from += kBlock) {
            const int64_t to = from + kBlock < a.valid ? from + kBlock : a.valid;
            float block_top = kNegInf;
            SIMD_MAX(block_top)
            for (int64_t j = from; j < to; ++j) {
                float xj = load(x + j);
                block_top = xj > block_top ? xj : block_top;
            }
            if (block_top > top) {
                sum *= top == kNegInf ? 0.0 : double(exp_(top - block_top));
                top = block_top;
            }
            const float shift = top == kNegInf ? 0.0f : top;  // all -inf so far: exp(-inf) = 0, not exp(nan)
            float block_sum = 0;
            SIMD_SUM(block_sum)
            for (int64_t j = from; j < to; ++j) block_sum += exp_(load(x + j) - shift);
            sum += block_sum;
        }
        const int64_t label = a.labels[i] - a.vocab_start;
        const bool here = label >= 0 && label < a.valid;
        const float target = here ? load(x + label) : 0.0f;
        bool hit = here && target == top;
        for (int64_t j = 0; hit && j < label; ++j) hit = load(x + j) != top;
        stats[0] = top, stats[a.n] = float(sum), stats[2 * a.n] = target, stats[3 * a.n] = hit;
        if (a.logit_sum || a.entropy) cross_entropy_more_stats(a, x, top, stats);
    }
}

template <class T>
void cross_entropy_grad_rows(const CrossEntropy& a, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        T* __restrict x = static_cast<T*>(a.logits) + i * a.stride;
        const float weight = a.labels[i] < 0 ? 0.0f : a.weight[i];
        if (weight == 0.0f) {  // an ignored token: exact zeros, whatever its logits
            __builtin_memset(x, 0, a.v * sizeof(T));
            continue;
        }
        const int64_t label = a.labels[i] - a.vocab_start;
        const bool here = label >= 0 && label < a.valid;
        const float top = a.max[i], at_label = here ? load(x + label) : 0.0f, less = a.elsewhere * weight;
        float stretch = 1.0f;  // of the probabilities, by the z-loss
        if (a.z_loss != 0.0f) stretch += 2.0f * a.z_loss * (top + float(__builtin_log(double(a.sum_exp[i]))));
        const float scale = stretch * (weight / a.sum_exp[i]);
        SIMD
        for (int64_t j = 0; j < a.valid; ++j) store(x + j, exp_(load(x + j) - top) * scale - less);
        if (here) store(x + label, (stretch * (exp_(at_label - top) / a.sum_exp[i]) - a.on_label) * weight - less);
        __builtin_memset(x + a.valid, 0, (a.v - a.valid) * sizeof(T));
    }
}

void cross_entropy_stats(const CrossEntropy& a, int64_t begin, int64_t end) {
    a.dtype == kFloat32 ? cross_entropy_stats_rows<float>(a, begin, end)
                        : cross_entropy_stats_rows<bf16>(a, begin, end);
}
void cross_entropy_grad(const CrossEntropy& a, int64_t begin, int64_t end) {
    a.dtype == kFloat32 ? cross_entropy_grad_rows<float>(a, begin, end) : cross_entropy_grad_rows<bf16>(a, begin, end);
}
