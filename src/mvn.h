/* Cholesky factors and triangular solves for mvn.pxd: the two things that take the time.
 *
 * Small: up to SMALL rows, LANES items side by side, a kernel for each number of rows. What lanes
 *   give as NaN is computed alone, in panels.
 * Lanes: the same for more rows, one vector for each matrix element.
 * Panels: for large matrices, one item at a time, rows in panels of ROWS, each panel by columns.
 *
 * All are left-looking: a tile of the result collects its sum over all finished columns in
 * registers, is divided by the diagonal block and written. Only lower triangles are used.
 * Vectors are GCC's and Clang's generic ones, as wide as the instruction set's own.
 */
#ifndef KLFAST_MVN_H
#define KLFAST_MVN_H

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <string.h>
#include "vecmath.h"
#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define MVN_LANES 8
#elif defined(__AVX__)
#define MVN_LANES 4
#else
#define MVN_LANES 2
#endif

/* Two vectors by four columns: eight sums in flight hide the latency of a fused multiply-add. */
#define MVN_VECTORS 2
#define MVN_ROWS (MVN_VECTORS * MVN_LANES)
#define MVN_COLUMNS 4
#define MVN_DEPTH 256  /* columns: a block of a panel and a strip of a factor fit the first cache */

#define MVN_INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define MVN_UNROLL _Pragma("unroll")
#else
#define MVN_UNROLL _Pragma("GCC unroll 9")
#endif

typedef double mvn_vec __attribute__((vector_size(8 * MVN_LANES), may_alias));
typedef double mvn_loose __attribute__((vector_size(8 * MVN_LANES), may_alias, aligned(8)));
typedef int64_t mvn_bits __attribute__((vector_size(8 * MVN_LANES), may_alias));
typedef uint64_t mvn_words __attribute__((vector_size(8 * MVN_LANES), may_alias));
typedef int64_t mvn_loose_bits __attribute__((vector_size(8 * MVN_LANES), may_alias, aligned(8)));

MVN_INLINE mvn_vec mvn_ones(void) { return (mvn_vec){0} + 1.0; }

MVN_INLINE mvn_vec mvn_sqrt(mvn_vec x) {
#if MVN_LANES == 8
    return (mvn_vec)_mm512_sqrt_pd((__m512d)x);
#elif MVN_LANES == 4
    return (mvn_vec)_mm256_sqrt_pd((__m256d)x);
#else
    mvn_vec root;
    for (int lane = 0; lane < MVN_LANES; lane++) root[lane] = sqrt(x[lane]);
    return root;
#endif
}

/* x y + z, rounded once where processors can. Which product of a sum of two a compiler fuses may
 * differ from one inlined copy to the next, and bits with it: such sums are written with this. */
MVN_INLINE mvn_vec mvn_fma(mvn_vec x, mvn_vec y, mvn_vec z) {
#if MVN_LANES == 8
    return (mvn_vec)_mm512_fmadd_pd((__m512d)x, (__m512d)y, (__m512d)z);
#elif MVN_LANES == 4 && defined(__FMA__)
    return (mvn_vec)_mm256_fmadd_pd((__m256d)x, (__m256d)y, (__m256d)z);
#elif defined(__aarch64__)
    return (mvn_vec)vfmaq_f64((float64x2_t)z, (float64x2_t)x, (float64x2_t)y);
#else
    return x * y + z;
#endif
}

/* z - x y, likewise; of numbers, too: what items alone and in lanes compute has the same bits. */
MVN_INLINE mvn_vec mvn_less(mvn_vec z, mvn_vec x, mvn_vec y) {
#if MVN_LANES == 8
    return (mvn_vec)_mm512_fnmadd_pd((__m512d)x, (__m512d)y, (__m512d)z);
#elif MVN_LANES == 4 && defined(__FMA__)
    return (mvn_vec)_mm256_fnmadd_pd((__m256d)x, (__m256d)y, (__m256d)z);
#elif defined(__aarch64__)
    return (mvn_vec)vfmsq_f64((float64x2_t)z, (float64x2_t)x, (float64x2_t)y);
#else
    return z - x * y;
#endif
}
static inline double mvn_number_less(double z, double x, double y) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return fma(-x, y, z);
#else
    return z - x * y;
#endif
}

#if MVN_LANES == 8
/* x^(1/2) and x^(-1/2), right to an ulp: with y near x^(-1/2) and e = 1 - x y^2, |e| < 2^-13, it is
 * y (1 - e)^(-1/2). A root and a division would take twice as long. NaN unless 0 < x < inf. */
MVN_INLINE void mvn_roots(mvn_vec x, mvn_vec *root, mvn_vec *inverse) {
    const mvn_vec one = mvn_ones();
    mvn_vec y = (mvn_vec)_mm512_rsqrt14_pd((__m512d)x), product = x * y;
    mvn_vec e = mvn_fma(-product, y, one);
    mvn_vec more = e * mvn_fma(e, mvn_fma(e, 0.3125 * one, 0.375 * one), 0.5 * one);
    *root = mvn_fma(product, more, product);
    *inverse = mvn_fma(y, more, y);
}
#endif

/* x, of which the compiler knows nothing more: a product is not fused with a sum, here and not
 * there, and what is loaded is not loaded again. */
MVN_INLINE mvn_vec mvn_settled(mvn_vec x) {
#if MVN_LANES == 8
    __asm__("" : "+v"(x));
#elif defined(__x86_64__)
    __asm__("" : "+x"(x));
#elif defined(__aarch64__)
    __asm__("" : "+w"(x));
#endif
    return x;
}

/* A vector's elements, x(0) .. x(LANES - 1). */
#if MVN_LANES == 8
#define MVN_EVERY(x) {x(0), x(1), x(2), x(3), x(4), x(5), x(6), x(7)}
#elif MVN_LANES == 4
#define MVN_EVERY(x) {x(0), x(1), x(2), x(3)}
#else
#define MVN_EVERY(x) {x(0), x(1)}
#endif

/* One element of LANES arrays, which begin at `at`, side by side. */
MVN_INLINE mvn_vec mvn_gather_f32(char *const *at, ptrdiff_t offset) {
#define MVN_AT(lane) *(const float *)(at[lane] + offset)
    return (mvn_vec)MVN_EVERY(MVN_AT);
#undef MVN_AT
}
MVN_INLINE mvn_vec mvn_gather_f64(char *const *at, ptrdiff_t offset) {
#define MVN_AT(lane) *(const double *)(at[lane] + offset)
    return (mvn_vec)MVN_EVERY(MVN_AT);
#undef MVN_AT
}

/* LANES numbers that lie `outer` bytes apart. */
MVN_INLINE mvn_vec mvn_spread(const char *at, ptrdiff_t outer, int single) {
#define MVN_FLOAT(lane) *(const float *)(at + (lane) * outer)
#define MVN_DOUBLE(lane) *(const double *)(at + (lane) * outer)
    return single ? (mvn_vec)MVN_EVERY(MVN_FLOAT) : (mvn_vec)MVN_EVERY(MVN_DOUBLE);
}

/* Two, four or eight elements that lie side by side, of LANES items `outer` bytes apart, into as
 * many vectors. Wide loads and shuffles, as a load takes as long as two to four shuffles. */
#if MVN_LANES >= 4
MVN_INLINE __m128 mvn_four_floats(const char *a, const char *b) { /* two and two */
    return _mm_loadh_pi(_mm_loadl_pi(_mm_setzero_ps(), (const __m64 *)a), (const __m64 *)b);
}
#endif
#if MVN_LANES == 8
/* Eight of one item, four each of two, two each of four. GCC would load a line again for every
 * shuffle; lines mostly lie across two of the cache's, which takes twice as long. */
