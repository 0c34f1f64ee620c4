// Causal attention with an online softmax (FlashAttention, Dao 2023), in tiles of 64 keys x 64 queries that are skipped
// above the diagonal. Score tiles are held transposed, [key][query]: statistics of a query are then a lane, reductions
// over keys need no shuffles, and a tile is at once the right operand of the next product. With X^T[d][s]:
//   forward   S^T = K Q^T,  O^T += V^T P^T
//   backward  S^T = K Q^T,  dP^T = V dO^T,  dV += P^T dO,  dS^T = P^T (dP^T - delta),  dK += dS^T Q,  dQ^T += K^T dS^T
// A task is one (batch, key group): its query heads share the packed keys and values, nothing is repeated, and dK, dV
// need no reduction over threads. Rows and head dimension are zero-padded to the tile in the packed copies.
// C, the type products are computed in, is float, or bf16 (fp32 sums) where the processor has AVX512_BF16.

constexpr int64_t kTile = 64;

template <class C> struct Right;  // element of a right operand: bf16 ones hold two consecutive k
template <> struct Right<float> { using type = float; static constexpr int64_t k = 1; };
template <> struct Right<bf16> { using type = uint32_t; static constexpr int64_t k = 2; };

INLINE int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// [rows, d] -> [rows_padded, d_padded] in C, zeros around.
template <class T, class C>
INLINE void pack_rows(const T* __restrict from, int64_t stride, int64_t rows, int64_t d, int64_t rows_padded,
                      int64_t d_padded, C* __restrict to) {
    for (int64_t i = 0; i < rows_padded; ++i, to += d_padded) {
        const int64_t have = i < rows ? d : 0;
        const T* __restrict row = from + i * stride;
        SIMD
        for (int64_t j = 0; j < have; ++j) store(to + j, load(row + j));
        __builtin_memset(to + have, 0, (d_padded - have) * sizeof(C));
    }
}

// One tile [64][w] -> [w][64]: of floats, of bf16, or of pairs of bf16.
template <class E>
INLINE void transpose(const E* __restrict from, int64_t w, E* __restrict to) {
    for (int64_t j0 = 0; j0 < w; j0 += 16)
        for (int64_t i = 0; i < kTile; ++i)
            for (int64_t j = j0; j < j0 + 16; ++j) to[j * kTile + i] = from[i * w + j];
}

// [s][d] rows in C -> right operand of a product over d, by tile of 64 rows: [d / k][64].
INLINE void right_over_columns(const float* from, int64_t w, float* to) { transpose(from, w, to); }
INLINE void right_over_columns(const bf16* from, int64_t w, uint32_t* to) {
    transpose(reinterpret_cast<const uint32_t*>(from), w / 2, to);
}

// [64][w] -> right operand of a product over the rows: itself in fp32, pairs of rows in bf16.
INLINE const float* right_over_rows(const float* from, int64_t, float*) { return from; }
INLINE const uint32_t* right_over_rows(const bf16* __restrict from, int64_t w, uint32_t* __restrict to) {
    for (int64_t i = 0; i < kTile / 2; ++i)
        for (int64_t j = 0; j < w; ++j)
            to[i * w + j] = from[2 * i * w + j].bits | uint32_t(from[(2 * i + 1) * w + j].bits) << 16;
    return to;
}

// A computed fp32 tile as a left operand.
INLINE const float* left(const float* tile, float*) { return tile; }
INLINE const bf16* left(const float* __restrict tile, bf16* __restrict to) {
    SIMD
    for (int64_t i = 0; i < kTile * kTile; ++i) store(to + i, tile[i]);
    return to;
}

struct Arena {  // carves a thread's workspace; with a null base it only counts
    char* base;
    int64_t used;
    template <class E>
    E* take(int64_t count) {
        E* p = reinterpret_cast<E*>(base + used);
        used += padded(count * int64_t(sizeof(E)), 64);
        return p;
    }
};

template <class C>
struct ForwardSpace {
    C *k_rows, *v_columns, *rows, *weights;
    typename Right<C>::type *q_right, *weights_right;
    float *tile, *out, *top, *sum, *fix;
    ForwardSpace(Arena& m, int64_t s, int64_t d) {
        k_rows = m.take<C>(s * d), v_columns = m.take<C>(s * d), rows = m.take<C>(kTile * d);
        weights = m.take<C>(kTile * kTile), q_right = m.take<typename Right<C>::type>(kTile * d);
        weights_right = m.take<typename Right<C>::type>(kTile * kTile), tile = m.take<float>(kTile * kTile);
        out = m.take<float>(kTile * d), top = m.take<float>(kTile), sum = m.take<float>(kTile);
        fix = m.take<float>(kTile);
    }
};

