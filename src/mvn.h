/* Cholesky factors and triangular solves for mvn.pxd: the two things that take the time.
 *
 * Lanes: for small matrices, LANES items side by side, one vector for each matrix element.
 * Panels: for large ones, one item at a time, rows in panels of ROWS, each panel by columns.
 *
 * Both are left-looking: a tile of the result collects its sum over all finished columns in
 * registers, is divided by the diagonal block and written once. Only lower triangles are used.
 * Vectors are GCC's and Clang's generic ones, as wide as the instruction set's own.
 */
#ifndef KLFAST_MVN_H
#define KLFAST_MVN_H

#include <float.h>
#include <math.h>
#include <stddef.h>
#include "vecmath.h"

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

#define MVN_INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define MVN_UNROLL _Pragma("unroll")
#else
#define MVN_UNROLL _Pragma("GCC unroll 8")
#endif

typedef double mvn_vec __attribute__((vector_size(8 * MVN_LANES), may_alias));

MVN_INLINE mvn_vec mvn_ones(void) { return (mvn_vec){0} + 1.0; }

MVN_INLINE mvn_vec mvn_sqrt(mvn_vec x) {
    mvn_vec root;
    for (int lane = 0; lane < MVN_LANES; lane++) root[lane] = sqrt(x[lane]);
    return root;
}

/* One element of LANES arrays, which begin at `at`, side by side. */
#if MVN_LANES == 8
#define MVN_GATHER(real) (mvn_vec){ \
    MVN_AT(real, 0), MVN_AT(real, 1), MVN_AT(real, 2), MVN_AT(real, 3), \
    MVN_AT(real, 4), MVN_AT(real, 5), MVN_AT(real, 6), MVN_AT(real, 7)}
#elif MVN_LANES == 4
#define MVN_GATHER(real) (mvn_vec){ \
    MVN_AT(real, 0), MVN_AT(real, 1), MVN_AT(real, 2), MVN_AT(real, 3)}
#else
#define MVN_GATHER(real) (mvn_vec){MVN_AT(real, 0), MVN_AT(real, 1)}
#endif
#define MVN_AT(real, lane) *(const real *)(at[lane] + offset)
MVN_INLINE mvn_vec mvn_gather_f32(char *const *at, ptrdiff_t offset) { return MVN_GATHER(float); }
MVN_INLINE mvn_vec mvn_gather_f64(char *const *at, ptrdiff_t offset) { return MVN_GATHER(double); }

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
    double matched = match_exponent_f64(x, y);
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

/* ---- lanes ---------------------------------------------------------------------------------- */

/* LANES items side by side: [mu | L] of all of them, n rows (n even) of `stride` vectors, mu in
 * column 0 and element (i, j) of L in column j + 1. The four columns after the diagonal are 0, and
 * two more rows follow that are computed but never used. */

/* Columns j, j + 1 of rows i .. i + 3: subtract sum_k<j L[i][k] L[j][k], then divide by the
 * diagonal block. */
MVN_INLINE void mvn_lanes_eliminate(
    mvn_vec *a, const mvn_vec *reciprocal, ptrdiff_t stride, ptrdiff_t i, ptrdiff_t j) {
    mvn_vec *x = a + i * stride + 1, sum[4][2];
    const mvn_vec *l = a + j * stride + 1;
    MVN_UNROLL for (int r = 0; r < 4; r++) {
        MVN_UNROLL for (int c = 0; c < 2; c++) sum[r][c] = x[r * stride + j + c];
    }
    for (ptrdiff_t k = 0; k < j; k++) {
        MVN_UNROLL for (int r = 0; r < 4; r++) {
            MVN_UNROLL for (int c = 0; c < 2; c++) {
                sum[r][c] -= x[r * stride + k] * l[c * stride + k];
            }
        }
    }
    MVN_UNROLL for (int r = 0; r < 4; r++) {
        sum[r][0] *= reciprocal[j];
        sum[r][1] = (sum[r][1] - sum[r][0] * l[stride + j]) * reciprocal[j + 1];
        x[r * stride + j] = sum[r][0];
        x[r * stride + j + 1] = sum[r][1];
    }
}

/* [mu | S] <- [mu | L] with S = L L^T, and the reciprocals of the diagonal of L. The second pivot
 * of a pair is taken without waiting for the first one's square root. */