MVN_INLINE __m512d mvn_line(const char *at, int single) {
    if (single) return _mm512_cvtps_pd(_mm256_loadu_ps((const float *)at));
    return (__m512d)mvn_settled((mvn_vec)_mm512_loadu_pd((const double *)at));
}
MVN_INLINE __m512d mvn_halves(const char *a, const char *b, int single) {
    if (single) {
        __m256 low = _mm256_castps128_ps256(_mm_loadu_ps((const float *)a));
        return _mm512_cvtps_pd(_mm256_insertf128_ps(low, _mm_loadu_ps((const float *)b), 1));
    }
    __m512d low = _mm512_castpd256_pd512(_mm256_loadu_pd((const double *)a));
    return _mm512_insertf64x4(low, _mm256_loadu_pd((const double *)b), 1);
}
MVN_INLINE __m512d mvn_quarters(const char *at, ptrdiff_t outer, int single) {
    const char *a = at, *b = at + outer, *c = at + 2 * outer, *d = at + 3 * outer;
    if (single) {
        __m256 low = _mm256_castps128_ps256(mvn_four_floats(a, b));
        return _mm512_cvtps_pd(_mm256_insertf128_ps(low, mvn_four_floats(c, d), 1));
    }
    __m512d all = _mm512_castpd128_pd512(_mm_loadu_pd((const double *)a));
    all = _mm512_insertf64x2(all, _mm_loadu_pd((const double *)b), 1);
    all = _mm512_insertf64x2(all, _mm_loadu_pd((const double *)c), 2);
    return _mm512_insertf64x2(all, _mm_loadu_pd((const double *)d), 3);
}
MVN_INLINE void mvn_pair(const char *at, ptrdiff_t outer, mvn_vec *x, int single) {
    __m512d even = mvn_quarters(at, 2 * outer, single);
    __m512d odd = mvn_quarters(at + outer, 2 * outer, single);
    x[0] = (mvn_vec)_mm512_unpacklo_pd(even, odd);
    x[1] = (mvn_vec)_mm512_unpackhi_pd(even, odd);
}
MVN_INLINE void mvn_quad(const char *at, ptrdiff_t outer, mvn_vec *x, int single) {
    __m512d a = mvn_halves(at, at + 2 * outer, single);
    __m512d b = mvn_halves(at + outer, at + 3 * outer, single);
    __m512d c = mvn_halves(at + 4 * outer, at + 6 * outer, single);
    __m512d d = mvn_halves(at + 5 * outer, at + 7 * outer, single);
    __m512d ab = _mm512_unpacklo_pd(a, b), ab_odd = _mm512_unpackhi_pd(a, b);
    __m512d cd = _mm512_unpacklo_pd(c, d), cd_odd = _mm512_unpackhi_pd(c, d);
    x[0] = (mvn_vec)_mm512_shuffle_f64x2(ab, cd, 0x88);
    x[1] = (mvn_vec)_mm512_shuffle_f64x2(ab_odd, cd_odd, 0x88);
    x[2] = (mvn_vec)_mm512_shuffle_f64x2(ab, cd, 0xdd);
    x[3] = (mvn_vec)_mm512_shuffle_f64x2(ab_odd, cd_odd, 0xdd);
}
MVN_INLINE void mvn_oct(const char *at, ptrdiff_t outer, mvn_vec *x, int single) {
    __m512d row[8];
    MVN_UNROLL for (int i = 0; i < 8; i++) row[i] = mvn_line(at + i * outer, single);
    MVN_UNROLL for (int odd = 0; odd < 2; odd++) {
        __m512d a = odd ? _mm512_unpackhi_pd(row[0], row[1]) : _mm512_unpacklo_pd(row[0], row[1]);
        __m512d b = odd ? _mm512_unpackhi_pd(row[2], row[3]) : _mm512_unpacklo_pd(row[2], row[3]);
        __m512d c = odd ? _mm512_unpackhi_pd(row[4], row[5]) : _mm512_unpacklo_pd(row[4], row[5]);
        __m512d d = odd ? _mm512_unpackhi_pd(row[6], row[7]) : _mm512_unpacklo_pd(row[6], row[7]);
        __m512d ab = _mm512_shuffle_f64x2(a, b, 0x88), ab_high = _mm512_shuffle_f64x2(a, b, 0xdd);
        __m512d cd = _mm512_shuffle_f64x2(c, d, 0x88), cd_high = _mm512_shuffle_f64x2(c, d, 0xdd);
        x[odd] = (mvn_vec)_mm512_shuffle_f64x2(ab, cd, 0x88);
        x[2 + odd] = (mvn_vec)_mm512_shuffle_f64x2(ab_high, cd_high, 0x88);
        x[4 + odd] = (mvn_vec)_mm512_shuffle_f64x2(ab, cd, 0xdd);
        x[6 + odd] = (mvn_vec)_mm512_shuffle_f64x2(ab_high, cd_high, 0xdd);
    }
}
typedef int32_t mvn_index __attribute__((vector_size(64)));

/* Elements c and, in the upper half, d of 8 items of `width` floats, 2 to 9, with nothing between
 * them: of all that lies there, what is wanted is chosen before it is converted. */
MVN_INLINE __m512 mvn_two_of_each(const char *at, const int width, const int c, const int d) {
    const mvn_index lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const mvn_index from = (lane & 7) * width + c + ((lane >> 3) * (d - c));
    const float *x = (const float *)at;
    __m512 chosen = _mm512_loadu_ps(x);
    if (width == 2) return _mm512_permutexvar_ps((__m512i)from, chosen);
    MVN_UNROLL for (int begin = 16; begin < 8 * width; begin += 16) {
        const int whole = begin + 16 <= 8 * width;
        const mvn_index old = begin == 16 ? from : lane, new = from - begin + 16;
        const mvn_index index = old + ((from >= begin) & (from < begin + 16) & (new - old));
        __m512 next = whole ? _mm512_loadu_ps(x + begin)
                            : _mm512_castps256_ps512(_mm256_loadu_ps(x + begin));
        chosen = _mm512_permutex2var_ps(chosen, (__m512i)index, next);
    }
    return chosen;
}
/* Of such items the elements that are `wanted`. */
MVN_INLINE void mvn_dense_floats(
    const char *at, mvn_vec *x, const int width, const int *wanted, const int count) {
    MVN_UNROLL for (int j = 0; j < count; j += 2) {
        const int odd = j + 1 < count;
        __m512 two = mvn_two_of_each(at, width, wanted[j], wanted[j + odd]);
        x[j] = (mvn_vec)_mm512_cvtps_pd(_mm512_castps512_ps256(two));
        if (odd) x[j + 1] = (mvn_vec)_mm512_cvtps_pd(_mm512_extractf32x8_ps(two, 1));
    }
}
/* All elements of such items, of one to four, n, floats or doubles. */
MVN_INLINE void mvn_dense(const char *at, mvn_vec *x, const ptrdiff_t n, int single) {
    const ptrdiff_t step = MVN_LANES * (single ? sizeof(float) : sizeof(double));
    const int all[4] = {0, 1, 2, 3};
    const __m512i from_zip = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    __m512d a = mvn_line(at, single), b, c, d;
    if (n == 1) {
        x[0] = (mvn_vec)a;
        return;
    }
    if (single) {
        mvn_dense_floats(at, x, (int)n, all, (int)n);
        return;
    }
    b = mvn_line(at + step, single);
    if (n == 2) {
        x[0] = (mvn_vec)_mm512_permutexvar_pd(from_zip, _mm512_unpacklo_pd(a, b));
        x[1] = (mvn_vec)_mm512_permutexvar_pd(from_zip, _mm512_unpackhi_pd(a, b));
        return;
    }
    c = mvn_line(at + 2 * step, single);
    if (n == 3) {
        const __m512i order = _mm512_setr_epi64(0, 3, 6, 1, 4, 7, 2, 5);
        const __m512i one = _mm512_set1_epi64(1);
        const __m512i second = _mm512_add_epi64(order, one), third = _mm512_add_epi64(second, one);
        x[0] = (mvn_vec)_mm512_permutexvar_pd(
            order, _mm512_mask_blend_pd(0x24, _mm512_mask_blend_pd(0x92, a, b), c));
        x[1] = (mvn_vec)_mm512_permutexvar_pd(
            second, _mm512_mask_blend_pd(0x49, _mm512_mask_blend_pd(0x24, a, b), c));
        x[2] = (mvn_vec)_mm512_permutexvar_pd(
            third, _mm512_mask_blend_pd(0x92, _mm512_mask_blend_pd(0x49, a, b), c));
        return;
    }
    d = mvn_line(at + 3 * step, single);
    {
        const __m512i low = _mm512_setr_epi64(0, 4, 1, 5, 8, 12, 9, 13);
        const __m512i high = _mm512_setr_epi64(2, 6, 3, 7, 10, 14, 11, 15);
        __m512d ab = _mm512_unpacklo_pd(a, b), ab_odd = _mm512_unpackhi_pd(a, b);
        __m512d cd = _mm512_unpacklo_pd(c, d), cd_odd = _mm512_unpackhi_pd(c, d);
        x[0] = (mvn_vec)_mm512_permutex2var_pd(ab, low, cd);
        x[1] = (mvn_vec)_mm512_permutex2var_pd(ab_odd, low, cd_odd);
        x[2] = (mvn_vec)_mm512_permutex2var_pd(ab, high, cd);
        x[3] = (mvn_vec)_mm512_permutex2var_pd(ab_odd, high, cd_odd);
    }
}
#elif MVN_LANES == 4
MVN_INLINE void mvn_pair(const char *at, ptrdiff_t outer, mvn_vec *x, int single) {
    const char *a = at, *b = at + outer, *c = at + 2 * outer, *d = at + 3 * outer;
    if (single) {
        __m128 low = mvn_four_floats(a, b), high = mvn_four_floats(c, d);
        x[0] = (mvn_vec)_mm256_cvtps_pd(_mm_shuffle_ps(low, high, 0x88));
        x[1] = (mvn_vec)_mm256_cvtps_pd(_mm_shuffle_ps(low, high, 0xdd));
    } else {
        __m256d even = _mm256_castpd128_pd256(_mm_loadu_pd((const double *)a));
        __m256d odd = _mm256_castpd128_pd256(_mm_loadu_pd((const double *)b));
        even = _mm256_insertf128_pd(even, _mm_loadu_pd((const double *)c), 1);
        odd = _mm256_insertf128_pd(odd, _mm_loadu_pd((const double *)d), 1);
        x[0] = (mvn_vec)_mm256_unpacklo_pd(even, odd);
        x[1] = (mvn_vec)_mm256_unpackhi_pd(even, odd);
    }
}
#else
MVN_INLINE void mvn_pair(const char *at, ptrdiff_t outer, mvn_vec *x, int single) {
    x[0] = mvn_spread(at, outer, single);
    x[1] = mvn_spread(at + (single ? sizeof(float) : sizeof(double)), outer, single);
}
#endif
#if MVN_LANES < 8
MVN_INLINE void mvn_quad(const char *at, ptrdiff_t outer, mvn_vec *x, int single) {
    mvn_pair(at, outer, x, single);
    mvn_pair(at + 2 * (single ? sizeof(float) : sizeof(double)), outer, x + 2, single);
}
MVN_INLINE void mvn_oct(const char *at, ptrdiff_t outer, mvn_vec *x, int single) {
    mvn_quad(at, outer, x, single);
    mvn_quad(at + 4 * (single ? sizeof(float) : sizeof(double)), outer, x + 4, single);
}
#endif

