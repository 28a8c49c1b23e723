/* LANES rows of n elements, `outer` elements apart, into n columns of LANES elements: blocks of 4
 * columns in vectors, then pairs; the last of them overlaps the one before. */
#ifndef KLFAST_TRANSPOSE_H
#define KLFAST_TRANSPOSE_H

#include <stddef.h>

/* Ask for n bytes that are needed soon. */
static inline void prefetch(const char *data, ptrdiff_t n) {
#if defined(__GNUC__) || defined(__clang__)
    for (ptrdiff_t i = 0; i < n; i += 64) __builtin_prefetch(data + i);
#endif
}

#if defined(__AVX__)

#include <immintrin.h>

/* Rows r and r + 4 as the halves of a vector. */
static inline __m256 two_rows(const float *x, ptrdiff_t outer) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(x)),
                                _mm_loadu_ps(x + 4 * outer), 1);
}
static inline void block_f32(const float *x, ptrdiff_t outer, ptrdiff_t lanes, float *into) {
    __m256 a = two_rows(x, outer), b = two_rows(x + outer, outer);
    __m256 c = two_rows(x + 2 * outer, outer), d = two_rows(x + 3 * outer, outer);
    __m256 ab = _mm256_unpacklo_ps(a, b), ab_high = _mm256_unpackhi_ps(a, b);
    __m256 cd = _mm256_unpacklo_ps(c, d), cd_high = _mm256_unpackhi_ps(c, d);
    _mm256_storeu_ps(into, _mm256_shuffle_ps(ab, cd, 0x44));
    _mm256_storeu_ps(into + lanes, _mm256_shuffle_ps(ab, cd, 0xee));
    _mm256_storeu_ps(into + 2 * lanes, _mm256_shuffle_ps(ab_high, cd_high, 0x44));
    _mm256_storeu_ps(into + 3 * lanes, _mm256_shuffle_ps(ab_high, cd_high, 0xee));
}

/* Two elements of each of rows r, r + 1, r + 4, r + 5. */
static inline __m128 two_pairs_f32(const float *x, ptrdiff_t outer) {
    return _mm_loadh_pi(_mm_loadl_pi(_mm_setzero_ps(), (const __m64 *)x),
                        (const __m64 *)(x + outer));
}
static inline __m256 four_pairs_f32(const float *x, ptrdiff_t outer) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(two_pairs_f32(x, outer)),
                                two_pairs_f32(x + 4 * outer, outer), 1);
}
static inline void pair_f32(const float *x, ptrdiff_t outer, ptrdiff_t lanes, float *into) {
    __m256 ab = four_pairs_f32(x, outer), cd = four_pairs_f32(x + 2 * outer, outer);
    _mm256_storeu_ps(into, _mm256_shuffle_ps(ab, cd, 0x88));
    _mm256_storeu_ps(into + lanes, _mm256_shuffle_ps(ab, cd, 0xdd));
}

/* Two elements of rows r and r + 2. */
static inline __m256d two_pairs_f64(const double *x, ptrdiff_t outer) {
    return _mm256_insertf128_pd(_mm256_castpd128_pd256(_mm_loadu_pd(x)),
                                _mm_loadu_pd(x + 2 * outer), 1);
}
static inline void pair_f64(const double *x, ptrdiff_t outer, ptrdiff_t lanes, double *into) {
    __m256d a = two_pairs_f64(x, outer), b = two_pairs_f64(x + outer, outer);
    _mm256_storeu_pd(into, _mm256_unpacklo_pd(a, b));
    _mm256_storeu_pd(into + lanes, _mm256_unpackhi_pd(a, b));
}
static inline void block_f64(const double *x, ptrdiff_t outer, ptrdiff_t lanes, double *into) {
    pair_f64(x, outer, lanes, into);
    pair_f64(x + 2, outer, lanes, into + 2 * lanes);
}
#define KLFAST_ROWS_F32 8

#else

#define KLFAST_BLOCK(name, real, columns, type)                                                  \
    static inline void name##_##type(                                                            \
        const real *x, ptrdiff_t outer, ptrdiff_t lanes, real *into) {                           \
        for (ptrdiff_t i = 0; i < columns; i++)                                                  \
            for (ptrdiff_t row = 0; row < 4; row++)                                              \
                into[i * lanes + row] = x[row * outer + i];                                      \
    }
KLFAST_BLOCK(block, float, 4, f32)
KLFAST_BLOCK(pair, float, 2, f32)
KLFAST_BLOCK(block, double, 4, f64)
KLFAST_BLOCK(pair, double, 2, f64)
#define KLFAST_ROWS_F32 4

#endif

#define KLFAST_TRANSPOSE(type, real, rows)                                                       \
    static inline void transpose_##type(                                                         \
        const real *x, ptrdiff_t outer, ptrdiff_t n, ptrdiff_t lanes, real *into) {              \
        for (ptrdiff_t lane = 0; lane < lanes; lane += rows) {                                   \
            ptrdiff_t i = 0;                                                                     \
            for (; i + 4 <= n; i += 4)                                                           \
                block_##type(x + i, outer, lanes, into + i * lanes);                             \
            for (; i < n && n > 1; i += 2) {                                                     \
                ptrdiff_t at = i + 2 <= n ? i : n - 2;                                           \
                pair_##type(x + at, outer, lanes, into + at * lanes);                            \
            }                                                                                    \
            for (ptrdiff_t row = 0; row < rows && n == 1; row++) into[row] = x[row * outer];     \
            x += rows * outer;                                                                   \
            into += rows;                                                                        \
        }                                                                                        \
    }
KLFAST_TRANSPOSE(f32, float, KLFAST_ROWS_F32)
KLFAST_TRANSPOSE(f64, double, 4)

#endif
