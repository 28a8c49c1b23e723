/* One-lane mathematics, branch-free, so that compilers vectorise the loops around it.
 *
 * Every function comes as name_f32 and name_f64. Products and sums are written a * b + c and the
 * compiler contracts them to fused multiply-adds where the processor has them; residual_product,
 * and plus_product in float, need the single rounding and get it by other means where it has not.
 * Coefficients: tools/polynomials.py.
 */
#ifndef KLFAST_VECMATH_H
#define KLFAST_VECMATH_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

static inline uint32_t bits_f32(float x) { uint32_t u; memcpy(&u, &x, sizeof u); return u; }
static inline uint64_t bits_f64(double x) { uint64_t u; memcpy(&u, &x, sizeof u); return u; }
static inline float from_bits_f32(uint32_t u) { float x; memcpy(&x, &u, sizeof x); return x; }
static inline double from_bits_f64(uint64_t u) { double x; memcpy(&x, &u, sizeof x); return x; }

/* Adding this, 1.5 * 2^(digits - 1) and the bias of the exponent, rounds x, |x| < 2^21 or 2^50, to
 * the nearest integer n and leaves n + bias, the exponent field of 2^n, in the low bits. */
#define MAGIC_F32 (0x1.8p23f + 127)
#define MAGIC_F64 (0x1.8p52 + 1023)

/* 2^n from n + MAGIC, n in [-126, 127] (f32), [-1022, 1023] (f64). Exact. */
static inline float pow2_shifted_f32(float shifted) {
    return from_bits_f32(bits_f32(shifted) << 23);
}
static inline double pow2_shifted_f64(double shifted) {
    return from_bits_f64(bits_f64(shifted) << 52);
}

static inline double pow2_f64(double n) { return pow2_shifted_f64(n + MAGIC_F64); }

/* r - n*ln(2) for integral n = nearest(r / ln 2): ln 2 in two parts, the first short enough that
 * n * LN2_HIGH is exact for |n| < 2^8 (f32), 2^11 (f64). */
#define LOG2_E 1.4426950408889634
#define LN2_HIGH_F32 0x1.62ep-1f
#define LN2_LOW_F32 0x1.0bfbe8p-15f
#define LN2_HIGH_F64 0x1.62e42fefap-1
#define LN2_LOW_F64 0x1.cf79abc9e3b3ap-40

static inline float reduce_f32(float x, float n) {
    return (x - n * LN2_HIGH_F32) - n * LN2_LOW_F32;
}
static inline double reduce_f64(double x, double n) {
    return (x - n * LN2_HIGH_F64) - n * LN2_LOW_F64;
}

/* e^(x + rest), |rest| <= ulp(x); x in [-87, 88] (f32), [-708, 709] (f64). 1 ulp. NaN stays. */
static inline float exp_f32(float x, float rest) {
    float shifted = x * (float)LOG2_E + MAGIC_F32, n = shifted - MAGIC_F32;
    float r = reduce_f32(x, n) + rest, power = pow2_shifted_f32(shifted);
    float q = 1.3926181810489343e-3f;
    q = q * r + 8.363177629994445e-3f;
    q = q * r + 4.1666554627878084e-2f;
    q = q * r + 1.6666576998242924e-1f;
    q = q * r + 0.5f;
    return ((r * r) * q + r) * power + power;
}
static inline double exp_f64(double x, double rest) {
    double shifted = x * LOG2_E + MAGIC_F64, n = shifted - MAGIC_F64;
    double r = reduce_f64(x, n) + rest, power = pow2_shifted_f64(shifted);
    double q = 2.510038319586702e-08;
    q = q * r + 2.7620085455018414e-07;
    q = q * r + 2.7557268464831627e-06;
    q = q * r + 2.4801521302241082e-05;
    q = q * r + 1.9841269863050506e-4;
    q = q * r + 1.388888891720967e-3;
    q = q * r + 8.333333333330063e-3;
    q = q * r + 4.1666666666624136e-2;
    q = q * r + 0.16666666666666669;
    q = q * r + 0.5000000000000001;
    return ((r * r) * q + r) * power + power;
}