/* `count` elements `step` bytes apart of LANES arrays, `outer` bytes apart, each of `width`. Where
 * they lie side by side, neighbours that are not asked for may be loaded along. */
MVN_INLINE void mvn_read(
    mvn_vec *into, const char *at, ptrdiff_t outer, ptrdiff_t step, ptrdiff_t count,
    ptrdiff_t width, int single) {
    const ptrdiff_t size = single ? sizeof(float) : sizeof(double);
    mvn_vec x[8];
    ptrdiff_t j = 0;
#if MVN_LANES == 8
    if (step == size && outer == width * size && width <= 4) {
        mvn_dense(at, x, width, single);
        MVN_UNROLL for (; j < count; j++) into[j] = x[j];
        return;
    }
#endif
    if (step == size && width > 1) {
        MVN_UNROLL for (; width < 8 && count - j > 2 && j + 4 <= width; j += 4) {
            mvn_quad(at + j * size, outer, x, single);
            MVN_UNROLL for (ptrdiff_t c = 0; c < 4 && c < count - j; c++) into[j + c] = x[c];
        }
        MVN_UNROLL for (; j + 1 < count; j += 2) mvn_pair(at + j * size, outer, into + j, single);
        if (j < count) {
            ptrdiff_t odd = j > 0;
            mvn_pair(at + (j - odd) * size, outer, x, single);
            into[j] = x[odd];
        }
    } else {
        MVN_UNROLL for (; j < count; j++) into[j] = mvn_spread(at + j * step, outer, single);
    }
}

/* 1 / y, kept finite: equal factors must give 0 even where 1 / y overflows (y < 2^-1024). */
static inline double mvn_reciprocal(double y) {
    double inverse = 1.0 / y;
    return inverse < DBL_MAX ? inverse : DBL_MAX;
}

/* The power of two, -200, 0 or 200, that brings a positive x away from both ends of the range. */
static inline double mvn_inward(double x) {
    double up = x < 0x1p-900 ? 200.0 : 0.0, down = x > 0x1p900 ? 200.0 : 0.0;
    return up - down;
}

/* t - log1p(t) for t = (x - y) / y, x and y positive. With the integer e that brings x / y' near 1,
 * y' = y 2^e, and s = (x - y') / (x + y'):  log1p(t) = e ln 2 + 2 atanh(s);  e = 0: t - 2s = s t.
 * 6 ulp. */
static inline double mvn_minus_log1p(double x, double y, double t) {
    double shift_x = mvn_inward(x), shift_y = mvn_inward(y);
    x *= pow2_f64(shift_x);
    y *= pow2_f64(shift_y);
    double e = ratio_exponent_f64(x, y) + (shift_y - shift_x);
    double matched = times_power_f64(y, x, y);
    double s = (x - matched) / (x + matched);
    double near = s * t, far = (t - 2.0 * s) - e * 0.6931471805599453;
    return (e == 0.0 ? near : far) - atanh_tail_f64(s);
}

/* t <- t - log1p(t) for many; NaN unless x and y are positive. */
static inline void mvn_minus_log1p_each(
    const double *restrict x, const double *restrict y, double *restrict t, ptrdiff_t count) {
    for (ptrdiff_t i = 0; i < count; i++) {
        double term = mvn_minus_log1p(x[i], y[i], t[i]);
        double smaller = x[i] < y[i] ? x[i] : y[i];
        t[i] = smaller > 0.0 ? term : NAN;
    }
}

/* Whether all are finite: adding 1 to an exponent of all ones carries into the sign bit. */
static inline int mvn_all_finite(const double *x, ptrdiff_t count) {
    const uint64_t infinity = (uint64_t)0x7ff << 52;
    uint64_t carried = 0;
    for (ptrdiff_t i = 0; i < count; i++) {
        carried |= (bits_f64(x[i]) & infinity) + ((uint64_t)1 << 52);
    }
    return !(carried >> 63);
}

/* a where bits are set, else b. */
MVN_INLINE mvn_vec mvn_pick(mvn_bits mask, mvn_vec a, mvn_vec b) {
    return (mvn_vec)(((mvn_bits)a & mask) | ((mvn_bits)b & ~mask));
}
/* a where x < limit, else b. */
MVN_INLINE mvn_vec mvn_below(mvn_vec x, double limit, mvn_vec a, mvn_vec b) {
#if MVN_LANES == 8
    __mmask8 mask = _mm512_cmp_pd_mask((__m512d)x, _mm512_set1_pd(limit), _CMP_LT_OQ);
    return (mvn_vec)_mm512_mask_blend_pd(mask, (__m512d)b, (__m512d)a);
#else
    return mvn_pick((mvn_bits)(x < limit), a, b);
#endif
}

ATANH_TAIL_F64(mvn_atanh_tail, mvn_vec)

/* The bits of 1.5, the sign, the exponent of 2^52, sign and exponent. In memory, where `used` keeps
 * them: GCC would compose each anew with three instructions. */
#define MVN_WORD_0(lane) (uint64_t)0x7ff << 51
#define MVN_WORD_1(lane) (uint64_t)1 << 63
#define MVN_WORD_2(lane) (uint64_t)0x433 << 52
#define MVN_WORD_3(lane) (uint64_t)0xfff << 52
static mvn_words mvn_consts[4] __attribute__((used)) = {
    MVN_EVERY(MVN_WORD_0), MVN_EVERY(MVN_WORD_1), MVN_EVERY(MVN_WORD_2), MVN_EVERY(MVN_WORD_3)};

/* sum_i (t_i - log1p(t_i)) over up to four, from t_i = x_i / y_i - 1 and u_i = x_i / y_i, with one
 * logarithm. With S = sum t_i, U = prod u_i = 1 + T, T = S + R, where R holds the products of two
 * and more, and the integer e that brings V = U 2^e near 1, it is
 *     S - log U = (S - 2 atanh(s)) + e ln 2,    s = (V - 1) / (V + 1).
 * Where it is small, e = 0 and S - 2s = s T - R, which loses a factor of 7 at most. U is taken as
 * 1 + T where that is right to an ulp of 1. The sign bit of `bad` is set unless
 * 2^-1000 < U < 2^1000. 5e-14 (9e-15 seen). */
typedef struct { mvn_vec sum, rest, product, squares; } mvn_terms; /* S, R, U, sum t_i^2 */

MVN_INLINE mvn_terms mvn_terms_of(const mvn_vec *t, const mvn_vec *u, const int count) {
    mvn_terms a = {.sum = t[0], .rest = {0}, .product = u[0], .squares = t[0] * t[0]};
    MVN_UNROLL for (int i = 1; i < count; i++) {
        if (i == 1) a.rest = mvn_settled(t[0] * t[1]);
        else a.rest = mvn_fma(a.sum + a.rest, t[i], a.rest);
        a.sum += t[i];
        a.product *= u[i];
        a.squares = mvn_fma(t[i], t[i], a.squares);
    }
    return a;
}
MVN_INLINE mvn_vec mvn_minus_log(const mvn_terms *a, mvn_bits *bad) {
    mvn_vec total = a->sum + a->rest;
    mvn_vec ratio = mvn_below(a->squares, 0.25, 1.0 + total, a->product);
    mvn_words shift = mvn_consts[0] - (mvn_words)ratio; /* its upper 12 bits: e, as in vecmath.h */
    mvn_words power = shift & mvn_consts[3];
#if MVN_LANES == 8
    const double unit = 0x1p52;
    mvn_vec e = (mvn_vec)_mm512_cvtepi64_pd((__m512i)power);
#else
    const double unit = 1.0;
    mvn_words field = (shift ^ mvn_consts[1]) >> 52;
    mvn_vec e = (mvn_vec)(field | mvn_consts[2]) - (0x1p52 + 2048.0);
#endif
    mvn_vec matched = (mvn_vec)((mvn_words)ratio + power);
    mvn_vec s = mvn_below(a->squares, 0.019, total, matched - 1.0) / (matched + 1.0);
    mvn_vec near = s * total - a->rest, far = (a->sum - 2.0 * s) + e * (0.6931471805599453 / unit);
    *bad |= (mvn_bits)(1e6 * unit * unit - e * e);
    return mvn_below(a->squares, 0.019, near, far) - mvn_atanh_tail(s);
}

/* The diagonal block of a covariance, when all to its left is subtracted, becomes that of its
 * factor L; and the reciprocals of the diagonal. S = M D M^T, M with a diagonal of ones: pivots
 * wait for one division each and for no square root. L = M D^(1/2). */