INLINE void mask_above_diagonal(float* tile, float value) {  // [key][query]: a query sees keys up to its own
    for (int64_t key = 1; key < kTile; ++key)
        for (int64_t q = 0; q < key; ++q) tile[key * kTile + q] = value;
}

// One score tile into the running maximum and sum of its 64 queries; leaves exp(score - max) in the tile.
INLINE void online_softmax(float* __restrict tile, float scale, float* __restrict top, float* __restrict sum,
                           float* __restrict fix, float* __restrict out, int64_t d) {
    float now[kTile];
    for (int64_t q = 0; q < kTile; ++q) now[q] = top[q];
    for (int64_t key = 0; key < kTile; ++key)
        for (int64_t q = 0; q < kTile; ++q) {
            float x = tile[key * kTile + q] * scale;
            now[q] = x > now[q] ? x : now[q];
        }
    bool grew = false;
    for (int64_t q = 0; q < kTile; ++q) {
        grew |= now[q] > top[q];
        fix[q] = exp_(top[q] - now[q]), top[q] = now[q], sum[q] *= fix[q];
    }
    if (grew)
        for (int64_t c = 0; c < d; ++c)
            for (int64_t q = 0; q < kTile; ++q) out[c * kTile + q] *= fix[q];
    for (int64_t key = 0; key < kTile; ++key)
        for (int64_t q = 0; q < kTile; ++q) {
            float p = exp_(tile[key * kTile + q] * scale - top[q]);
            tile[key * kTile + q] = p;
            sum[q] += p;
        }
}

template <class T, class C>
void attention_fwd_task(const Attention& a, int64_t task, char* workspace) {
    const int64_t ib = task / a.groups, ig = task % a.groups, s = padded(a.s, kTile), d = padded(a.d, kColumns);
    Arena arena{workspace, 0};
    ForwardSpace<C> w(arena, s, d);
    pack_rows(static_cast<const T*>(a.k) + ib * a.k_b + ig * a.k_h, a.k_s, a.s, a.d, s, d, w.k_rows);
    for (int64_t j = 0; j < s; j += kTile) {
        const int64_t rows = a.s - j < kTile ? a.s - j : kTile;
        pack_rows(static_cast<const T*>(a.v) + ib * a.v_b + ig * a.v_h + j * a.v_s, a.v_s, rows, a.d, kTile, d, w.rows);
        transpose(w.rows, d, w.v_columns + j * d);
    }
    for (int64_t h = ig * a.queries; h < (ig + 1) * a.queries; ++h)
        for (int64_t i = 0; i < s; i += kTile) {
            const int64_t rows = a.s - i < kTile ? a.s - i : kTile;
            const T* q_rows = static_cast<const T*>(a.q) + ib * a.q_b + h * a.q_h + i * a.q_s;
            pack_rows(q_rows, a.q_s, rows, a.d, kTile, d, w.rows);
            right_over_columns(w.rows, d, w.q_right);
            for (int64_t q = 0; q < kTile; ++q) w.top[q] = -__builtin_inff(), w.sum[q] = 0;
            __builtin_memset(w.out, 0, kTile * d * sizeof(float));
            for (int64_t j = 0; j <= i; j += kTile) {
                const bool diagonal = i == j;
                product<false>(w.k_rows + j * d, d, w.q_right, kTile, w.tile, kTile, kTile, kTile, d,
                               diagonal ? kRowsToColumn : kAll);
                if (diagonal) mask_above_diagonal(w.tile, -__builtin_inff());
                online_softmax(w.tile, a.scale, w.top, w.sum, w.fix, w.out, d);
                auto weights = right_over_rows(left(w.tile, w.weights), kTile, w.weights_right);
                product<true>(w.v_columns + j * d, kTile, weights, kTile, w.out, kTile, d, kTile, kTile,
                              diagonal ? kDepthToColumn : kAll);
            }
            T* out = static_cast<T*>(a.out) + ib * a.out_b + h * a.out_h + i * a.out_s;
            float* lse = a.lse + (ib * a.groups * a.queries + h) * a.s + i;
            for (int64_t q = 0; q < rows; ++q) {
                lse[q] = w.top[q] + __builtin_logf(w.sum[q]);
                const float inverse = 1.0f / w.sum[q];
                for (int64_t c = 0; c < a.d; ++c) store(out + q * a.out_s + c, w.out[c * kTile + q] * inverse);
            }
        }
}

