// Causal attention with an online softmax (FlashAttention, Dao 2023), in tiles of 64 keys x 64 queries that are skipped
// above the diagonal and before the window. The s queries are the last of t positions; zero rows in front of the keys
// (Keys::front) put the diagonal on tile corners whatever t - s is. A sink is where a query's softmax starts: its logit
// is the first maximum, and 1 the first sum. Score tiles are held transposed, [key][query]: statistics of a query are
// then a lane, reductions over keys need no shuffles, and a tile is at once the right operand of the next product.
// With X^T[d][s]:
//   forward   S^T = K Q^T,  O^T += V^T P^T
//   backward  S^T = K Q^T,  dP^T = V dO^T,  dV += P^T dO,  dS^T = P^T (dP^T - delta),  dK += dS^T Q,  dQ^T += K^T dS^T
// A task is one (segment, key group): its query heads share the packed keys and values, nothing is repeated, and dK, dV
// need no reduction over threads. A segment is a whole row, or those queries of a document in a row that stand together. Rows and head dimension are zero-padded to the tile in the packed copies.
// C, the type products are computed in, is float, or bf16 (fp32 sums) where the processor has AVX512_BF16.

constexpr int64_t kTile = 64;

template <class C> struct Right;  // element of a right operand: bf16 ones hold two consecutive k
template <> struct Right<float> { using type = float; static constexpr int64_t k = 1; };
template <> struct Right<bf16> { using type = uint32_t; static constexpr int64_t k = 2; };

INLINE int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Rows first, first + 1, … of [rows, d] -> [count, d_padded] in C, zeros where there is no such row and behind d.
template <class T, class C>
INLINE void pack_rows(const T* __restrict from, int64_t stride, int64_t first, int64_t rows, int64_t d, int64_t count,
                      int64_t d_padded, C* __restrict to) {
    for (int64_t i = first; i < first + count; ++i, to += d_padded) {
        const int64_t have = i >= 0 && i < rows ? d : 0;
        const T* __restrict row = from + (have ? i * stride : 0);
        SIMD
        for (int64_t j = 0; j < have; ++j) store(to + j, load(row + j));
        __builtin_memset(to + have, 0, (d_padded - have) * sizeof(C));
    }
}

