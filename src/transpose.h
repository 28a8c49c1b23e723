/* Rows of n elements, `outer` elements apart, into n columns, `width` elements apart: blocks of 4
 * columns in vectors, then pairs; what is last overlaps what is before it. */
#ifndef KLFAST_TRANSPOSE_H
#define KLFAST_TRANSPOSE_H

#include <stddef.h>
#include <string.h>

/* Ask for n bytes that are needed soon. */
static inline void prefetch(const char *data, ptrdiff_t n) {
#if defined(__GNUC__) || defined(__clang__)
    ptrdiff_t i = 0;
    for (; i + 64 < n; i += 128) {
        __builtin_prefetch(data + i);
        __builtin_prefetch(data + i + 64);
    }
    if (i < n) __builtin_prefetch(data + i);
#endif
}

/* The same into the second cache: from far away, more of these are on their way at a time,
 * and lines a power of two apart do not evict each other. */
static inline void prefetch_far(const char *data, ptrdiff_t n) {
#if defined(__GNUC__) || defined(__clang__)
    for (ptrdiff_t i = 0; i < n; i += 64) __builtin_prefetch(data + i, 0, 2);
#endif
}

#if defined(__AVX__)
#include <immintrin.h>
static inline void copy_32(const char *from, char *into) {
    _mm256_storeu_si256((__m256i *)into, _mm256_loadu_si256((const __m256i *)from));
}
#else
static inline void copy_32(const char *from, char *into) { memcpy(into, from, 32); }
#endif
#if defined(__AVX512F__)
static inline void copy_64(const char *from, char *into) {
    _mm512_storeu_si512(into, _mm512_loadu_si512(from));
}
#else
static inline void copy_64(const char *from, char *into) {
    copy_32(from, into);
    copy_32(from + 32, into + 32);
}
#endif

/* Copy a line of n bytes, a multiple of 32; ask for the one that is `ahead`, if that is not 0. */
static inline void copy_line(const char *line, ptrdiff_t ahead, ptrdiff_t n, char *into) {
    ptrdiff_t i = 0;
    for (; i + 64 <= n; i += 64) {
        if (ahead) prefetch_far(line + ahead + i, 64);
        copy_64(line + i, into + i);
    }
    if (i < n) copy_32(line + i, into + i);
}

/* So many lines, `step` bytes apart, one after the other; `together` bytes, as most have, in a loop
 * of its own. */
static inline void copy_lines(const char *line, ptrdiff_t step, ptrdiff_t count, ptrdiff_t ahead,
                              ptrdiff_t n, ptrdiff_t together, char *into) {
    for (; n == together && count > 0; count--, line += step, into += together)
        copy_line(line, ahead, together, into);
    for (; count > 0; count--, line += step, into += n) copy_line(line, ahead, n, into);
}

#if defined(__AVX__)

/* Rows r and r + 4 as the halves of a vector. */
static inline __m256 two_rows(const float *x, ptrdiff_t outer) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(x)),
                                _mm_loadu_ps(x + 4 * outer), 1);
}
static inline void block_f32(const float *x, ptrdiff_t outer, ptrdiff_t width, float *into) {
    __m256 a = two_rows(x, outer), b = two_rows(x + outer, outer);
    __m256 c = two_rows(x + 2 * outer, outer), d = two_rows(x + 3 * outer, outer);
    __m256 ab = _mm256_unpacklo_ps(a, b), ab_high = _mm256_unpackhi_ps(a, b);
    __m256 cd = _mm256_unpacklo_ps(c, d), cd_high = _mm256_unpackhi_ps(c, d);
    _mm256_storeu_ps(into, _mm256_shuffle_ps(ab, cd, 0x44));
    _mm256_storeu_ps(into + width, _mm256_shuffle_ps(ab, cd, 0xee));
    _mm256_storeu_ps(into + 2 * width, _mm256_shuffle_ps(ab_high, cd_high, 0x44));
    _mm256_storeu_ps(into + 3 * width, _mm256_shuffle_ps(ab_high, cd_high, 0xee));
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
static inline void pair_f32(const float *x, ptrdiff_t outer, ptrdiff_t width, float *into) {
    __m256 ab = four_pairs_f32(x, outer), cd = four_pairs_f32(x + 2 * outer, outer);
    _mm256_storeu_ps(into, _mm256_shuffle_ps(ab, cd, 0x88));
    _mm256_storeu_ps(into + width, _mm256_shuffle_ps(ab, cd, 0xdd));
}

/* Two elements of rows r and r + 2. */
static inline __m256d two_pairs_f64(const double *x, ptrdiff_t outer) {
    return _mm256_insertf128_pd(_mm256_castpd128_pd256(_mm_loadu_pd(x)),
                                _mm_loadu_pd(x + 2 * outer), 1);
}
static inline void pair_f64(const double *x, ptrdiff_t outer, ptrdiff_t width, double *into) {
    __m256d a = two_pairs_f64(x, outer), b = two_pairs_f64(x + outer, outer);
    _mm256_storeu_pd(into, _mm256_unpacklo_pd(a, b));
    _mm256_storeu_pd(into + width, _mm256_unpackhi_pd(a, b));
}
static inline void block_f64(const double *x, ptrdiff_t outer, ptrdiff_t width, double *into) {
    pair_f64(x, outer, width, into);
    pair_f64(x + 2, outer, width, into + 2 * width);
}
#define KLFAST_ROWS_F32 8

#else

#define KLFAST_BLOCK(name, real, columns, type)                                                  \
    static inline void name##_##type(const real *x, ptrdiff_t outer, ptrdiff_t width,            \
                                     real *into) {                                               \
        for (ptrdiff_t i = 0; i < columns; i++)                                                  \
            for (ptrdiff_t row = 0; row < 4; row++)                                              \
                into[i * width + row] = x[row * outer + i];                                      \
    }
