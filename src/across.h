/* The sum of LANES numbers (`across`), or of each of LANES rows of as many, one after the other in
 * memory, side by side (`row_sums`): each in an order of its own, so a sum is always found by one of
 * them. Compilers do the former one number at a time, in twice as many instructions. */
#ifndef KLFAST_ACROSS_H
#define KLFAST_ACROSS_H

#include "lanes.h"

enum { HALF_LANES = LANES / 2 };

#if defined(__AVX__)
#include <immintrin.h>

static inline double sum_of_four(__m256d x) {
    __m128d two = _mm_add_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd(x, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

#if defined(__AVX512F__)

/* Numbers i and i + HALF_LANES. */
static inline __m512d halves_f64(const double *x) {
    return _mm512_add_pd(_mm512_loadu_pd(x), _mm512_loadu_pd(x + HALF_LANES));
}
static inline __m512d halves_f32(const float *x) {
    return _mm512_add_pd(_mm512_cvtps_pd(_mm256_loadu_ps(x)),
                         _mm512_cvtps_pd(_mm256_loadu_ps(x + HALF_LANES)));
}

static inline double across(const double *x) {
    __m512d half = halves_f64(x);
    return sum_of_four(_mm256_add_pd(_mm512_castpd512_pd256(half),
                                     _mm512_extractf64x4_pd(half, 1)));
}

/* Neighbours of one row and of another in turn, then pairs of these. */
static inline __m512d neighbours(__m512d a, __m512d b) {
    return _mm512_add_pd(_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b));
}
static inline __m512d pairs(__m512d ab, __m512d cd) {
    return _mm512_add_pd(_mm512_shuffle_f64x2(ab, cd, 0x88), _mm512_shuffle_f64x2(ab, cd, 0xdd));
}

#define KLFAST_ROW_SUMS(type, real)                                                              \
    static inline __m512d four_rows_##type##_sums(const real *x) {                               \
        return pairs(neighbours(halves_##type(x), halves_##type(x + LANES)),                     \
                     neighbours(halves_##type(x + 2 * LANES), halves_##type(x + 3 * LANES)));    \
    }                                                                                            \
    static inline void row_sums_##type(const real *x, double *sums) {                            \
        for (int row = 0; row < LANES; row += 8, x += 8 * LANES)                                 \
            _mm512_storeu_pd(sums + row, pairs(four_rows_##type##_sums(x),                       \
                                               four_rows_##type##_sums(x + 4 * LANES)));         \
    }

#else

static inline __m256d halves_f64(const double *x) {
    return _mm256_add_pd(_mm256_loadu_pd(x), _mm256_loadu_pd(x + HALF_LANES));
}
static inline __m256d halves_f32(const float *x) {
    return _mm256_add_pd(_mm256_cvtps_pd(_mm_loadu_ps(x)),
                         _mm256_cvtps_pd(_mm_loadu_ps(x + HALF_LANES)));
}

static inline double across(const double *x) { return sum_of_four(halves_f64(x)); }

/* Neighbours of two rows in turn, of another two: pairs of these. */
static inline __m256d pairs(__m256d ab, __m256d cd) {
    return _mm256_add_pd(_mm256_permute2f128_pd(ab, cd, 0x20),
                         _mm256_permute2f128_pd(ab, cd, 0x31));
}

#define KLFAST_ROW_SUMS(type, real)                                                              \
    static inline void row_sums_##type(const real *x, double *sums) {                            \
        for (int row = 0; row < LANES; row += 4, x += 4 * LANES) {                               \
            __m256d ab = _mm256_hadd_pd(halves_##type(x), halves_##type(x + LANES));             \
            __m256d cd =                                                                         \
                _mm256_hadd_pd(halves_##type(x + 2 * LANES), halves_##type(x + 3 * LANES));      \
            _mm256_storeu_pd(sums + row, pairs(ab, cd));                                         \
        }                                                                                        \
    }

#endif

#else

static inline double across(const double *x) {
    double part[LANES];
    for (int i = 0; i < LANES; i++) part[i] = x[i];
    for (int n = HALF_LANES; n > 0; n /= 2)
        for (int i = 0; i < n; i++) part[i] += part[i + n];
    return part[0];
}

#define KLFAST_ROW_SUMS(type, real)                                                              \
    static inline void row_sums_##type(const real *x, double *sums) {                            \
        for (int row = 0; row < LANES; row++, x += LANES) {                                      \
            double part[HALF_LANES];                                                             \
            for (int i = 0; i < HALF_LANES; i++) part[i] = (double)x[i] + x[i + HALF_LANES];     \
            for (int n = HALF_LANES / 2; n > 0; n /= 2)                                          \
                for (int i = 0; i < n; i++) part[i] = part[2 * i] + part[2 * i + 1];             \
            sums[row] = part[0];                                                                 \
        }                                                                                        \
    }

#endif

KLFAST_ROW_SUMS(f32, float)
KLFAST_ROW_SUMS(f64, double)

#endif