MVN_INLINE void mvn_lanes_cholesky(mvn_vec *a, mvn_vec *reciprocal, ptrdiff_t stride, ptrdiff_t n) {
    for (ptrdiff_t j = 0; j < n; j += 2) {
        mvn_vec *upper = a + j * stride + 1, *lower = upper + stride;
        mvn_vec first = upper[j], below = lower[j], second = lower[j + 1];
        for (ptrdiff_t k = 0; k < j; k++) {
            first -= upper[k] * upper[k];
            below -= lower[k] * upper[k];
            second -= lower[k] * lower[k];
        }
        second -= below * (below / first);
        upper[j] = mvn_sqrt(first);
        lower[j + 1] = mvn_sqrt(second);
        reciprocal[j] = 1.0 / upper[j];
        reciprocal[j + 1] = 1.0 / lower[j + 1];
        lower[j] = below * reciprocal[j];
        for (ptrdiff_t i = j + 2; i < n; i += 4) mvn_lanes_eliminate(a, reciprocal, stride, i, j);
    }
}

MVN_INLINE void mvn_lanes_reciprocals(
    const mvn_vec *a, mvn_vec *reciprocal, ptrdiff_t stride, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i++) {
        mvn_vec diagonal = a[i * stride + i + 1];
        MVN_UNROLL for (int lane = 0; lane < MVN_LANES; lane++) {
            reciprocal[i][lane] = mvn_reciprocal(diagonal[lane]);
        }
    }
}

/* [z | Y] = L_q^-1 ([mu_p | L_p] - [mu_q | L_q]) by forward substitution, two rows and four columns
 * at a time, and `squares` = |z|^2 + |Y|^2. */
MVN_INLINE void mvn_lanes_whiten(
    const mvn_vec *p, const mvn_vec *q, const mvn_vec *reciprocal, mvn_vec *y, mvn_vec *squares,
    ptrdiff_t stride, ptrdiff_t n) {
    mvn_vec total[4] = {{0}};
    for (ptrdiff_t i = 0; i < n; i += 2) {
        const mvn_vec *l = q + i * stride + 1;
        for (ptrdiff_t j = 0; j <= i + 2; j += 4) {
            ptrdiff_t at = i * stride + j;
            mvn_vec sum[2][4];
            MVN_UNROLL for (int c = 0; c < 4; c++) {
                sum[0][c] = p[at + c] - q[at + c];
                sum[1][c] = p[at + stride + c] - q[at + stride + c];
            }
            for (ptrdiff_t k = j > 0 ? j - 1 : 0; k < i; k++) {
                MVN_UNROLL for (int c = 0; c < 4; c++) {
                    sum[0][c] -= l[k] * y[k * stride + j + c];
                    sum[1][c] -= l[stride + k] * y[k * stride + j + c];
                }
            }
            MVN_UNROLL for (int c = 0; c < 4; c++) {
                sum[0][c] *= reciprocal[i];
                sum[1][c] = (sum[1][c] - l[stride + i] * sum[0][c]) * reciprocal[i + 1];
                y[at + c] = sum[0][c];
                y[at + stride + c] = sum[1][c];
                total[c] += sum[0][c] * sum[0][c] + sum[1][c] * sum[1][c];
            }
        }
    }
    *squares = (total[0] + total[1]) + (total[2] + total[3]);
}

/* The same for q = N(0, I), where [z | Y] = [mu_p | L_p - I]. */
MVN_INLINE void mvn_lanes_whiten_standard(
    const mvn_vec *p, mvn_vec *y, mvn_vec *squares, ptrdiff_t stride, ptrdiff_t n) {
    mvn_vec rest = {0}, diagonal = {0};
    for (ptrdiff_t i = 0; i < n; i++) {
        const mvn_vec *row = p + i * stride;
        for (ptrdiff_t j = 0; j <= i; j++) rest += row[j] * row[j];
        mvn_vec t = row[i + 1] - 1.0;
        diagonal += t * t;
        y[i * stride + i + 1] = t;
    }
    *squares = rest + diagonal;
}

/* The diagonal of L, [i][lane]. */
MVN_INLINE void mvn_lanes_diagonal(
    const mvn_vec *a, mvn_vec *diagonal, ptrdiff_t stride, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i++) diagonal[i] = a[i * stride + i + 1];
}

/* 1/2 squares + sum_i (t_i - log1p(t_i)) of every lane; x = L_p,ii, y = L_q,ii and t = Y_ii, all
 * [i][lane]. Overwrites t. */