template <class C>
struct BackwardSpace {
    C *k_rows, *v_rows, *k_columns, *rows, *weights;
    typename Right<C>::type *q_over_d, *do_over_d, *q_over_s, *do_over_s, *scores_right;
    float *p, *dp, *dk, *dv, *dq, *lse, *delta;
    BackwardSpace(Arena& m, int64_t s, int64_t d) {
        using R = typename Right<C>::type;
        k_rows = m.take<C>(s * d), v_rows = m.take<C>(s * d), k_columns = m.take<C>(s * d), rows = m.take<C>(2 * s * d);
        weights = m.take<C>(kTile * kTile), scores_right = m.take<R>(kTile * kTile);
        q_over_d = m.take<R>(s * d), do_over_d = m.take<R>(s * d);
        q_over_s = m.take<R>(s * d), do_over_s = m.take<R>(s * d);
        p = m.take<float>(kTile * kTile), dp = m.take<float>(kTile * kTile), dk = m.take<float>(s * d);
        dv = m.take<float>(s * d), dq = m.take<float>(s * d), lse = m.take<float>(s), delta = m.take<float>(s);
    }
};

// Both operands of one query-side tensor: over d and over s, by tile.
template <class T, class C>
INLINE void pack_queries(const T* from, int64_t stride, const Attention& a, int64_t s, int64_t d, C* rows,
                         typename Right<C>::type* over_d, typename Right<C>::type* over_s) {
    pack_rows(from, stride, a.s, a.d, s, d, rows);
    for (int64_t i = 0; i < s; i += kTile) {
        right_over_columns(rows + i * d, d, over_d + i * d / Right<C>::k);
        right_over_rows(rows + i * d, d, over_s + i * d / Right<C>::k);
    }
}

// P^T and dS^T of one tile from S^T and dP^T, in place.
INLINE void softmax_backward(float* __restrict p, float* __restrict dp, float scale, const float* __restrict lse,
                             const float* __restrict delta, bool diagonal) {
    for (int64_t key = 0; key < kTile; ++key)
        for (int64_t q = 0; q < kTile; ++q) {
            const int64_t at = key * kTile + q;
            p[at] = exp_(p[at] * scale - lse[q]);
            dp[at] = p[at] * (dp[at] - delta[q]);
        }
    if (diagonal) mask_above_diagonal(p, 0), mask_above_diagonal(dp, 0);
}

template <class T>
INLINE void write_rows(const float* __restrict from, int64_t from_stride, float scale, T* __restrict to, int64_t rows,
                       int64_t d) {
    for (int64_t i = 0; i < rows; ++i) {
        SIMD
        for (int64_t c = 0; c < d; ++c) store(to + i * d + c, from[i * from_stride + c] * scale);
    }
}

