// Small matrix products with the sums in registers: kRows x kColumns of the result at a time, by the vector extension
// of GCC and Clang. The right operand of a bf16 product holds pairs of consecutive k, as vdpbf16ps takes them.

constexpr int64_t kLanes = LANES, kRows = LANES == 16 ? 8 : 4;  // 16 accumulators of 32 registers, 8 of 16
constexpr int64_t kColumns = 2 * kLanes;
typedef float vec __attribute__((vector_size(kLanes * 4)));
typedef float vec_at __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

// Which part of a product a tile on the diagonal needs; the rest is for the caller to mask.
enum Part {
    kAll,
    kRowsToColumn,   // result rows up to the last column of each block of columns
    kDepthToColumn,  // k up to the last column of each block of columns
    kDepthFromRow,   // k from the first row of each block of rows
};

INLINE void step(vec& sum0, vec& sum1, const float* a, vec b0, vec b1) {
    sum0 += *a * b0;
    sum1 += *a * b1;
}
#if defined(BF16_PRODUCTS)
INLINE void step(vec& sum0, vec& sum1, const bf16* a, vec b0, vec b1) {
    int32_t two;
    __builtin_memcpy(&two, a, 4);
    const __m512bh left = (__m512bh)_mm512_set1_epi32(two);
    sum0 = (vec)_mm512_dpbf16_ps((__m512)sum0, left, (__m512bh)b0);
    sum1 = (vec)_mm512_dpbf16_ps((__m512)sum1, left, (__m512bh)b1);
}
#endif

// c [kRows][kColumns] (+)= a [kRows][k] b [k][kColumns], k from k0 to k1; kPair values of k a row of b.
template <bool kAdd, int64_t kPair, class A, class B>
INLINE void product_block(const A* a, int64_t lda, const B* b, int64_t ldb, float* c, int64_t ldc, int64_t k0,
                          int64_t k1) {
    vec sum[kRows][2];
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r)
#pragma GCC unroll 2
        for (int64_t n = 0; n < 2; ++n)
            sum[r][n] = kAdd ? vec(*reinterpret_cast<const vec_at*>(c + r * ldc + n * kLanes)) : vec{};
    for (int64_t k = k0; k < k1; k += kPair) {
        const B* row = b + k / kPair * ldb;
        const vec b0 = *reinterpret_cast<const vec_at*>(row), b1 = *reinterpret_cast<const vec_at*>(row + kLanes);
#pragma GCC unroll 8
        for (int64_t r = 0; r < kRows; ++r) step(sum[r][0], sum[r][1], a + r * lda + k, b0, b1);
    }
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r)
#pragma GCC unroll 2
        for (int64_t n = 0; n < 2; ++n) *reinterpret_cast<vec_at*>(c + r * ldc + n * kLanes) = sum[r][n];
}

// c [rows][columns] (+)= a [rows][depth] b [depth][columns]; rows, columns and depth are multiples of the block's.
template <bool kAdd, class A, class B>
void product(const A* a, int64_t lda, const B* b, int64_t ldb, float* c, int64_t ldc, int64_t rows, int64_t columns,
             int64_t depth, Part part) {
    constexpr int64_t kPair = int64_t(sizeof(B) / sizeof(A));
    for (int64_t n = 0; n < columns; n += kColumns) {
        const int64_t to_column = n + kColumns;
        const int64_t last_row = part == kRowsToColumn && to_column < rows ? to_column : rows;
        const int64_t last_k = part == kDepthToColumn && to_column < depth ? to_column : depth;
        for (int64_t m = 0; m < last_row; m += kRows)
            product_block<kAdd, kPair>(a + m * lda, lda, b + n, ldb, c + m * ldc + n, ldc,
                                       part == kDepthFromRow ? m : 0, last_k);
    }
}