MVN_INLINE void mvn_lanes_divergence(
    const double *x, const double *y, double *t, const double *squares, ptrdiff_t n, double *kl) {
    mvn_minus_log1p_each(x, y, t, n * MVN_LANES);
    for (int lane = 0; lane < MVN_LANES; lane++) kl[lane] = 0.5 * squares[lane];
    for (ptrdiff_t i = 0; i < n; i++) {
        for (int lane = 0; lane < MVN_LANES; lane++) kl[lane] += t[i * MVN_LANES + lane];
    }
}

/* ---- panels ---------------------------------------------------------------------------------- */

/* One matrix of n rows, n a multiple of ROWS. The solve takes Y^T = (L_p - L_q)^T L_q^-T in the
 * same panels: row 0 of X is mu_p - mu_q; row m is column m - 1 of L_p - L_q and begins there. */

/* Where the panel of rows i .. i + ROWS - 1 begins; it has columns 0 .. i + ROWS - 1. */
MVN_INLINE ptrdiff_t mvn_panel(ptrdiff_t i) {
    ptrdiff_t index = i / MVN_ROWS;
    return MVN_ROWS * MVN_ROWS * (index * (index + 1) / 2);
}

/* Where element (i, j) is. */
MVN_INLINE ptrdiff_t mvn_element(ptrdiff_t i, ptrdiff_t j) {
    return mvn_panel(i) + j * MVN_ROWS + i % MVN_ROWS;
}

typedef struct { mvn_vec sum[MVN_COLUMNS][MVN_VECTORS]; } mvn_tile;  /* ROWS by COLUMNS */

/* Columns j .. j + COLUMNS - 1 of x, minus sum_k x[k] l[k][c] over begin <= k < j. */
MVN_INLINE mvn_tile mvn_panel_subtract(
    const double *x, const double *l, ptrdiff_t begin, ptrdiff_t j) {
    const mvn_vec *column = (const mvn_vec *)x;
    mvn_tile tile;
    MVN_UNROLL for (int c = 0; c < MVN_COLUMNS; c++) {
        MVN_UNROLL for (int v = 0; v < MVN_VECTORS; v++) {
            tile.sum[c][v] = column[(j + c) * MVN_VECTORS + v];
        }
    }
    for (ptrdiff_t k = begin; k < j; k++) {
        MVN_UNROLL for (int c = 0; c < MVN_COLUMNS; c++) {
            MVN_UNROLL for (int v = 0; v < MVN_VECTORS; v++) {
                tile.sum[c][v] -= column[k * MVN_VECTORS + v] * l[k * MVN_ROWS + c];
            }
        }
    }
    return tile;
}

/* X <- X L^-T in the columns first .. last - 1 of one panel of X, which is 0 left of `begin`. */
static inline void mvn_panel_solve(
    double *x, const double *factor, const double *reciprocal,
    ptrdiff_t begin, ptrdiff_t first, ptrdiff_t last) {
    mvn_vec *column = (mvn_vec *)x;
    for (ptrdiff_t j = first; j < last; j += MVN_COLUMNS) {
        const double *l = factor + mvn_element(j, 0);
        mvn_tile tile = mvn_panel_subtract(x, l, begin, j);
        MVN_UNROLL for (int c = 0; c < MVN_COLUMNS; c++) {
            MVN_UNROLL for (int v = 0; v < MVN_VECTORS; v++) {
                MVN_UNROLL for (int k = 0; k < c; k++) {
                    tile.sum[c][v] -= tile.sum[k][v] * l[(j + k) * MVN_ROWS + c];
                }
                tile.sum[c][v] *= reciprocal[j + c];
                column[(j + c) * MVN_VECTORS + v] = tile.sum[c][v];
            }
        }
    }
}

/* The diagonal block of the panel that begins at row i, when all to its left is done. */
static inline void mvn_panel_factor(double *x, double *reciprocal, ptrdiff_t i) {
    mvn_vec *column = (mvn_vec *)x;
    for (ptrdiff_t j = i; j < i + MVN_ROWS; j += MVN_COLUMNS) {
        const double *l = x + (j - i);
        mvn_tile tile = mvn_panel_subtract(x, l, 0, j);
        MVN_UNROLL for (int c = 0; c < MVN_COLUMNS; c++) {
            ptrdiff_t row = j - i + c;
            double root = sqrt(tile.sum[c][row / MVN_LANES][row % MVN_LANES]);
            reciprocal[j + c] = 1.0 / root;
            MVN_UNROLL for (int v = 0; v < MVN_VECTORS; v++) {
                tile.sum[c][v] *= reciprocal[j + c];
                column[(j + c) * MVN_VECTORS + v] = tile.sum[c][v];
            }
            x[(j + c) * MVN_ROWS + row] = root;
            MVN_UNROLL for (int k = c + 1; k < MVN_COLUMNS; k++) {
                MVN_UNROLL for (int v = 0; v < MVN_VECTORS; v++) {
                    tile.sum[k][v] -= tile.sum[c][v] * l[(j + c) * MVN_ROWS + k];
                }
            }
        }
    }
}