KLFAST_BLOCK(block, float, 4, f32)
KLFAST_BLOCK(pair, float, 2, f32)
KLFAST_BLOCK(block, double, 4, f64)
KLFAST_BLOCK(pair, double, 2, f64)
#define KLFAST_ROWS_F32 4

#endif

#define KLFAST_TRANSPOSE(name, type, real, step)                                                 \
    static inline void name##_##type(const real *x, ptrdiff_t outer, ptrdiff_t n,                \
                                     ptrdiff_t rows, real *into, ptrdiff_t width) {              \
        for (ptrdiff_t first = 0; first < rows; first += step) {                                 \
            ptrdiff_t i = 0;                                                                     \
            for (; i + 4 <= n; i += 4) {                                                         \
                block_##type(x + i, outer, width, into + i * width);                             \
            }                                                                                    \
            for (; i < n && n > 1; i += 2) {                                                     \
                ptrdiff_t at = i + 2 <= n ? i : n - 2;                                           \
                pair_##type(x + at, outer, width, into + at * width);                            \
            }                                                                                    \
            for (ptrdiff_t row = 0; row < step && n == 1; row++) into[row] = x[row * outer];     \
            x += step * outer;                                                                   \
            into += step;                                                                        \
        }                                                                                        \
    }

#if defined(__AVX512F__)

KLFAST_TRANSPOSE(narrow, f32, float, KLFAST_ROWS_F32)
KLFAST_TRANSPOSE(narrow, f64, double, 4)

/* Rows r, r + 4, r + 8, r + 12 as the quarters of a vector. */
static inline __m512 four_rows(const float *x, ptrdiff_t outer) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(two_rows(x, outer)),
                              two_rows(x + 8 * outer, outer), 1);
}
static inline void wide_block_f32(const float *x, ptrdiff_t outer, ptrdiff_t width, float *into) {
    __m512 a = four_rows(x, outer), b = four_rows(x + outer, outer);
    __m512 c = four_rows(x + 2 * outer, outer), d = four_rows(x + 3 * outer, outer);
    __m512 ab = _mm512_unpacklo_ps(a, b), ab_high = _mm512_unpackhi_ps(a, b);
    __m512 cd = _mm512_unpacklo_ps(c, d), cd_high = _mm512_unpackhi_ps(c, d);
    _mm512_storeu_ps(into, _mm512_shuffle_ps(ab, cd, 0x44));
    _mm512_storeu_ps(into + width, _mm512_shuffle_ps(ab, cd, 0xee));
    _mm512_storeu_ps(into + 2 * width, _mm512_shuffle_ps(ab_high, cd_high, 0x44));
    _mm512_storeu_ps(into + 3 * width, _mm512_shuffle_ps(ab_high, cd_high, 0xee));
}

/* Rows r and r + 2 as the halves of a vector. */
static inline __m512d two_rows_f64(const double *x, ptrdiff_t outer) {
    return _mm512_insertf64x4(_mm512_castpd256_pd512(_mm256_loadu_pd(x)),
                              _mm256_loadu_pd(x + 2 * outer), 1);
}
static inline void wide_block_f64(const double *x, ptrdiff_t outer, ptrdiff_t width, double *into) {
    __m512d a = two_rows_f64(x, outer), b = two_rows_f64(x + outer, outer);
    __m512d c = two_rows_f64(x + 4 * outer, outer), d = two_rows_f64(x + 5 * outer, outer);
    __m512d ab = _mm512_unpacklo_pd(a, b), ab_high = _mm512_unpackhi_pd(a, b);
    __m512d cd = _mm512_unpacklo_pd(c, d), cd_high = _mm512_unpackhi_pd(c, d);
    _mm512_storeu_pd(into, _mm512_shuffle_f64x2(ab, cd, 0x88));
    _mm512_storeu_pd(into + width, _mm512_shuffle_f64x2(ab_high, cd_high, 0x88));
    _mm512_storeu_pd(into + 2 * width, _mm512_shuffle_f64x2(ab, cd, 0xdd));
    _mm512_storeu_pd(into + 3 * width, _mm512_shuffle_f64x2(ab_high, cd_high, 0xdd));
}

#define KLFAST_WIDE_TRANSPOSE(type, real, step)                                                  \
    static inline void transpose_##type(const real *x, ptrdiff_t outer, ptrdiff_t n,             \
                                        ptrdiff_t rows, real *into, ptrdiff_t width) {           \
        if (n < 4) {                                                                             \
            narrow_##type(x, outer, n, rows, into, width);                                       \
            return;                                                                              \
        }                                                                                        \
        for (ptrdiff_t first = 0; first < rows; first += step) {                                 \
            for (ptrdiff_t i = 0; i < n; i += 4) {                                               \
                ptrdiff_t at = i + 4 <= n ? i : n - 4;                                           \
                wide_block_##type(x + at, outer, width, into + at * width);                      \
            }                                                                                    \
            x += step * outer;                                                                   \
            into += step;                                                                        \
        }                                                                                        \
    }
KLFAST_WIDE_TRANSPOSE(f32, float, 16)
KLFAST_WIDE_TRANSPOSE(f64, double, 8)

#else

KLFAST_TRANSPOSE(transpose, f32, float, KLFAST_ROWS_F32)
KLFAST_TRANSPOSE(transpose, f64, double, 4)

#endif

#endif