#define MVN_PIVOTS(name, number, less, root) \
    MVN_INLINE void name(number (*s)[MVN_COLUMNS], number *reciprocal, const int rows) { \
        MVN_UNROLL for (int c = 0; c < rows; c++) { \
            number inverse = 1.0 / s[c][c]; \
            MVN_UNROLL for (int k = c + 1; k < rows; k++) { \
                number share = s[k][c] * inverse; \
                MVN_UNROLL for (int r = k; r < rows; r++) s[r][k] = less(s[r][k], s[r][c], share); \
            } \
        } \
        MVN_UNROLL for (int c = 0; c < rows; c++) { \
            s[c][c] = root(s[c][c]); \
            reciprocal[c] = 1.0 / s[c][c]; \
            MVN_UNROLL for (int r = c + 1; r < rows; r++) s[r][c] *= reciprocal[c]; \
        } \
    }
MVN_PIVOTS(mvn_pivots, double, mvn_number_less, sqrt)
MVN_PIVOTS(mvn_lanes_pivots, mvn_vec, mvn_less, mvn_sqrt)

/* ---- small ----------------------------------------------------------------------------------- */

/* Up to SMALL rows: a kernel for each number of rows, in which all loops over rows are unrolled.
 * LANES items side by side are a group, lower triangles are packed. */
#define MVN_SMALL 8
/* Rows up to which covariances have longer code that waits less. With AVX-512 that of 4 rows takes
 * twice as long in some copies of the same file. */
#define MVN_SHORT (MVN_LANES == 8 ? 3 : 5)
#define MVN_SMALL_TRIANGLE (MVN_SMALL * (MVN_SMALL + 1) / 2)

typedef struct {            /* one distribution of every item: addresses, and strides in bytes */
    char *loc;
    ptrdiff_t loc_outer, loc_inner;
    char *matrix;
    ptrdiff_t matrix_outer, row, column;
    int covariance, shared; /* shared: the same matrix for every item */
} mvn_side;

typedef struct { mvn_vec l[MVN_SMALL_TRIANGLE], reciprocal[MVN_SMALL]; } mvn_small_factor;

#define MVN_AHEAD 4096 /* bytes, at least; 2048 take up to a tenth longer */

/* Asks for `count` n-ths, from number i on, of the matrices two groups or more after that of
 * `item`, if they lie side by side. Beyond the last item it asks in vain. Larger ones into the
 * second cache: 8 rows from memory in four fifths of the time, but 2 rows take a quarter longer. */
MVN_INLINE void mvn_prefetch_group(
    const mvn_side *s, ptrdiff_t item, ptrdiff_t i, ptrdiff_t count, ptrdiff_t n, int single) {
    const ptrdiff_t size = single ? sizeof(float) : sizeof(double), share = MVN_LANES * n * size;
    const char *begin = s->matrix + item * s->matrix_outer + i * share;
    if (s->shared || s->matrix_outer > n * n * size) return;
    begin += 2 * n * share > MVN_AHEAD ? 2 * n * share : MVN_AHEAD;
    MVN_UNROLL for (ptrdiff_t at = 0; at < count * share; at += 64) {
        if (n > 4) __builtin_prefetch(begin + at, 0, 2);
        else __builtin_prefetch(begin + at, 0, 3);
    }
}

#define MVN_EACH(i, begin, end) MVN_UNROLL for (int i = begin; i < (end); i++)
#define MVN_TRIANGLE(i, j) ((i) * ((i) + 1) / 2 + (j))

/* Row i of a covariance S becomes that of its factor, after the rows above. S = M D M^T, M with a
 * diagonal of ones: sums run over products of the row of M D at hand and of rows of M, `unit`, so
 * that pivots wait for one division each and for no square root. L = M D^(1/2). */
MVN_INLINE void mvn_small_eliminate(
    mvn_vec *row, mvn_vec *unit, mvn_vec *inverse, mvn_vec *reciprocal, int solved, const int i,
    const int n) {
    mvn_vec *scaled = unit + MVN_TRIANGLE(i, 0);
    MVN_EACH(j, 1, i) {
        MVN_EACH(k, 0, j) row[j] -= row[k] * unit[MVN_TRIANGLE(j, k)];
    }
    MVN_EACH(j, 0, i) {
        scaled[j] = row[j] * inverse[j];
        row[i] -= row[j] * scaled[j];
        row[j] = mvn_settled(row[j] * reciprocal[j]);
    }
    if (i < n - 1) inverse[i] = 1.0 / row[i];
#if MVN_LANES == 8
    if (n <= MVN_SHORT) {
        mvn_roots(row[i], row + i, reciprocal + i);
        return;
    }
#endif
    if (i < n - 1) {
        reciprocal[i] = mvn_sqrt(inverse[i]);
        row[i] = mvn_settled(row[i] * reciprocal[i]);
    } else {
        row[i] = mvn_sqrt(row[i]);
        if (solved) reciprocal[i] = 1.0 / row[i];
    }
}

/* Whether rows of a side's factors are read when they are needed, once; others are in memory then,
 * as they have to be computed first or serve all groups. */
MVN_INLINE int mvn_by_rows(const mvn_side *s) { return !s->covariance && !s->shared; }

/* Whole matrices, of which no row begins after a gap, `outer` bytes apart. */
MVN_INLINE void mvn_small_whole(
    const char *at, ptrdiff_t outer, mvn_small_factor *factor, const int n, const int single) {
    const ptrdiff_t size = single ? sizeof(float) : sizeof(double);
    mvn_vec all[10];
#if MVN_LANES == 8
    if (single && n > 1 && outer == n * n * size) {
        const int two[3] = {0, 2, 3}, three[6] = {0, 3, 4, 6, 7, 8};
        mvn_dense_floats(at, factor->l, n * n, n == 2 ? two : three, MVN_TRIANGLE(n, 0));
        return;
    }
#endif
    if (n == 3) {
        mvn_oct(at, outer, all, single);
        mvn_pair(at + 7 * size, outer, all + 7, single);
    } else {
        mvn_read(all, at, outer, size, n * n, n * n, single);
    }
    MVN_EACH(r, 0, n) {
        MVN_EACH(c, 0, r + 1) factor->l[MVN_TRIANGLE(r, c)] = all[r * n + c];
    }
}

/* Row i of a side of a group, LANES items from one on; in a batch of fewer, one item with strides
 * of 0. `solved`: systems are, with the factor. */
MVN_INLINE void mvn_small_row(
    const mvn_side *s, ptrdiff_t item, int solved, mvn_small_factor *factor, const int i,
    const int n, const int single) {
    const char *at = s->matrix + item * s->matrix_outer + i * s->row;
    mvn_vec *row = factor->l + MVN_TRIANGLE(i, 0);
    const ptrdiff_t size = single ? sizeof(float) : sizeof(double);
    if (n * n <= MVN_LANES + 1 && s->column == size && s->row == n * size) {
        if (i == 0) mvn_small_whole(at, s->matrix_outer, factor, n, single);
    } else {
        mvn_read(row, at, s->matrix_outer, s->column, i + 1, n, single);
    }
    if (solved) factor->reciprocal[i] = 1.0 / row[i];
}

MVN_INLINE void mvn_small_load(
    const mvn_side *s, ptrdiff_t item, int solved, mvn_small_factor *factor, const int n,
    const int single) {
    mvn_vec unit[MVN_SMALL_TRIANGLE], inverse[MVN_SMALL];
    if (s->covariance) {
        MVN_EACH(i, 0, n) {
            mvn_vec *row = factor->l + MVN_TRIANGLE(i, 0);
            mvn_small_row(s, item, 0, factor, i, n, single);
            mvn_small_eliminate(row, unit, inverse, factor->reciprocal, solved, i, n);
        }
    } else {
        MVN_EACH(i, 0, n) mvn_small_row(s, item, solved, factor, i, n, single);
    }
}

MVN_INLINE void mvn_small_loc(
    const mvn_side *s, ptrdiff_t item, mvn_vec *loc, const int n, const int single) {
    mvn_read(loc, s->loc + item * s->loc_outer, s->loc_outer, s->loc_inner, n, n, single);
}

/* Row i of [z | Y] = L_q^-1 ([mu_p | L_p] - [mu_q | L_q]) from the rows above and its own z, not
 * solved yet. Adds its squares to `total`. */
MVN_INLINE void mvn_small_whiten(
    const mvn_vec *p, const mvn_vec *q, mvn_vec reciprocal, mvn_vec (*y)[MVN_SMALL + 1],
    mvn_vec *total, const int i) {
    MVN_EACH(j, 0, i + 1) y[i][j + 1] = p[j] - q[j];
    MVN_EACH(k, 0, i) {
        MVN_EACH(j, 0, k + 2) y[i][j] -= q[k] * y[k][j];
    }
    MVN_EACH(j, 0, i + 2) {
        const int first = j < 4 && (i == 0 || j == i + 1);
        y[i][j] *= reciprocal;
        if (first) total[j % 4] = mvn_settled(y[i][j] * y[i][j]);
        else total[j % 4] = mvn_fma(y[i][j], y[i][j], total[j % 4]);
    }
}

/* What the divergences of a group are sums of; `bad` is negative where it is. */
typedef struct { mvn_vec squares; mvn_bits bad; mvn_terms terms[2]; } mvn_small_sums;