// One tile [64][w] -> [w][64]: of floats, of bf16, or of pairs of bf16.
template <class E>
INLINE void transpose(const E* __restrict from, int64_t w, E* __restrict to) {
    constexpr int64_t kStep = kColumns < 16 ? kColumns : 16;  // divides w
    for (int64_t j0 = 0; j0 < w; j0 += kStep)
        for (int64_t i = 0; i < kTile; ++i)
            for (int64_t j = j0; j < j0 + kStep; ++j) to[j * kTile + i] = from[i * w + j];
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

struct Keys {  // where keys stand among the tiles; query tile i (of padded s) stands at i + offset
    int64_t offset, front, count;
    explicit Keys(const Attention& a) : offset(padded(a.t - a.s, kTile)), front(offset - (a.t - a.s)) {
        count = offset + padded(a.s, kTile);
    }
};

// The task's segment and key group: as many queries and keys, and the addresses of their first rows.
template <class T>
INLINE Attention part(const Attention& whole, int64_t task) {
    Attention a = whole;
    const int64_t* segment = whole.segments + task / whole.groups * 6;
    const int64_t g = task % whole.groups, h = g * whole.queries, row = segment[0], query = segment[1], key = segment[3];
    const int64_t head = (row * whole.groups * whole.queries + h) * whole.rows_s + query;
    const int64_t group = ((segment[5] * whole.groups + g) * whole.rows_t + key) * whole.d;
    a.s = segment[2], a.t = segment[4];
    a.q = static_cast<const T*>(whole.q) + row * whole.q_b + h * whole.q_h + query * whole.q_s;
    a.k = static_cast<const T*>(whole.k) + row * whole.k_b + g * whole.k_h + key * whole.k_s;
    a.v = static_cast<const T*>(whole.v) + row * whole.v_b + g * whole.v_h + key * whole.v_s;
    a.dout = static_cast<const T*>(whole.dout) + row * whole.dout_b + h * whole.dout_h + query * whole.dout_s;
    a.out = static_cast<T*>(whole.out) + row * whole.out_b + h * whole.out_h + query * whole.out_s;
    a.lse = whole.lse + head, a.sinks = whole.sinks ? whole.sinks + h : nullptr;
    if (whole.dq) {
        a.dq = static_cast<T*>(whole.dq) + head * whole.d;
        a.dk = static_cast<T*>(whole.dk) + group, a.dv = static_cast<T*>(whole.dv) + group;
    }
    return a;
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
    ForwardSpace(Arena& m, int64_t t, int64_t d) {
        k_rows = m.take<C>(t * d), v_columns = m.take<C>(t * d), rows = m.take<C>(kTile * d);
        weights = m.take<C>(kTile * kTile), q_right = m.take<typename Right<C>::type>(kTile * d);
        weights_right = m.take<typename Right<C>::type>(kTile * kTile), tile = m.take<float>(kTile * kTile);
        out = m.take<float>(kTile * d), top = m.take<float>(kTile), sum = m.take<float>(kTile);
        fix = m.take<float>(kTile);
    }
};

// A softmax's first maximum: below any score, but not -inf, since a tile may hide all its keys from a query.
constexpr float kLowest = -1e20f;

// Tile [key][query] of keys from j, queries from i: a query sees the last `window` keys up to its own, no padding.
INLINE void hide(float* tile, const Attention& a, const Keys& keys, int64_t i, int64_t j, float value) {
    const int64_t ahead = i - j, passed = ahead - a.window;
    for (int64_t key = 0; key < kTile && ahead == 0; ++key)
        for (int64_t q = 0; q < key; ++q) tile[key * kTile + q] = value;
    for (int64_t key = 0; key < kTile && key <= kTile - 1 + passed; ++key)
        for (int64_t q = key > passed ? key - passed : 0; q < kTile; ++q) tile[key * kTile + q] = value;
    for (int64_t at = 0; at < (j == 0 ? keys.front * kTile : 0); ++at) tile[at] = value;
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
void attention_fwd_task(const Attention& whole, int64_t task, char* workspace) {
    const Attention a = part<T>(whole, task);
    const int64_t s = padded(a.s, kTile), d = padded(a.d, kColumns);
    const Keys keys(a);
    Arena arena{workspace, 0};
    ForwardSpace<C> w(arena, keys.count, d);
    const T *k = static_cast<const T*>(a.k), *v = static_cast<const T*>(a.v);
    pack_rows(k, a.k_s, -keys.front, a.t, a.d, keys.count, d, w.k_rows);
    for (int64_t j = 0; j < keys.count; j += kTile) {
        pack_rows(v, a.v_s, j - keys.front, a.t, a.d, kTile, d, w.rows);
        transpose(w.rows, d, w.v_columns + j * d);
    }
    for (int64_t h = 0; h < a.queries; ++h)
        for (int64_t i = 0; i < s; i += kTile) {
            const int64_t rows = a.s - i < kTile ? a.s - i : kTile, at = i + keys.offset;
            pack_rows(static_cast<const T*>(a.q) + h * a.q_h, a.q_s, i, a.s, a.d, kTile, d, w.rows);
            right_over_columns(w.rows, d, w.q_right);
            for (int64_t q = 0; q < kTile; ++q) {
                w.top[q] = a.sinks ? a.sinks[h] : kLowest;
                w.sum[q] = a.sinks ? 1 : 0;
            }
            __builtin_memset(w.out, 0, kTile * d * sizeof(float));
            const int64_t oldest = at - a.window + 1;
            for (int64_t j = oldest > 0 ? oldest / kTile * kTile : 0; j <= at; j += kTile) {
                const bool diagonal = at == j;
                product<false>(w.k_rows + j * d, d, w.q_right, kTile, w.tile, kTile, kTile, kTile, d,
                               diagonal ? kRowsToColumn : kAll);
                hide(w.tile, a, keys, at, j, -__builtin_inff());
                online_softmax(w.tile, a.scale, w.top, w.sum, w.fix, w.out, d);
                auto weights = right_over_rows(left(w.tile, w.weights), kTile, w.weights_right);
                product<true>(w.v_columns + j * d, kTile, weights, kTile, w.out, kTile, d, kTile, kTile,
                              diagonal ? kDepthToColumn : kAll);
            }
            T* out = static_cast<T*>(a.out) + h * a.out_h + i * a.out_s;
            float* lse = a.lse + h * a.rows_s + i;
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
    BackwardSpace(Arena& m, int64_t s, int64_t t, int64_t d) {
        using R = typename Right<C>::type;
        k_rows = m.take<C>(t * d), v_rows = m.take<C>(t * d), k_columns = m.take<C>(t * d), rows = m.take<C>(2 * s * d);
        weights = m.take<C>(kTile * kTile), scores_right = m.take<R>(kTile * kTile);
        q_over_d = m.take<R>(s * d), do_over_d = m.take<R>(s * d);
        q_over_s = m.take<R>(s * d), do_over_s = m.take<R>(s * d);
        p = m.take<float>(kTile * kTile), dp = m.take<float>(kTile * kTile), dk = m.take<float>(t * d);
        dv = m.take<float>(t * d), dq = m.take<float>(s * d), lse = m.take<float>(s), delta = m.take<float>(s);
    }
};

// Both operands of one query-side tensor: over d and over s, by tile.
template <class T, class C>
INLINE void pack_queries(const T* from, int64_t stride, const Attention& a, int64_t s, int64_t d, C* rows,
                         typename Right<C>::type* over_d, typename Right<C>::type* over_s) {
    pack_rows(from, stride, 0, a.s, a.d, s, d, rows);
    for (int64_t i = 0; i < s; i += kTile) {
        right_over_columns(rows + i * d, d, over_d + i * d / Right<C>::k);
        right_over_rows(rows + i * d, d, over_s + i * d / Right<C>::k);
    }
}

// P^T and dS^T of one tile from S^T and dP^T, in place.
INLINE void softmax_backward(float* __restrict p, float* __restrict dp, float scale, const float* __restrict lse,
                             const float* __restrict delta) {
    for (int64_t key = 0; key < kTile; ++key)
        for (int64_t q = 0; q < kTile; ++q) {
            const int64_t at = key * kTile + q;
            p[at] = exp_(p[at] * scale - lse[q]);
            dp[at] = p[at] * (dp[at] - delta[q]);
        }
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
void attention_bwd_task(const Attention& whole, int64_t task, char* workspace) {
    const Attention a = part<T>(whole, task);
    const int64_t s = padded(a.s, kTile), d = padded(a.d, kColumns);
    const Keys keys(a);
    Arena arena{workspace, 0};
    BackwardSpace<C> w(arena, s, keys.count, d);
    using R = typename Right<C>::type;
    constexpr int64_t pair = Right<C>::k;
    const T *k = static_cast<const T*>(a.k), *v = static_cast<const T*>(a.v);
    pack_rows(k, a.k_s, -keys.front, a.t, a.d, keys.count, d, w.k_rows);
    pack_rows(v, a.v_s, -keys.front, a.t, a.d, keys.count, d, w.v_rows);
    for (int64_t j = 0; j < keys.count; j += kTile) transpose(w.k_rows + j * d, d, w.k_columns + j * d);
    __builtin_memset(w.dk, 0, keys.count * d * sizeof(float));
    __builtin_memset(w.dv, 0, keys.count * d * sizeof(float));
    for (int64_t h = 0; h < a.queries; ++h) {
        const T* dout = static_cast<const T*>(a.dout) + h * a.dout_h;
        const T* q_rows = static_cast<const T*>(a.q) + h * a.q_h;
        const T* out = static_cast<const T*>(a.out) + h * a.out_h;
        const float* lse = a.lse + h * a.rows_s;
        C* rows_do = w.rows + s * d;
        pack_queries(q_rows, a.q_s, a, s, d, w.rows, w.q_over_d, w.q_over_s);
        pack_queries(dout, a.dout_s, a, s, d, rows_do, w.do_over_d, w.do_over_s);
        for (int64_t q = 0; q < s; ++q) {
            float dot = 0;
            if (q < a.s) {
                SIMD_SUM(dot)
                for (int64_t c = 0; c < a.d; ++c) dot += load(dout + q * a.dout_s + c) * load(out + q * a.out_s + c);
            }
            w.delta[q] = dot, w.lse[q] = q < a.s ? lse[q] : __builtin_inff();  // padding: P = exp(-inf)
        }
        __builtin_memset(w.dq, 0, s * d * sizeof(float));
        for (int64_t j = 0; j < keys.count; j += kTile)
            for (int64_t i = j > keys.offset ? j - keys.offset : 0; i < s; i += kTile) {
                if (i + keys.offset >= j + kTile - 1 + a.window) break;  // these and later queries are past its keys
                const bool diagonal = i + keys.offset == j;
                const int64_t at = i * d / pair;
                const Part scores = diagonal ? kRowsToColumn : kAll;
                product<false>(w.k_rows + j * d, d, w.q_over_d + at, kTile, w.p, kTile, kTile, kTile, d, scores);
                product<false>(w.v_rows + j * d, d, w.do_over_d + at, kTile, w.dp, kTile, kTile, kTile, d, scores);
                softmax_backward(w.p, w.dp, a.scale, w.lse + i, w.delta + i);
                hide(w.p, a, keys, i + keys.offset, j, 0), hide(w.dp, a, keys, i + keys.offset, j, 0);
                // fp32: a tile of rows is its own operand over s, so q_over_s stays unused.
                const R* dout_right = pair == 1 ? reinterpret_cast<const R*>(rows_do + i * d) : w.do_over_s + at;
                const R* q_right = pair == 1 ? reinterpret_cast<const R*>(w.rows + i * d) : w.q_over_s + at;
                const Part rows = diagonal ? kDepthFromRow : kAll;
                product<true>(left(w.p, w.weights), kTile, dout_right, d, w.dv + j * d, d, kTile, d, kTile, rows);
                const C* ds = left(w.dp, w.weights);
                product<true>(ds, kTile, q_right, d, w.dk + j * d, d, kTile, d, kTile, rows);
                product<true>(w.k_columns + j * d, kTile, right_over_rows(ds, kTile, w.scores_right), kTile,
                              w.dq + i * d, kTile, d, kTile, kTile, diagonal ? kDepthToColumn : kAll);
            }
        T* dq = static_cast<T*>(a.dq) + h * a.rows_s * a.d;
        for (int64_t q = 0; q < a.s; ++q) {
            const float* tile = w.dq + q / kTile * kTile * d + q % kTile;
            for (int64_t c = 0; c < a.d; ++c) store(dq + q * a.d + c, tile[c * kTile] * a.scale);
        }
    }
    write_rows(w.dk + keys.front * d, d, a.scale, static_cast<T*>(a.dk), a.t, a.d);
    write_rows(w.dv + keys.front * d, d, 1.0f, static_cast<T*>(a.dv), a.t, a.d);
}

#if defined(BF16_PRODUCTS)
using Bf16Product = bf16;
#else
using Bf16Product = float;
#endif

// Enough for any segment of at most as many queries and keys: Keys::count is a tile above the padded t at most.
int64_t attention_workspace(const Attention& a, bool backward) {
    const int64_t s = padded(a.s, kTile), t = padded(a.t, kTile) + kTile, d = padded(a.d, kColumns);
    const bool fp32 = a.dtype == kFloat32;
    Arena m{nullptr, 0};
    if (!backward) fp32 ? (void)ForwardSpace<float>(m, t, d) : (void)ForwardSpace<Bf16Product>(m, t, d);
    else fp32 ? (void)BackwardSpace<float>(m, s, t, d) : (void)BackwardSpace<Bf16Product>(m, s, t, d);
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
