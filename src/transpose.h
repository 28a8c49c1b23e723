/* LANES rows of n elements, `outer` elements apart, into n columns of LANES elements: blocks of 4 by 4
 * in vectors, the last one overlapping the one before. */
#ifndef KLFAST_TRANSPOSE_H
#define KLFAST_TRANSPOSE_H

#include <stddef.h>
#include <string.h>

#if defined(__GNUC__) || defined(__clang__)

#define KLFAST_TRANSPOSE(name, real, integer, size)                                              \
    typedef real vec4_##name __attribute__((vector_size(size)));                                 \
    typedef integer mask4_##name __attribute__((vector_size(size)));                             \
    static inline void transpose4_##name(const real *x, ptrdiff_t outer, ptrdiff_t lanes, real *into) { \
        vec4_##name a, b, c, d, ab, cd, ab_high, cd_high;                                         \
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
    }                                                                                            \
    static inline void transpose_##name(                                                         \
        const real *x, ptrdiff_t outer, ptrdiff_t n, ptrdiff_t lanes, real *into) {              \
        for (ptrdiff_t i = 0; n >= 4 && i < n; i += 4) {                                         \
            ptrdiff_t at = i < n - 4 ? i : n - 4;                                                \
            for (ptrdiff_t lane = 0; lane < lanes; lane += 4)                                    \
                transpose4_##name(x + lane * outer + at, outer, lanes, into + at * lanes + lane); \
        }                                                                                        \
        for (ptrdiff_t i = 0; n < 4 && i < n; i++)                                               \
            for (ptrdiff_t lane = 0; lane < lanes; lane++)                                       \
                into[i * lanes + lane] = x[lane * outer + i];                                    \
    }
#if defined(__clang__)
#define KLFAST_SHUFFLE(name, x, y, i, j, k, l) __builtin_shufflevector(x, y, i, j, k, l)
#else
#define KLFAST_SHUFFLE(name, x, y, i, j, k, l) __builtin_shuffle(x, y, (mask4_##name){i, j, k, l})
#endif

#else

#define KLFAST_TRANSPOSE(name, real, integer, size)                                              \
    static inline void transpose_##name(                                                         \
        const real *x, ptrdiff_t outer, ptrdiff_t n, ptrdiff_t lanes, real *into) {              \
        for (ptrdiff_t i = 0; i < n; i++)                                                        \
            for (ptrdiff_t lane = 0; lane < lanes; lane++)                                       \
                into[i * lanes + lane] = x[lane * outer + i];                                    \
    }

#endif

KLFAST_TRANSPOSE(f32, float, int, 16)
KLFAST_TRANSPOSE(f64, double, long long, 32)

#endif