/* Those of a group; `q` is NULL for N(0, I). `fresh`: shared factors have not been loaded yet. */
MVN_INLINE void mvn_small_group(
    const mvn_side *p, const mvn_side *q, ptrdiff_t item, mvn_small_factor *a,
    mvn_small_factor *b, int fresh, mvn_small_sums *sums, const int n, const int single) {
    const int rows_p = mvn_by_rows(p), rows_q = q && mvn_by_rows(q);
    mvn_vec y[MVN_SMALL][MVN_SMALL + 1], z[MVN_SMALL], other[MVN_SMALL], total[4] = {{0}};
    mvn_vec t[MVN_SMALL], u[MVN_SMALL];
    mvn_bits bad = {0};
    if (!rows_p && (fresh || !p->shared)) mvn_small_load(p, item, 0, a, n, single);
    if (q && !rows_q && (fresh || !q->shared)) mvn_small_load(q, item, 1, b, n, single);
    mvn_small_loc(p, item, z, n, single);
    if (!q) {
        MVN_EACH(i, 0, n) {
            const mvn_vec *row = a->l + MVN_TRIANGLE(i, 0);
            mvn_prefetch_group(p, item, i, 1, n, single);
            if (rows_p) mvn_small_row(p, item, 0, a, i, n, single);
            u[i] = row[i];
            t[i] = u[i] - 1.0;
            bad |= (mvn_bits)u[i];
            total[0] = mvn_fma(z[i], z[i], total[0]);
            total[1] = mvn_fma(t[i], t[i], total[1]);
            MVN_EACH(j, 0, i) total[2] = mvn_fma(row[j], row[j], total[2]);
        }
    } else {
        mvn_small_loc(q, item, other, n, single);
        MVN_EACH(i, 0, n) {
            const mvn_vec *row_p = a->l + MVN_TRIANGLE(i, 0), *row_q = b->l + MVN_TRIANGLE(i, 0);
            const mvn_vec *reciprocal = b->reciprocal + i;
            mvn_prefetch_group(p, item, i, 1, n, single);
            mvn_prefetch_group(q, item, i, 1, n, single);
            if (rows_p) mvn_small_row(p, item, 0, a, i, n, single);
            if (rows_q) mvn_small_row(q, item, 1, b, i, n, single);
            y[i][0] = z[i] - other[i];
            mvn_small_whiten(row_p, row_q, *reciprocal, y, total, i);
            t[i] = y[i][i + 1];
            u[i] = row_p[i] * *reciprocal;
            bad |= (mvn_bits)row_p[i] | (mvn_bits)*reciprocal;
        }
    }
    sums->squares = (total[0] + total[1]) + (total[2] + total[3]);
    sums->bad = bad;
    sums->terms[0] = mvn_terms_of(t, u, n < 4 ? n : 4);
    if (n > 4) sums->terms[1] = mvn_terms_of(t + 4, u + 4, n - 4);
}

/* The divergences of a group, NaN where other formulas may know more. */
MVN_INLINE mvn_vec mvn_small_divergences(const mvn_small_sums *sums, const int n) {
    mvn_bits bad = sums->bad;
    mvn_vec kl = mvn_fma(sums->squares, 0.5 * mvn_ones(), mvn_minus_log(&sums->terms[0], &bad));
    if (n > 4) kl += mvn_minus_log(&sums->terms[1], &bad);
    return (mvn_vec)((mvn_bits)kl | (bad < 0)); /* all bits set: NaN */
}

/* Where divergences go, `outer` bytes apart. */
typedef struct { char *at; ptrdiff_t outer; } mvn_out;

MVN_INLINE void mvn_write(const mvn_out *out, ptrdiff_t item, mvn_vec kl, int single) {
    char *at = out->at + item * out->outer;
    if (out->outer == sizeof(double) && !single) {
        *(mvn_loose *)at = kl;
        return;
    }
#if MVN_LANES == 8
    if (out->outer == sizeof(float) && single) {
        _mm256_storeu_ps((float *)at, _mm512_cvtpd_ps((__m512d)kl));
        return;
    }
#endif
    for (int lane = 0; lane < MVN_LANES; lane++, at += out->outer) {
        if (single) *(float *)at = (float)kl[lane];
        else *(double *)at = kl[lane];
    }
}

/* `groups` groups from item `first` on; whether all is finite. Logarithms wait for all that is
 * before them: those of a group are taken after the next has begun, so that its loads and divisions
 * fill the time. */
MVN_INLINE int mvn_small_each(
    const mvn_side *p, const mvn_side *q, ptrdiff_t first, ptrdiff_t groups, mvn_small_factor *a,
    mvn_small_factor *b, int fresh, const mvn_out *out, const int n, const int single) {
    mvn_small_sums sums[2];
    mvn_words carried = {0}; /* as in mvn_all_finite */
    uint64_t any = 0;
    for (ptrdiff_t group = 0; group <= groups; group++) {
        if (group < groups) {
            mvn_small_group(p, q, first + group * MVN_LANES, a, b, fresh && group == 0,
                            sums + group % 2, n, single);
        }
        if (group > 0) {
            mvn_vec kl = mvn_small_divergences(sums + (group - 1) % 2, n);
            mvn_write(out, first + (group - 1) * MVN_LANES, kl, single);
            carried |= ((mvn_words)kl & (uint64_t)0x7ff << 52) + ((uint64_t)1 << 52);
        }
    }
    for (int lane = 0; lane < MVN_LANES; lane++) any |= carried[lane];
    return !(any >> 63);
}

/* A side whose items are matrices that lie one after the other, without gaps. */
MVN_INLINE mvn_side mvn_packed(const mvn_side *s, int covariance, ptrdiff_t n, int single) {
    const ptrdiff_t size = single ? sizeof(float) : sizeof(double);
    return (mvn_side){
        .loc = s->loc, .loc_outer = n * size, .loc_inner = size, .matrix = s->matrix,
        .matrix_outer = n * n * size, .row = n * size, .column = size, .covariance = covariance};
}

/* The same with all strides known beforehand: of what is executed otherwise, a third is the
 * arithmetic of addresses. */
MVN_INLINE int mvn_is_packed(const mvn_side *s, int covariance, ptrdiff_t n, int single) {
    mvn_side packed = mvn_packed(s, covariance, n, single);
    if (n == 1) { /* never used, and NumPy may give any */
        packed.loc_inner = s->loc_inner;
        packed.row = s->row;
        packed.column = s->column;
    }
    return !memcmp(s, &packed, sizeof packed);
}
MVN_INLINE int mvn_small_packed(
    const mvn_side *p, const mvn_side *q, ptrdiff_t first, ptrdiff_t groups, const mvn_out *out,
    int covariance, const int n, const int single) {
    const mvn_side packed_p = mvn_packed(p, covariance, n, single);
    const mvn_side packed_q = mvn_packed(q ? q : p, covariance, n, single);
    mvn_small_factor a, b;
    return mvn_small_each(
        &packed_p, q ? &packed_q : NULL, first, groups, &a, &b, 1, out, n, single);
}
MVN_INLINE int mvn_small_groups(
    const mvn_side *p, const mvn_side *q, ptrdiff_t first, ptrdiff_t groups, mvn_small_factor *a,
    mvn_small_factor *b, int fresh, const mvn_out *out, const int n, const int single) {
    if (mvn_is_packed(p, 0, n, single)) {
        if (!q) return mvn_small_packed(p, NULL, first, groups, out, 0, n, single);
        if (mvn_is_packed(q, 0, n, single)) {
            return mvn_small_packed(p, q, first, groups, out, 0, n, single);
        }
    } else if (n <= MVN_SHORT && q && mvn_is_packed(p, 1, n, single)
               && mvn_is_packed(q, 1, n, single)) {
        return mvn_small_packed(p, q, first, groups, out, 1, n, single);
    }
    return mvn_small_each(p, q, first, groups, a, b, fresh, out, n, single);
}

#define MVN_SMALL_CASE(n, single) case n: \
    return mvn_small_groups(p, q, first, groups, a, b, fresh, &out, n, single);
#define MVN_SMALL_CASES(single) switch (n) { \
    MVN_SMALL_CASE(1, single) MVN_SMALL_CASE(2, single) MVN_SMALL_CASE(3, single) \
    MVN_SMALL_CASE(4, single) MVN_SMALL_CASE(5, single) MVN_SMALL_CASE(6, single) \
    MVN_SMALL_CASE(7, single) MVN_SMALL_CASE(8, single) } \
    return 0;
static int mvn_small_f32(
    const mvn_side *p, const mvn_side *q, ptrdiff_t first, ptrdiff_t groups,
    mvn_small_factor *a, mvn_small_factor *b, int fresh, mvn_out out, ptrdiff_t n) {
    MVN_SMALL_CASES(1)
}
static int mvn_small_f64(
    const mvn_side *p, const mvn_side *q, ptrdiff_t first, ptrdiff_t groups,
    mvn_small_factor *a, mvn_small_factor *b, int fresh, mvn_out out, ptrdiff_t n) {
    MVN_SMALL_CASES(0)
}

/* ---- lanes ---------------------------------------------------------------------------------- */

/* Rows up to which items go in lanes, two or three times as fast as one by one. Both have the same
 * bits: every element is one sum over the columns before it, in their order. */
