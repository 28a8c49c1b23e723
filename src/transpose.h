/* LANES rows of n elements, `outer` elements apart, into n columns of LANES elements: blocks of 4
 * columns in vectors, the last one overlapping the one before. */
#ifndef KLFAST_TRANSPOSE_H
#define KLFAST_TRANSPOSE_H

#include <stddef.h>
#include <string.h>

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
#define KLFAST_BLOCK_F32 8 /* rows */

#endif

#if defined(__GNUC__) || defined(__clang__)

#if defined(__clang__)
#define KLFAST_SHUFFLE(name, x, y, i, j, k, l) __builtin_shufflevector(x, y, i, j, k, l)
#else
#define KLFAST_SHUFFLE(name, x, y, i, j, k, l) __builtin_shuffle(x, y, (mask4_##name){i, j, k, l})
#endif

#define KLFAST_BLOCK(name, real, integer, size)                                                  \
    typedef real vec4_##name __attribute__((vector_size(size)));                                 \
    typedef integer mask4_##name __attribute__((vector_size(size)));                             \
    static inline void block_##name(const real *x, ptrdiff_t outer, ptrdiff_t lanes, real *into) { \
        vec4_##name a, b, c, d, ab, cd, ab_high, cd_high;                                        \
        memcpy(&a, x, size);                                                                     \
        memcpy(&b, x + outer, size);                                                             \
        memcpy(&c, x + 2 * outer, size);                                                         \
        memcpy(&d, x + 3 * outer, size);                                                         \
        ab = KLFAST_SHUFFLE(name, a, b, 0, 4, 1, 5);                                             \
        cd = KLFAST_SHUFFLE(name, c, d, 0, 4, 1, 5);                                             \
        ab_high = KLFAST_SHUFFLE(name, a, b, 2, 6, 3, 7);                                        \
        cd_high = KLFAST_SHUFFLE(name, c, d, 2, 6, 3, 7);                                        \
        a = KLFAST_SHUFFLE(name, ab, cd, 0, 1, 4, 5);                                            \
        b = KLFAST_SHUFFLE(name, ab, cd, 2, 3, 6, 7);                                            \
        c = KLFAST_SHUFFLE(name, ab_high, cd_high, 0, 1, 4, 5);                                  \
        d = KLFAST_SHUFFLE(name, ab_high, cd_high, 2, 3, 6, 7);                                  \
        memcpy(into, &a, size);                                                                  \
        memcpy(into + lanes, &b, size);                                                          \
        memcpy(into + 2 * lanes, &c, size);                                                      \
        memcpy(into + 3 * lanes, &d, size);                                                      \
    }
#ifndef KLFAST_BLOCK_F32
KLFAST_BLOCK(f32, float, int, 16)
#define KLFAST_BLOCK_F32 4
#endif
KLFAST_BLOCK(f64, double, long long, 32)

#else

#define KLFAST_BLOCK(name, real)                                                                 \
    static inline void block_##name(const real *x, ptrdiff_t outer, ptrdiff_t lanes, real *into) { \
        for (ptrdiff_t i = 0; i < 4; i++)                                                        \
            for (ptrdiff_t row = 0; row < 4; row++)                                              \
                into[i * lanes + row] = x[row * outer + i];                                      \
    }
#ifndef KLFAST_BLOCK_F32
KLFAST_BLOCK(f32, float)
#define KLFAST_BLOCK_F32 4
#endif
KLFAST_BLOCK(f64, double)

#endif

#define KLFAST_TRANSPOSE(name, real, rows)                                                       \
    static inline void transpose_##name(                                                         \
        const real *x, ptrdiff_t outer, ptrdiff_t n, ptrdiff_t lanes, real *into) {              \
        for (ptrdiff_t i = 0; n >= 4 && i < n; i += 4) {                                         \
            ptrdiff_t at = i < n - 4 ? i : n - 4;                                                \
            for (ptrdiff_t lane = 0; lane < lanes; lane += rows)                                 \
                block_##name(x + lane * outer + at, outer, lanes, into + at * lanes + lane);     \
        }                                                                                        \
        for (ptrdiff_t i = 0; n < 4 && i < n; i++)                                               \
            for (ptrdiff_t lane = 0; lane < lanes; lane++)                                       \
                into[i * lanes + lane] = x[lane * outer + i];                                    \
    }
KLFAST_TRANSPOSE(f32, float, KLFAST_BLOCK_F32)
KLFAST_TRANSPOSE(f64, double, 4)

#endif
