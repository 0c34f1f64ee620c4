// One shard of the vocabulary. stats: max, sum of exp(logit - max), the label's logit, whether the label is the first
// maximum; one pass over memory, in blocks that stay in L1 (maximum, then exponentials; the sum is rescaled when the
// maximum grows). grad: logits <- (exp(logit - max) / sum - onehot) * weight.

template <class T>
void cross_entropy_stats_rows(const CrossEntropy& a, int64_t begin, int64_t end) {
    constexpr int64_t kBlock = 1024;
    const float kNegInf = -__builtin_inff();
    for (int64_t i = begin; i < end; ++i) {
        const T* __restrict x = static_cast<const T*>(a.logits) + i * a.stride;
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
        const bool here = a.labels[i] >= 0 && label >= 0 && label < a.valid;
        a.max[i] = top;
        a.sum_exp[i] = float(sum);
        a.target[i] = here ? load(x + label) : 0.0f;
        bool hit = here && a.target[i] == top;
        for (int64_t j = 0; hit && j < label; ++j) hit = load(x + j) != top;
        a.hit[i] = hit;
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
        const float top = a.max[i], scale = weight / a.sum_exp[i], at_label = here ? load(x + label) : 0.0f;
        SIMD
        for (int64_t j = 0; j < a.valid; ++j) store(x + j, exp_(load(x + j) - top) * scale);
        if (here) store(x + label, (exp_(at_label - top) / a.sum_exp[i] - 1.0f) * weight);
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