#define MVN_LANES_LIMIT 128
#define MVN_BLOCK MVN_COLUMNS /* rows that are taken together */
#if MVN_LANES == 8 || defined(__aarch64__)
#define MVN_TILE 4 /* columns: the sums of a tile have registers */
#else
#define MVN_TILE 2
#endif
/* Vectors a row: an odd multiple of four, so that the same columns of many rows do not evict each
 * other from the cache. */
#define MVN_STRIDE(n) ((((n) + 4) / 4 | 1) * 4)

/* LANES items side by side: [mu | L] of all of them, n rows of `stride` vectors, mu in column 0 and
 * element (i, j) of L in column j + 1. Blocks of BLOCK rows, the last may be shorter, are taken one
 * after the other; tiles of four columns reach beyond the diagonal, where 0 stands. */

MVN_INLINE void mvn_lanes_loc(
    mvn_vec *loc, const mvn_side *s, ptrdiff_t item, ptrdiff_t n, int single) {
    for (ptrdiff_t i = 0; i < n; i++) {
        loc[i] = mvn_spread(s->loc + item * s->loc_outer + i * s->loc_inner, s->loc_outer, single);
    }
}

/* Row i of a matrix, n > 8, up to the diagonal or beyond. Whole lines of the cache where there are
 * vectors as long: of items a power of two apart, lines evict each other. */
MVN_INLINE void mvn_lanes_row(
    mvn_vec *row, const mvn_side *s, ptrdiff_t item, ptrdiff_t n, ptrdiff_t i, int single) {
    const ptrdiff_t size = single ? sizeof(float) : sizeof(double), outer = s->matrix_outer;
    const ptrdiff_t width = MVN_LANES == 8 ? 8 : 4;
    const char *at = s->matrix + item * outer + i * s->row;
    if (s->column == size) {
        for (ptrdiff_t j = 0; j <= i; j += width) {
            ptrdiff_t from = j + width <= n ? j : n - width;
            if (width == 8) mvn_oct(at + from * size, outer, row + from, single);
            else mvn_quad(at + from * size, outer, row + from, single);
        }
    } else {
        for (ptrdiff_t j = 0; j <= i; j++) row[j] = mvn_spread(at + j * s->column, outer, single);
    }
}

/* Rows i .. i + rows - 1 of a matrix. */
MVN_INLINE void mvn_lanes_rows(
    mvn_vec *a, const mvn_side *s, ptrdiff_t item, ptrdiff_t stride, ptrdiff_t n, ptrdiff_t i,
    const int rows, int single) {
    MVN_UNROLL for (int r = 0; r < rows; r++) {
        mvn_vec *row = a + r * stride;
        mvn_lanes_row(row + 1, s, item, n, i + r, single);
        for (ptrdiff_t j = i + r + 2; j <= ((i + rows) | 3); j++) row[j] = (mvn_vec){0};
    }
}

/* Asks for the same rows of the next group: processors do not foresee the way through triangles. */
MVN_INLINE void mvn_lanes_prefetch(
    const mvn_side *s, ptrdiff_t item, ptrdiff_t i, const int rows, int single) {
    const ptrdiff_t size = single ? sizeof(float) : sizeof(double);
    if (s->shared || s->column != size) return;
    for (int lane = 0; lane < MVN_LANES; lane++) {
        const char *row = s->matrix + (item + MVN_LANES + lane) * s->matrix_outer + i * s->row;
        MVN_UNROLL for (int r = 0; r < rows; r++, row += s->row) {
            for (ptrdiff_t at = 0; at <= (i + r) * size; at += 64) {
                __builtin_prefetch(row + at, 0, 2);
            }
        }
    }
}

/* Rows i .. i + rows - 1 of a covariance become those of its factor L, after the rows above; and
 * the reciprocals of the diagonal. */
MVN_INLINE void mvn_lanes_cholesky_rows(
    mvn_vec *a, mvn_vec *reciprocal, ptrdiff_t stride, ptrdiff_t i, const int rows) {
    mvn_vec *x = a + i * stride + 1, s[MVN_BLOCK][MVN_BLOCK];
    for (ptrdiff_t j = 0; j < i; j += MVN_TILE) {
        const mvn_vec *l = a + j * stride + 1;
        MVN_UNROLL for (int r = 0; r < rows; r++) {
            MVN_UNROLL for (int c = 0; c < MVN_TILE; c++) s[r][c] = x[r * stride + j + c];
        }
        for (ptrdiff_t k = 0; k < j; k++) {
            MVN_UNROLL for (int r = 0; r < rows; r++) {
                MVN_UNROLL for (int c = 0; c < MVN_TILE; c++) {
                    s[r][c] = mvn_less(s[r][c], x[r * stride + k], l[c * stride + k]);
                }
            }
        }
        MVN_UNROLL for (int r = 0; r < rows; r++) {
            MVN_UNROLL for (int c = 0; c < MVN_TILE; c++) {
                MVN_UNROLL for (int k = 0; k < c; k++) {
                    s[r][c] = mvn_less(s[r][c], s[r][k], l[c * stride + j + k]);
                }
                s[r][c] *= reciprocal[j + c];
                x[r * stride + j + c] = s[r][c];
            }
        }
    }
    MVN_UNROLL for (int r = 0; r < rows; r++) {
        MVN_UNROLL for (int c = 0; c <= r; c++) s[r][c] = x[r * stride + i + c];
    }
    for (ptrdiff_t k = 0; k < i; k++) {
        MVN_UNROLL for (int r = 0; r < rows; r++) {
            MVN_UNROLL for (int c = 0; c <= r; c++) {
                s[r][c] = mvn_less(s[r][c], x[r * stride + k], x[c * stride + k]);
            }
        }
    }
    mvn_lanes_pivots(s, reciprocal + i, rows);
    MVN_UNROLL for (int r = 0; r < rows; r++) {
        MVN_UNROLL for (int c = 0; c <= r; c++) x[r * stride + i + c] = s[r][c];
    }
}

/* Columns j .. j + TILE - 1 of rows i .. i + rows - 1 of [z | Y] = L_q^-1 ([mu_p | L_p] -
 * [mu_q | L_q]) by forward substitution, from the same rows `p` and `q`. Adds the squares of
 * columns to a sum each. */
MVN_INLINE void mvn_lanes_whiten_tile(
    const mvn_vec *p, const mvn_vec *q, const mvn_vec *reciprocal, mvn_vec *y, mvn_vec *total,
    ptrdiff_t stride, ptrdiff_t i, ptrdiff_t j, const int rows) {
    const mvn_vec *l = q + 1;
    mvn_vec sum[MVN_BLOCK][MVN_TILE];
    MVN_UNROLL for (int r = 0; r < rows; r++) {
        MVN_UNROLL for (int c = 0; c < MVN_TILE; c++) {
            sum[r][c] = p[r * stride + j + c] - q[r * stride + j + c];
        }
    }
    for (ptrdiff_t k = j > 0 ? j - 1 : 0; k < i; k++) {
        MVN_UNROLL for (int r = 0; r < rows; r++) {
            MVN_UNROLL for (int c = 0; c < MVN_TILE; c++) {
                sum[r][c] = mvn_less(sum[r][c], l[r * stride + k], y[k * stride + j + c]);
            }
        }
    }
    MVN_UNROLL for (int r = 0; r < rows; r++) {
        MVN_UNROLL for (int c = 0; c < MVN_TILE; c++) {
            MVN_UNROLL for (int k = 0; k < r; k++) {
                sum[r][c] = mvn_less(sum[r][c], l[r * stride + i + k], sum[k][c]);
            }
            sum[r][c] *= reciprocal[i + r];
            y[(i + r) * stride + j + c] = sum[r][c];
            total[c] = mvn_fma(sum[r][c], sum[r][c], total[c]);
        }
    }
}
/* Those rows, and their squares in four sums, of every fourth column each. */
MVN_INLINE void mvn_lanes_whiten_rows(
    const mvn_vec *p, const mvn_vec *q, const mvn_vec *reciprocal, mvn_vec *y, mvn_vec *total,
    ptrdiff_t stride, ptrdiff_t i, const int rows) {
    for (ptrdiff_t j = 0; j <= i + rows; j += 4) {
        MVN_UNROLL for (int c = 0; c < 4; c += MVN_TILE) {
            mvn_lanes_whiten_tile(p, q, reciprocal, y, total + c, stride, i, j + c, rows);
        }
    }
}

/* The same squares for q = N(0, I), where [z | Y] is [mu_p | L_p - I]. */
MVN_INLINE void mvn_lanes_standard_rows(
    const mvn_vec *p, mvn_vec *total, ptrdiff_t stride, ptrdiff_t i, const int rows) {
    for (ptrdiff_t j = 0; j <= i + rows; j += 4) {
        MVN_UNROLL for (int r = 0; r < rows; r++) {
            MVN_UNROLL for (int c = 0; c < 4; c++) {
                mvn_vec x = p[r * stride + j + c];
                if (j + c == i + r + 1) x -= 1.0;
                total[c] = mvn_fma(x, x, total[c]);
            }
        }
    }
}

/* 1/2 squares + sum_i (t_i - log1p(t_i)) by `mvn_terms`, NaN where other formulas may know more:
 * t = Y_ii, x = L_p,ii, reciprocal = 1 / L_q,ii. */