/* phi(r) = e^r - 1 - r for |r| <= ln(2)/2 = 0.3465. 2 ulp. */
static inline float phi_near_f32(float r) {
    float q = 1.9890988455544567e-4f;
    q = q * r + 1.3933647862928863e-3f;
    q = q * r + 8.333310927615311e-3f;
    q = q * r + 4.1666464944505696e-2f;
    q = q * r + 1.6666666681621095e-1f;
    q = q * r + 0.5000000013463886f;
    return (r * r) * q;
}
static inline double phi_near_f64(double r) {
    double q = 2.0914685161418067e-09;
    q = q * r + 2.5105214474751413e-08;
    q = q * r + 2.7557273647451087e-07;
    q = q * r + 2.7557255406285044e-06;
    q = q * r + 2.480158732554432e-05;
    q = q * r + 1.9841269874815834e-4;
    q = q * r + 1.388888888888375e-3;
    q = q * r + 8.333333333326136e-3;
    q = q * r + 4.166666666666667e-2;
    q = q * r + 0.1666666666666667;
    q = q * r + 0.5;
    return (r * r) * q;
}

/* phi(x + rest) >= 0, without cancellation, same ranges as exp; 4 ulp. With x = n ln 2 + r,
 *     phi(x) = 2^n phi(r) + (2^n - 1) r + ((2^n - 1) - n ln 2),
 * where the last bracket is phi(n ln 2) >= 0; for n = 0 this is phi(r) alone. */
static inline float phi_f32(float x, float rest) {
    float shifted = x * (float)LOG2_E + MAGIC_F32, n = shifted - MAGIC_F32;
    float r = reduce_f32(x, n) + rest;
    float grown = pow2_shifted_f32(shifted) - 1.0f;
    float near = phi_near_f32(r);
    float far = (grown - n * LN2_HIGH_F32) - n * LN2_LOW_F32;
    return near + (grown * (near + r) + far);
}
static inline double phi_f64(double x, double rest) {
    double shifted = x * LOG2_E + MAGIC_F64, n = shifted - MAGIC_F64;
    double r = reduce_f64(x, n) + rest;
    double grown = pow2_shifted_f64(shifted) - 1.0;
    double near = phi_near_f64(r);
    double far = (grown - n * LN2_HIGH_F64) - n * LN2_LOW_F64;
    return near + (grown * (near + r) + far);
}

/* e^(x + rest) - 1, same ranges as exp; 2 ulp: with x = n ln 2 + r,  2^n (e^r - 1) + (2^n - 1). */
static inline float expm1_f32(float x, float rest) {
    float shifted = x * (float)LOG2_E + MAGIC_F32, n = shifted - MAGIC_F32;
    float r = reduce_f32(x, n) + rest, power = pow2_shifted_f32(shifted);
    return power * (phi_near_f32(r) + r) + (power - 1.0f);
}
static inline double expm1_f64(double x, double rest) {
    double shifted = x * LOG2_E + MAGIC_F64, n = shifted - MAGIC_F64;
    double r = reduce_f64(x, n) + rest, power = pow2_shifted_f64(shifted);
    return power * (phi_near_f64(r) + r) + (power - 1.0);
}

/* phi(x) and, in `grown`, e^x - 1, same ranges, with the shortest chain of steps; 4 ulp. In float,
 * where there are fused multiply-adds, ln 2 counts in one part: n times what that lacks is 2.4e-7
 * at most. */
static inline float phi_and_expm1_f32(float x, float *grown) {
    float shifted = x * (float)LOG2_E + MAGIC_F32, n = shifted - MAGIC_F32;
    float power = pow2_shifted_f32(shifted), step = power - 1.0f;
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    float r = fmaf(-n, 0x1.62e43p-1f, x), far = fmaf(-n, 0x1.62e43p-1f, step);
#else
    float r = reduce_f32(x, n), far = (step - n * LN2_HIGH_F32) - n * LN2_LOW_F32;
#endif
    float square = r * r;
    float q = (1.9890988455544567e-4f * r + 1.3933647862928863e-3f) * square
              + (8.333310927615311e-3f * r + 4.1666464944505696e-2f);
    q = q * square + (1.6666666681621095e-1f * r + 0.5000000013463886f);
    float linear = q * square + r;
    *grown = power * linear + step;
    return q * square + (step * linear + far);
}
static inline double phi_and_expm1_f64(double x, double *grown) {
    *grown = expm1_f64(x, 0);
    return phi_f64(x, 0);
}

/* The integer e for which x / (y * 2^e) lies in [2^-0.59, 2^0.59], as bits to add to those of a
 * number: the bits of a positive number, read as an integer, are its logarithm to 0.09.
 * x, y positive and normal. */
static inline uint32_t ratio_bits_f32(float x, float y) {
    return (bits_f32(x) - bits_f32(y) + 0x400000u) & 0xff800000u;
}
static inline uint64_t ratio_bits_f64(double x, double y) {
    return (bits_f64(x) - bits_f64(y) + ((uint64_t)1 << 51)) & ((uint64_t)0xfff << 52);
}