template <class T, class C>
void attention_bwd_task(const Attention& a, int64_t task, char* workspace) {
    const int64_t ib = task / a.groups, ig = task % a.groups, s = padded(a.s, kTile), d = padded(a.d, kColumns);
    Arena arena{workspace, 0};
    BackwardSpace<C> w(arena, s, d);
    using R = typename Right<C>::type;
    constexpr int64_t pair = Right<C>::k;
    pack_rows(static_cast<const T*>(a.k) + ib * a.k_b + ig * a.k_h, a.k_s, a.s, a.d, s, d, w.k_rows);
    pack_rows(static_cast<const T*>(a.v) + ib * a.v_b + ig * a.v_h, a.v_s, a.s, a.d, s, d, w.v_rows);
    for (int64_t j = 0; j < s; j += kTile) transpose(w.k_rows + j * d, d, w.k_columns + j * d);
    __builtin_memset(w.dk, 0, s * d * sizeof(float));
    __builtin_memset(w.dv, 0, s * d * sizeof(float));
    for (int64_t h = ig * a.queries; h < (ig + 1) * a.queries; ++h) {
        const int64_t head = (ib * a.groups * a.queries + h) * a.s;
        const T* dout = static_cast<const T*>(a.dout) + ib * a.dout_b + h * a.dout_h;
        const T* q_rows = static_cast<const T*>(a.q) + ib * a.q_b + h * a.q_h;
        const T* out = static_cast<const T*>(a.out) + ib * a.out_b + h * a.out_h;
        C* rows_do = w.rows + s * d;
        pack_queries(q_rows, a.q_s, a, s, d, w.rows, w.q_over_d, w.q_over_s);
        pack_queries(dout, a.dout_s, a, s, d, rows_do, w.do_over_d, w.do_over_s);
        for (int64_t q = 0; q < s; ++q) {
            float dot = 0;
            if (q < a.s) {
                SIMD_SUM(dot)
                for (int64_t c = 0; c < a.d; ++c) dot += load(dout + q * a.dout_s + c) * load(out + q * a.out_s + c);
            }
            w.delta[q] = dot, w.lse[q] = q < a.s ? a.lse[head + q] : __builtin_inff();  // padding: P = exp(-inf)
        }
        __builtin_memset(w.dq, 0, s * d * sizeof(float));
        for (int64_t j = 0; j < s; j += kTile)
            for (int64_t i = j; i < s; i += kTile) {
                const bool diagonal = i == j;
                const int64_t at = i * d / pair;
                const Part scores = diagonal ? kRowsToColumn : kAll;
                product<false>(w.k_rows + j * d, d, w.q_over_d + at, kTile, w.p, kTile, kTile, kTile, d, scores);
                product<false>(w.v_rows + j * d, d, w.do_over_d + at, kTile, w.dp, kTile, kTile, kTile, d, scores);
                softmax_backward(w.p, w.dp, a.scale, w.lse + i, w.delta + i, diagonal);
                // fp32: a tile of rows is its own operand over s, so q_over_s stays unused.
                const R* dout_right = pair == 1 ? reinterpret_cast<const R*>(rows_do + i * d) : w.do_over_s + at;
                const R* q_right = pair == 1 ? reinterpret_cast<const R*>(w.rows + i * d) : w.q_over_s + at;
                const Part keys = diagonal ? kDepthFromRow : kAll;
                product<true>(left(w.p, w.weights), kTile, dout_right, d, w.dv + j * d, d, kTile, d, kTile, keys);
                const C* ds = left(w.dp, w.weights);
                product<true>(ds, kTile, q_right, d, w.dk + j * d, d, kTile, d, kTile, keys);
                product<true>(w.k_columns + j * d, kTile, right_over_rows(ds, kTile, w.scores_right), kTile,
                              w.dq + i * d, kTile, d, kTile, kTile, diagonal ? kDepthToColumn : kAll);
            }
        T* dq = static_cast<T*>(a.dq) + head * a.d;
        for (int64_t q = 0; q < a.s; ++q) {
            const float* tile = w.dq + q / kTile * kTile * d + q % kTile;
            for (int64_t c = 0; c < a.d; ++c) store(dq + q * a.d + c, tile[c * kTile] * a.scale);
        }
    }
    const int64_t group = (ib * a.groups + ig) * a.s * a.d;
    write_rows(w.dk, d, a.scale, static_cast<T*>(a.dk) + group, a.s, a.d);
    write_rows(w.dv, d, 1.0f, static_cast<T*>(a.dv) + group, a.s, a.d);
}

#if defined(BF16_PRODUCTS)
using Bf16Product = bf16;
#else
using Bf16Product = float;
#endif

int64_t attention_workspace(const Attention& a, bool backward) {
    const int64_t s = padded(a.s, kTile), d = padded(a.d, kColumns);
    Arena m{nullptr, 0};
    if (!backward) a.dtype == kFloat32 ? (void)ForwardSpace<float>(m, s, d) : (void)ForwardSpace<Bf16Product>(m, s, d);
    else a.dtype == kFloat32 ? (void)BackwardSpace<float>(m, s, d) : (void)BackwardSpace<Bf16Product>(m, s, d);
    return m.used;
}
void attention_fwd(const Attention& a, int64_t begin, int64_t end, char* workspace) {
    for (int64_t task = begin; task < end; ++task)
        a.dtype == kFloat32 ? attention_fwd_task<float, float>(a, task, workspace)
                            : attention_fwd_task<bf16, Bf16Product>(a, task, workspace);
}
void attention_bwd(const Attention& a, int64_t begin, int64_t end, char* workspace) {
    for (int64_t task = begin; task < end; ++task)
        a.dtype == kFloat32 ? attention_bwd_task<float, float>(a, task, workspace)
                            : attention_bwd_task<bf16, Bf16Product>(a, task, workspace);
}