MVN_INLINE mvn_vec mvn_lanes_sum(
    const mvn_vec *t, const mvn_vec *x, const mvn_vec *reciprocal, mvn_vec squares, ptrdiff_t n) {
    mvn_vec sum = 0.5 * squares;
    mvn_bits bad = {0};
    for (ptrdiff_t i = 0; i < n; i += 4) {
        mvn_vec some[4] = {{0}}, u[4] = {mvn_ones(), mvn_ones(), mvn_ones(), mvn_ones()};
        for (ptrdiff_t k = 0; k < 4 && i + k < n; k++) {
            some[k] = t[i + k];
            u[k] = x[i + k] * reciprocal[i + k];
            bad |= (mvn_bits)x[i + k] | (mvn_bits)reciprocal[i + k];
        }
        mvn_terms terms = mvn_terms_of(some, u, 4);
        sum += mvn_minus_log(&terms, &bad);
    }
    return (mvn_vec)((mvn_bits)sum | (bad < 0)); /* all bits set: NaN */
}

/* A group: LANES items from `item` on; q is NULL for N(0, I). Not to be loaded: what was before. */
typedef struct {
    const mvn_side *p, *q;
    ptrdiff_t item, n, stride;
    int load_p, load_q;
    mvn_vec *a, *b, *y, *reciprocal; /* [mu | L] of both sides, [z | Y] and 1 / L_q,ii */
} mvn_lanes;

/* Rows i .. i + rows - 1 of [mu | L] of a side, of factors that are needed once into the place of
 * the rows before. */
MVN_INLINE mvn_vec *mvn_lanes_factor_rows(
    const mvn_lanes *g, const mvn_side *s, mvn_vec *factor, const mvn_vec *loc,
    mvn_vec *reciprocal, int load, ptrdiff_t i, const int rows, int single) {
    mvn_vec *at = factor + (mvn_by_rows(s) ? 0 : i * g->stride);
    if (load) {
        mvn_lanes_rows(at, s, g->item, g->stride, g->n, i, rows, single);
        if (s->covariance) mvn_lanes_cholesky_rows(factor, reciprocal, g->stride, i, rows);
    }
    MVN_UNROLL for (int r = 0; r < rows; r++) at[r * g->stride] = loc[i + r];
    mvn_lanes_prefetch(s, g->item, i, rows, single);
    return at;
}

typedef struct {
    mvn_vec loc_p[MVN_LANES_LIMIT], loc_q[MVN_LANES_LIMIT];
    mvn_vec diagonal[MVN_LANES_LIMIT], unused[MVN_LANES_LIMIT]; /* L_p,ii; 1 / L_p,ii */
    mvn_vec t[MVN_LANES_LIMIT], total[4];                       /* Y_ii */
} mvn_lanes_sums;

MVN_INLINE void mvn_lanes_step(
    const mvn_lanes *g, mvn_lanes_sums *sums, ptrdiff_t i, const int rows, int single) {
    const ptrdiff_t stride = g->stride;
    const mvn_vec *p = mvn_lanes_factor_rows(
        g, g->p, g->a, sums->loc_p, sums->unused, g->load_p, i, rows, single);
    MVN_UNROLL for (int r = 0; r < rows; r++) sums->diagonal[i + r] = p[r * stride + i + r + 1];
    if (g->q) {
        const mvn_vec *q = mvn_lanes_factor_rows(
            g, g->q, g->b, sums->loc_q, g->reciprocal, g->load_q, i, rows, single);
        MVN_UNROLL for (int r = 0; r < rows && !g->q->covariance; r++) {
            g->reciprocal[i + r] = 1.0 / q[r * stride + i + r + 1];
        }
        mvn_lanes_whiten_rows(p, q, g->reciprocal, g->y, sums->total, stride, i, rows);
        MVN_UNROLL for (int r = 0; r < rows; r++) {
            sums->t[i + r] = g->y[(i + r) * stride + i + r + 1];
        }
    } else {
        mvn_lanes_standard_rows(p, sums->total, stride, i, rows);
        MVN_UNROLL for (int r = 0; r < rows; r++) sums->t[i + r] = sums->diagonal[i + r] - 1.0;
    }
}

/* The divergences of a group. */
MVN_INLINE void mvn_lanes_divergences(const mvn_lanes *g, double *kl, int single) {
    mvn_lanes_sums sums;
    mvn_vec *total = sums.total;
    ptrdiff_t i = 0;
    memset(total, 0, sizeof sums.total);
    mvn_lanes_loc(sums.loc_p, g->p, g->item, g->n, single);
    if (g->q) mvn_lanes_loc(sums.loc_q, g->q, g->item, g->n, single);
    for (; i + MVN_BLOCK <= g->n; i += MVN_BLOCK) mvn_lanes_step(g, &sums, i, MVN_BLOCK, single);
    switch (g->n - i) {
    case 1: mvn_lanes_step(g, &sums, i, 1, single); break;
    case 2: mvn_lanes_step(g, &sums, i, 2, single); break;
    case 3: mvn_lanes_step(g, &sums, i, 3, single); break;
    }
    *(mvn_loose *)kl = mvn_lanes_sum(sums.t, sums.diagonal, g->reciprocal,
                                     (total[0] + total[1]) + (total[2] + total[3]), g->n);
}
static inline void mvn_lanes_divergences_f32(const mvn_lanes *g, double *kl) {
    mvn_lanes_divergences(g, kl, 1);
}
static inline void mvn_lanes_divergences_f64(const mvn_lanes *g, double *kl) {
    mvn_lanes_divergences(g, kl, 0);
}

/* ---- panels ---------------------------------------------------------------------------------- */

/* One matrix at a time. A factor L lies in memory row after row, `stride` elements apart. The solve
 * takes Y^T = (L_p - L_q)^T L_q^-T in panels of ROWS rows, each stored by columns: vectors run
 * along a row of L_p - L_q as it lies in memory, and elements of L_q are broadcast. The first panel
 * ends with mu_p - mu_q and begins with columns of L_p - L_q; the others hold ROWS columns each.
 * Columns are solved COLUMNS at a time; in place of missing rows of L stand `zeros`. */

MVN_INLINE ptrdiff_t mvn_least(ptrdiff_t x, ptrdiff_t y) { return x < y ? x : y; }
MVN_INLINE ptrdiff_t mvn_most(ptrdiff_t x, ptrdiff_t y) { return x > y ? x : y; }

/* z - x y for all lanes and one y. */
MVN_INLINE mvn_vec mvn_less_f64(mvn_vec z, mvn_vec x, double y) {
#define MVN_Y(lane) y
    return mvn_less(z, x, (mvn_vec)MVN_EVERY(MVN_Y));
#undef MVN_Y
}
typedef float mvn_floats __attribute__((vector_size(8 * MVN_LANES), may_alias));
MVN_INLINE mvn_floats mvn_less_f32(mvn_floats z, mvn_floats x, float y) { return z - x * y; }

#define PANEL(name) mvn_##name##_f64
#define PANEL_REAL double
#define PANEL_BITS int64_t
#define PANEL_SHARE 1
#define PANEL_LANES MVN_LANES
#define PANEL_EXTRA 1
#include "mvn_panels.h"

#define PANEL(name) mvn_##name##_f32
#define PANEL_REAL float
#define PANEL_BITS int32_t
#define PANEL_SHARE 2
#define PANEL_LANES (2 * MVN_LANES)
#define PANEL_EXTRA 2
#include "mvn_panels.h"

/* The probe of a float32 solve: L times signs, +1 and -1, which the solve should find again. What
 * it finds instead shows how L magnifies rounding errors. */
MVN_INLINE float mvn_sign(ptrdiff_t i) {
    return (float)(int)(((UINT64_C(0x9e3779b97f4a7c15) >> (i % 64)) & 1) * 2) - 1.0f;
}
static inline void mvn_probe(
    const float *l, ptrdiff_t stride, ptrdiff_t n, float *signs, float *probe) {
    for (ptrdiff_t i = 0; i < n; i++) signs[i] = mvn_sign(i);
    for (ptrdiff_t i = 0; i < n; i++) {
        const float *row = l + i * stride;
        mvn_vec_f32 sums = {0};
        double sum = 0.0;
        ptrdiff_t j = 0;
        for (; j + 2 * MVN_LANES <= i + 1; j += 2 * MVN_LANES) {
            sums += *(const mvn_loose_f32 *)(row + j) * *(const mvn_loose_f32 *)(signs + j);
        }
        for (; j <= i; j++) sum += row[j] * signs[j];
        for (int lane = 0; lane < 2 * MVN_LANES; lane++) sum += sums[lane];
        probe[i] = (float)sum;
    }
}

/* The mean square of what the probe in the first panel misses by. */
static inline double mvn_probe_error(const float *x, const float *signs, ptrdiff_t n) {
    const ptrdiff_t rows = 2 * MVN_ROWS;
    double sum = 0.0;
    for (ptrdiff_t k = 0; k < n; k++) {
        double error = (double)x[k * rows + rows - 2] - signs[k];
        sum += error * error;
    }
    return sum / (double)n;
}

/* The diagonal block of the panel of a covariance that begins at row i, when all to its left is
 * done. */