/* e as a floating-point number, in the unit that costs least, and ln 2 in it. */
#define EXPONENT_UNIT_F32 0x1p23f
static inline float ratio_units_f32(float x, float y) {
    return (float)(int32_t)ratio_bits_f32(x, y);
}
#if defined(__AVX512DQ__)
#define EXPONENT_UNIT_F64 0x1p52
static inline double ratio_units_f64(double x, double y) {
    return (double)(int64_t)ratio_bits_f64(x, y);
}
#else
#define EXPONENT_UNIT_F64 1.0
static inline double ratio_units_f64(double x, double y) {
    /* shifted into the mantissa of 2^52: AVX2 converts no 64-bit integer and shifts none by sign */
    uint64_t biased = bits_f64(x) - bits_f64(y) + ((uint64_t)1 << 63) + ((uint64_t)1 << 51);
    return from_bits_f64((biased >> 52) | ((uint64_t)0x433 << 52)) - (0x1p52 + 2048.0);
}
#endif
static inline double ratio_exponent_f64(double x, double y) {
    return ratio_units_f64(x, y) * (1 / EXPONENT_UNIT_F64);
}
#define UNIT_LN2_F32 (0x1.62e43p-1f / EXPONENT_UNIT_F32)
#define UNIT_LN2_F64 (0x1.62e42fefa39efp-1 / EXPONENT_UNIT_F64)

/* n * 2^e. Exact; n and the result positive and normal. */
static inline float times_power_f32(float n, float x, float y) {
    return from_bits_f32(bits_f32(n) + ratio_bits_f32(x, y));
}
static inline double times_power_f64(double n, double x, double y) {
    return from_bits_f64(bits_f64(n) + ratio_bits_f64(x, y));
}

/* The larger one, for low > 0, as the integers that the bits are: of two floats whose bits are
 * wanted next, GCC makes a comparison and a blend. What has its sign bit set gives low. */
static inline float at_least_f32(float low, float x) {
    int32_t a = (int32_t)bits_f32(low), b = (int32_t)bits_f32(x);
    return from_bits_f32((uint32_t)(a > b ? a : b));
}
static inline double at_least_f64(double low, double x) {
    int64_t a = (int64_t)bits_f64(low), b = (int64_t)bits_f64(x);
    return from_bits_f64((uint64_t)(a > b ? a : b));
}

/* 2 atanh(s) - 2 s, |s| <= 0.2007. 7e-7 (f32) and 4.3e-15 (f64), which is added to at least 10
 * times as much. */
static inline float atanh_tail_f32(float s) {
    float u = s * s;
    float t = 0.2996638361610413f;
    t = t * u + 0.39978694029211753f;
    t = t * u + 0.6666671445606002f;
    return t * (u * s);
}
#define ATANH_TAIL_F64(name, real)                                                               \
    static inline real name(real s) {                                                            \
        real u = s * s;                                                                          \
        real t = u * 0.15128105194085276 + 0.1528264135965732;                                   \
        t = t * u + 0.18184653881551602;                                                         \
        t = t * u + 0.2222218195907249;                                                          \
        t = t * u + 0.28571428842882585;                                                         \
        t = t * u + 0.39999999999314984;                                                         \
        t = t * u + 0.6666666666666695;                                                          \
        return t * (u * s);                                                                      \
    }
ATANH_TAIL_F64(atanh_tail_f64, double)

/* c + a*b, in float rounded once. */
static inline float plus_product_f32(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return fmaf(a, b, c);
#else
    return (float)((double)c + (double)a * (double)b);
#endif
}
static inline double plus_product_f64(double a, double b, double c) { return a * b + c; }

/* c - a*b rounded once. fma() is a library call where the processor has none: there, double for
 * float, and for double an error-free product. */
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
static inline float residual_product_f32(float a, float b, float c) { return fmaf(-a, b, c); }
static inline double residual_product_f64(double a, double b, double c) { return fma(-a, b, c); }
#else
static inline float residual_product_f32(float a, float b, float c) {
    return (float)((double)c - (double)a * (double)b);
}
static inline double residual_product_f64(double a, double b, double c) {
    /* Dekker: a*b = product + error exactly, while |a|, |b| < 2^990 and nothing underflows. */
    double p = a * b, ta = a * 134217729.0, tb = b * 134217729.0;
    double ah = ta - (ta - a), al = a - ah, bh = tb - (tb - b), bl = b - bh;
    double error = ((ah * bh - p) + ah * bl + al * bh) + al * bl;
    return (c - p) - error;
}
#endif