/* a <- its Cholesky factor, with the reciprocals of the diagonal. n is a multiple of ROWS. */
static inline void mvn_panels_cholesky(double *a, double *reciprocal, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i += MVN_ROWS) {
        double *x = a + mvn_panel(i);
        mvn_panel_solve(x, a, reciprocal, 0, 0, i);
        mvn_panel_factor(x, reciprocal, i);
    }
}

/* Rows m .. m + ROWS - 1 of X, from column `begin`; what lies beyond row n is 0. */
static inline void mvn_panel_difference(
    double *x, const double *p, const double *q, const double *shift,
    ptrdiff_t m, ptrdiff_t begin, ptrdiff_t n) {
    for (ptrdiff_t k = begin; k < n; k++) {
        const double *row_p = p + mvn_element(k, 0), *row_q = q + mvn_element(k, 0);
        for (ptrdiff_t r = 0; r < MVN_ROWS; r++) {
            ptrdiff_t column = m + r - 1;
            x[k * MVN_ROWS + r] = column > k ? 0.0
                : column < 0 ? shift[k]
                : row_p[column * MVN_ROWS] - row_q[column * MVN_ROWS];
        }
    }
}

/* `squares` = |L_q^-1 (mu_p - mu_q)|^2 + |Y|^2 and `t` = diag(Y); `x` is scratch for one panel. */
static inline void mvn_panels_whiten(
    const double *p, const double *q, const double *shift, const double *reciprocal,
    double *x, ptrdiff_t n, double *t, double *squares) {
    const mvn_vec *column = (const mvn_vec *)x;
    mvn_vec sum[MVN_VECTORS] = {{0}};
    for (ptrdiff_t m = 0; m <= n; m += MVN_ROWS) {
        ptrdiff_t begin = m > 0 ? m - MVN_COLUMNS : 0;
        mvn_panel_difference(x, p, q, shift, m, begin, n);
        mvn_panel_solve(x, q, reciprocal, begin, begin, n);
        for (ptrdiff_t k = begin; k < n; k++) {
            MVN_UNROLL for (int v = 0; v < MVN_VECTORS; v++) {
                sum[v] += column[k * MVN_VECTORS + v] * column[k * MVN_VECTORS + v];
            }
        }
        for (ptrdiff_t r = m == 0; r < MVN_ROWS && m + r <= n; r++) {
            t[m + r - 1] = x[(m + r - 1) * MVN_ROWS + r];
        }
    }
    *squares = 0.0;
    for (int v = 0; v < MVN_VECTORS; v++) {
        for (int lane = 0; lane < MVN_LANES; lane++) *squares += sum[v][lane];
    }
}

/* The same for q = N(0, I), where Y = L_p - I. */
static inline void mvn_panels_whiten_standard(
    const double *p, const double *shift, ptrdiff_t n, double *t, double *squares) {
    double sum[MVN_ROWS] = {0};
    for (ptrdiff_t i = 0; i < n; i += MVN_ROWS) {
        const double *x = p + mvn_panel(i);
        for (ptrdiff_t k = 0; k < i; k++, x += MVN_ROWS) {
            for (ptrdiff_t r = 0; r < MVN_ROWS; r++) sum[r] += x[r] * x[r];
        }
        for (ptrdiff_t k = i; k < i + MVN_ROWS; k++, x += MVN_ROWS) {
            t[k] = x[k - i] - 1.0;
            sum[k - i] += t[k] * t[k] + shift[k] * shift[k];
            for (ptrdiff_t r = k - i + 1; r < MVN_ROWS; r++) sum[r] += x[r] * x[r];
        }
    }
    *squares = 0.0;
    for (int r = 0; r < MVN_ROWS; r++) *squares += sum[r];
}

/* 1/2 squares + sum_i (t_i - log1p(t_i)); x = L_p,ii, y = L_q,ii. Overwrites t. */
static inline double mvn_panels_divergence(
    const double *x, const double *y, double *t, double squares, ptrdiff_t n) {
    double kl = 0.5 * squares;
    mvn_minus_log1p_each(x, y, t, n);
    for (ptrdiff_t i = 0; i < n; i++) kl += t[i];
    return kl;
}

#endif