static inline void mvn_panel_factor(double *x, double *reciprocal, ptrdiff_t i) {
    mvn_vec *column = (mvn_vec *)x;
    MVN_UNROLL for (int block = 0; block < MVN_ROWS; block += MVN_COLUMNS) {
        ptrdiff_t j = i + block;
        double s[MVN_COLUMNS][MVN_COLUMNS];
        mvn_tile_f64 tile;
        MVN_UNROLL for (int c = 0; c < MVN_COLUMNS; c++) {
            MVN_UNROLL for (int v = 0; v < MVN_VECTORS; v++) {
                tile.sum[c][v] = column[(j + c) * MVN_VECTORS + v];
            }
        }
        for (ptrdiff_t k = 0; k < j; k++) {
            MVN_UNROLL for (int c = 0; c < MVN_COLUMNS; c++) {
                MVN_UNROLL for (int v = 0; v < MVN_VECTORS; v++) {
                    tile.sum[c][v] = mvn_less_f64(tile.sum[c][v], column[k * MVN_VECTORS + v],
                                                  x[k * MVN_ROWS + block + c]);
                }
            }
        }
        MVN_UNROLL for (int r = 0; r < MVN_COLUMNS; r++) {
            int row = block + r;
            MVN_UNROLL for (int c = 0; c <= r; c++) {
                s[r][c] = tile.sum[c][row / MVN_LANES][row % MVN_LANES];
            }
        }
        mvn_pivots(s, reciprocal + j, MVN_COLUMNS);
        MVN_UNROLL for (int c = 0; c < MVN_COLUMNS; c++) {
            MVN_UNROLL for (int v = 0; v < MVN_VECTORS; v++) {
                MVN_UNROLL for (int k = 0; k < c; k++) {
                    tile.sum[c][v] = mvn_less_f64(tile.sum[c][v], tile.sum[k][v], s[c][k]);
                }
                tile.sum[c][v] *= reciprocal[j + c];
                column[(j + c) * MVN_VECTORS + v] = tile.sum[c][v];
            }
            MVN_UNROLL for (int r = c; r < MVN_COLUMNS; r++) {
                x[(j + c) * MVN_ROWS + block + r] = s[r][c];
            }
        }
    }
}

/* Columns 0 .. count - 1 of ROWS rows, which begin at `at` and have their elements `step` bytes
 * apart, as a panel. */
#define MVN_PANEL_LOAD(real) \
    for (ptrdiff_t k = 0; k < count; k++) { \
        MVN_UNROLL for (int v = 0; v < MVN_VECTORS; v++) { \
            char *const *row = at + v * MVN_LANES; \
            ((mvn_vec *)x)[k * MVN_VECTORS + v] = mvn_gather_##real(row, k * step); \
        } \
    }
static inline void mvn_panel_load_f32(
    double *x, char *const *at, ptrdiff_t step, ptrdiff_t count) { MVN_PANEL_LOAD(f32) }
static inline void mvn_panel_load_f64(
    double *x, char *const *at, ptrdiff_t step, ptrdiff_t count) { MVN_PANEL_LOAD(f64) }

/* `count` elements `step` bytes apart as numbers side by side. */
#define MVN_LINE_READ(name, element, number) \
    static inline void mvn_line_read_##name( \
        number *restrict line, const char *start, ptrdiff_t step, ptrdiff_t count) { \
        if (step == (ptrdiff_t)sizeof(element)) { \
            for (ptrdiff_t j = 0; j < count; j++) line[j] = ((const element *)start)[j]; \
        } else { \
            for (ptrdiff_t j = 0; j < count; j++) line[j] = *(const element *)(start + j * step); \
        } \
    }
MVN_LINE_READ(f32, float, double)
MVN_LINE_READ(f64, double, double)
MVN_LINE_READ(single, float, float)

/* Columns first .. last - 1 of a panel back to rows, `stride` apart; multiples of COLUMNS. */
static inline void mvn_panel_store(
    const double *x, double *rows, ptrdiff_t stride, ptrdiff_t first, ptrdiff_t last) {
    for (ptrdiff_t k = first; k < last; k += MVN_COLUMNS) {
        const double *block = x + k * MVN_ROWS;
        for (int r = 0; r < MVN_ROWS; r++) {
            double *row = rows + r * stride + k;
            MVN_UNROLL for (int c = 0; c < MVN_COLUMNS; c++) row[c] = block[c * MVN_ROWS + r];
        }
    }
}

/* Column j of row k of [z | Y] in the panels, `size` apart. */
MVN_INLINE double mvn_panels_element(const double *x, ptrdiff_t size, ptrdiff_t k, ptrdiff_t j) {
    if (j < MVN_ROWS) return x[k * MVN_ROWS + (j > 0 ? j - 1 : MVN_ROWS - 1)];
    return x[j / MVN_ROWS * size + k * MVN_ROWS + j % MVN_ROWS];
}

/* |z|^2 + |Y|^2 of one item in the order, and with the roundings, of `mvn_lanes_whiten_rows`;
 * without panels, those of [mu_p | L_p - I]. */
static inline double mvn_squares_in_tiles(
    const double *x, ptrdiff_t size, const double *p, ptrdiff_t stride, const double *shift,
    ptrdiff_t n) {
    double total[4] = {0};
    for (ptrdiff_t i = 0; i < n; i += MVN_BLOCK) {
        const ptrdiff_t end = mvn_least(i + MVN_BLOCK, n);
        for (ptrdiff_t j = 0; j <= end; j += 4) {
            for (ptrdiff_t k = mvn_most(i, j - 1); k < end; k++) {
                MVN_UNROLL for (int c = 0; c < 4; c++) {
                    const ptrdiff_t at = j + c;
                    if (at > k + 1) break;
                    double y = x ? mvn_panels_element(x, size, k, at)
                        : at == 0 ? shift[k] : p[k * stride + at - 1] - (at == k + 1);
                    total[c] = mvn_number_less(total[c], -y, y);
                }
            }
        }
    }
    return (total[0] + total[1]) + (total[2] + total[3]);
}

/* `mvn_lanes_sum` of one item: four of its terms in a lane. */
static inline double mvn_sum_as_lanes(
    const double *t, const double *x, const double *reciprocal, double squares, ptrdiff_t n) {
    double kl = 0.5 * squares;
    for (ptrdiff_t begin = 0; begin < n; begin += 4 * MVN_LANES) {
        mvn_vec some[4] = {{0}}, u[4] = {mvn_ones(), mvn_ones(), mvn_ones(), mvn_ones()}, logs;
        mvn_bits bad = {0};
        for (ptrdiff_t i = begin; i < mvn_least(begin + 4 * MVN_LANES, n); i++) {
            const ptrdiff_t lane = (i - begin) / 4;
            some[i % 4][lane] = t[i];
            u[i % 4][lane] = x[i] * reciprocal[i];
            if (!(x[i] > 0.0 && reciprocal[i] > 0.0)) return NAN;
        }
        mvn_terms terms = mvn_terms_of(some, u, 4);
        logs = mvn_minus_log(&terms, &bad);
        for (ptrdiff_t lane = 0; begin + 4 * lane < n && lane < MVN_LANES; lane++) {
            if (bad[lane] < 0) return NAN;
            kl += logs[lane];
        }
    }
    return kl;
}

/* For q = N(0, I), where Y = L_p - I: |Y|^2 + |mu_p|^2. */
static inline double mvn_whiten_standard(
    const double *p, ptrdiff_t stride, const double *shift, ptrdiff_t n) {
    mvn_vec sum = {0};
    double rest = 0.0;
    for (ptrdiff_t i = 0; i < n; i++) {
        const double *row = p + i * stride;
        ptrdiff_t j = 0;
        for (; j + MVN_LANES <= i; j += MVN_LANES) {
            mvn_vec x = *(const mvn_loose *)(row + j);
            sum += x * x;
        }
        for (; j < i; j++) rest += row[j] * row[j];
        double t = row[i] - 1.0;
        rest += t * t + shift[i] * shift[i];
    }
    for (int lane = 0; lane < MVN_LANES; lane++) rest += sum[lane];
    return rest;
}

/* The diagonal of L. */
static inline void mvn_diagonal(
    const double *l, ptrdiff_t stride, ptrdiff_t n, double *diagonal) {
    for (ptrdiff_t i = 0; i < n; i++) diagonal[i] = l[i * (stride + 1)];
}

static inline void mvn_reciprocals(const double *y, double *inverse, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i++) inverse[i] = mvn_reciprocal(y[i]);
}

/* Asks for the lower triangle's rows first .. last - 1, `row` bytes apart, of elements of `size`
 * bytes: processors do not foresee the way through a triangle. */
static inline void mvn_prefetch(
    const char *matrix, ptrdiff_t row, ptrdiff_t size, ptrdiff_t first, ptrdiff_t last) {
    for (ptrdiff_t i = first; i < last; i++) {
        const char *begin = matrix + i * row;
        for (ptrdiff_t at = 0; at <= i * size; at += 64) __builtin_prefetch(begin + at, 0, 2);
    }
}

/* 1/2 squares + sum_i (t_i - log1p(t_i)); x = L_p,ii, y = L_q,ii. Overwrites t. */
static inline double mvn_divergence(
    const double *x, const double *y, double *t, double squares, ptrdiff_t n) {
    double kl = 0.5 * squares;
    mvn_minus_log1p_each(x, y, t, n);
    for (ptrdiff_t i = 0; i < n; i++) kl += t[i];
    return kl;
}

#endif