/* (r + r_low)(high + *low) + (c + c_low) in two parts: returns the first, *low gets the other. */
static inline double pair_step(double r, double r_low, double high, double *low, double c,
                               double c_low) {
    double product = r * high;
    double product_low = (r * *low + r_low * high) - residual_product_f64(r, high, product);
    double total = c + product, added = total - c;
    *low = ((c - (total - added)) + (product - added)) + (c_low + product_low);
    return total;
}

/* e^x and, in `rest`, what its rounding left out: together right to 1e-22 of e^x. x in [-708, 709].
 * ln 2 in three parts, the first two short enough that n times them is exact; the series in pairs
 * up to r^6/6!, in doubles up to r^17/17!. */
static inline double exp_pair_f64(double x, double *rest) {
    double shifted = x * LOG2_E + MAGIC_F64, n = shifted - MAGIC_F64;
    double power = pow2_shifted_f64(shifted);
    double high = x - n * 0x1.62e42fefa2p-1, middle = n * 0x1.9ef35793c6p-41;
    double r = high - middle, back = r - high;
    double r_low = ((high - (r - back)) - (middle + back)) - n * 0x1.673007e5ed5e8p-81;
    double t = 2.8114572543455206e-15;
    t = t * r + 4.779477332387385e-14;
    t = t * r + 7.647163731819816e-13;
    t = t * r + 1.1470745597729725e-11;
    t = t * r + 1.6059043836821613e-10;
    t = t * r + 2.08767569878681e-09;
    t = t * r + 2.505210838544172e-08;
    t = t * r + 2.755731922398589e-07;
    t = t * r + 2.7557319223985893e-06;
    t = t * r + 2.48015873015873e-05;
    t = t * r + 0.0001984126984126984;
    double low = 0;
    t = pair_step(r, r_low, t, &low, 0x1.6c16c16c16c17p-10, -0x1.f49f49f49f49fp-65);
    t = pair_step(r, r_low, t, &low, 0x1.1111111111111p-7, 0x1.1111111111111p-63);
    t = pair_step(r, r_low, t, &low, 0x1.5555555555555p-5, 0x1.5555555555555p-59);
    t = pair_step(r, r_low, t, &low, 0x1.5555555555555p-3, 0x1.5555555555555p-57);
    t = pair_step(r, r_low, t, &low, 0.5, 0);
    t = pair_step(r, r_low, t, &low, 1, 0);
    t = pair_step(r, r_low, t, &low, 1, 0);
    *rest = low * power;
    return t * power;
}

/* IEEE binary16 and bfloat16, given as their bits. Exact. */
static inline float from_float16(uint16_t h) {
    uint32_t magnitude = (uint32_t)(h & 0x7fffu) << 13;
    float x = from_bits_f32(magnitude) * 0x1p112f;
    uint32_t special = x >= 0x1p16f ? 0x7f800000u : 0u; /* infinity or NaN */
    return from_bits_f32(bits_f32(x) | special | (uint32_t)(h & 0x8000u) << 16);
}
static inline float from_bfloat16(uint16_t b) { return from_bits_f32((uint32_t)b << 16); }

/* n of them into floats. Those 4 KB on are asked for meanwhile: 6 % off long rows from memory. */
#if defined(__AVX512F__)
static inline void ask_for_halves(const uint16_t *h) {
    _mm_prefetch((const char *)h + 4096, _MM_HINT_T0);
}
#endif
static inline void floats_from_float16(const uint16_t *h, ptrdiff_t n, float *into) {
    ptrdiff_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= n; i += 16) {
        ask_for_halves(h + i);
        _mm512_storeu_ps(into + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(h + i))));
    }
#endif
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(into + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(h + i))));
#endif
    for (; i < n; i++)
        into[i] = from_float16(h[i]);
}
static inline void floats_from_bfloat16(const uint16_t *b, ptrdiff_t n, float *into) {
    ptrdiff_t i = 0;
#if defined(__AVX512F__) /* GCC would load 32 at a time, and extract half */
    for (; i + 16 <= n; i += 16) {
        ask_for_halves(b + i);
        __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(b + i)));
        _mm512_storeu_si512(into + i, _mm512_slli_epi32(wide, 16));
    }
#endif
    for (; i < n; i++)
        into[i] = from_bfloat16(b[i]);
}

#endif
