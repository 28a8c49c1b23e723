/* Gradients of multivariate normals, for mvn_grad.pxd, which says what they are: products of
 * triangles and back substitutions, beside the factorisations and solves of mvn.h.
 *
 * Lanes: LANES items side by side, as in mvn.h: [mu | L], `stride` vectors a row, n rows (n even).
 * Panels: one item at a time. A matrix lies in panels of ROWS columns, each row after row, so that
 * element (k, j) is number k ROWS + j % ROWS of panel j / ROWS; panels begin `size` elements apart.
 */
#ifndef KLFAST_MVN_GRAD_H
#define KLFAST_MVN_GRAD_H

#include "mvn.h"

/* ---- lanes: loading and storing ------------------------------------------------------------- */

/* LANES arrays with their elements `step` bytes apart become vectors and vectors arrays, four
 * elements at a time where they lie side by side; the last four overlap those before. */
#if MVN_LANES >= 4
typedef double mvn_four __attribute__((vector_size(32), may_alias));
typedef float mvn_four_f32 __attribute__((vector_size(16), may_alias, aligned(4)));
typedef double mvn_four_f64 __attribute__((vector_size(32), may_alias, aligned(8)));
#if defined(__clang__)
#define MVN_SHUFFLE(x, y, i, j, k, l) __builtin_shufflevector(x, y, i, j, k, l)
#else
#define MVN_SHUFFLE(x, y, i, j, k, l) \
    __builtin_shuffle(x, y, (int64_t __attribute__((vector_size(32)))){i, j, k, l})
#endif

MVN_INLINE void mvn_transpose(mvn_four *x) {
    mvn_four a = MVN_SHUFFLE(x[0], x[1], 0, 4, 2, 6), b = MVN_SHUFFLE(x[0], x[1], 1, 5, 3, 7);
    mvn_four c = MVN_SHUFFLE(x[2], x[3], 0, 4, 2, 6), d = MVN_SHUFFLE(x[2], x[3], 1, 5, 3, 7);
    x[0] = MVN_SHUFFLE(a, c, 0, 1, 4, 5);
    x[1] = MVN_SHUFFLE(b, d, 0, 1, 4, 5);
    x[2] = MVN_SHUFFLE(a, c, 2, 3, 6, 7);
    x[3] = MVN_SHUFFLE(b, d, 2, 3, 6, 7);
}

/* A block of 4 by 4 numbers, transposed. */
MVN_INLINE void mvn_block_transpose(
    const double *from, ptrdiff_t stride_from, double *to, ptrdiff_t stride_to) {
    mvn_four x[4];
    MVN_UNROLL for (int r = 0; r < 4; r++) x[r] = *(const mvn_four_f64 *)(from + r * stride_from);
    mvn_transpose(x);
    MVN_UNROLL for (int r = 0; r < 4; r++) *(mvn_four_f64 *)(to + r * stride_to) = x[r];
}

#define MVN_BLOCKS(real, size, body) \
    if (step == (ptrdiff_t)sizeof(real) && size >= 4) { \
        for (ptrdiff_t begin = 0; begin < count; begin += 4) { \
            ptrdiff_t j = mvn_least(begin, size - 4); \
            for (int lane = 0; lane < MVN_LANES; lane += 4) { \
                mvn_four x[4]; \
                double *vectors = (double *)(a + j) + lane; \
                body \
            } \
        } \
        return; \
    }
#else
MVN_INLINE void mvn_block_transpose(
    const double *from, ptrdiff_t stride_from, double *to, ptrdiff_t stride_to) {
    for (int r = 0; r < 4; r++) {
        for (int c = 0; c < 4; c++) to[c * stride_to + r] = from[r * stride_from + c];
    }
}

#define MVN_BLOCKS(real, size, body)
#endif

/* The first `count` of `size` elements. */
#define MVN_LANES_READ(name, real) \
    MVN_INLINE void mvn_lanes_read_##name( \
        mvn_vec *a, char *const *at, ptrdiff_t offset, ptrdiff_t step, ptrdiff_t count, \
        ptrdiff_t size) { \
        MVN_BLOCKS(real, size, \
            MVN_UNROLL for (int r = 0; r < 4; r++) { \
                const char *from = at[lane + r] + offset + j * (ptrdiff_t)sizeof(real); \
                x[r] = __builtin_convertvector(*(const mvn_four_##name *)from, mvn_four); \
            } \
            mvn_transpose(x); \
            MVN_UNROLL for (int r = 0; r < 4; r++) { \
                *(mvn_four *)(vectors + r * MVN_LANES) = x[r]; \
            }) \
        for (ptrdiff_t j = 0; j < count; j++) a[j] = mvn_gather_##name(at, offset + j * step); \
    }
MVN_LANES_READ(f32, float)
MVN_LANES_READ(f64, double)

#define MVN_LANES_WRITE(name, real) \
    MVN_INLINE void mvn_lanes_write_##name( \
        const mvn_vec *a, char *const *at, ptrdiff_t offset, ptrdiff_t step, ptrdiff_t count) { \
        MVN_BLOCKS(real, count, \
            MVN_UNROLL for (int r = 0; r < 4; r++) { \
                x[r] = *(const mvn_four *)(vectors + r * MVN_LANES); \
            } \
            mvn_transpose(x); \
            MVN_UNROLL for (int r = 0; r < 4; r++) { \
                char *to = at[lane + r] + offset + j * (ptrdiff_t)sizeof(real); \
                *(mvn_four_##name *)to = __builtin_convertvector(x[r], mvn_four_##name); \
            }) \
        for (ptrdiff_t j = 0; j < count; j++) { \
            for (int lane = 0; lane < MVN_LANES; lane++) { \
                *(real *)(at[lane] + offset + j * step) = (real)a[j][lane]; \
            } \
        } \
    }
MVN_LANES_WRITE(f32, float)
MVN_LANES_WRITE(f64, double)

/* ---- lanes ---------------------------------------------------------------------------------- */

/* Those of the diagonal of L, kept finite: see mvn_reciprocal. */
MVN_INLINE void mvn_lanes_reciprocals(
    const mvn_vec *a, mvn_vec *reciprocal, ptrdiff_t stride, ptrdiff_t n) {
    mvn_vec most = (mvn_vec){0} + DBL_MAX;
    for (ptrdiff_t i = 0; i < n; i++) {
        mvn_vec inverse = 1.0 / a[i * stride + i + 1];
        reciprocal[i] = mvn_pick((mvn_bits)(inverse < most), inverse, most);
    }
}

/* [mu | S] <- [mu | L] with S = L L^T, and the reciprocals of the diagonal of L. */
MVN_INLINE void mvn_lanes_cholesky(mvn_vec *a, mvn_vec *reciprocal, ptrdiff_t stride, ptrdiff_t n) {
    ptrdiff_t i = 0;
    for (; i + 4 <= n; i += 4) mvn_lanes_cholesky_rows(a, reciprocal, stride, i, 4);
    if (i < n) mvn_lanes_cholesky_rows(a, reciprocal, stride, i, 2);
}

/* [z | Y] and `squares` = |z|^2 + |Y|^2; q is NULL for N(0, I). */
MVN_INLINE void mvn_lanes_whiten(
    const mvn_vec *p, const mvn_vec *q, const mvn_vec *reciprocal, mvn_vec *y, mvn_vec *squares,
    ptrdiff_t stride, ptrdiff_t n) {
    mvn_vec total[4] = {{0}};
    for (ptrdiff_t i = 0; i < n; i += 2) {
        const mvn_vec *row = p + i * stride;
        if (q) mvn_lanes_whiten_rows(row, q + i * stride, reciprocal, y, total, stride, i, 2);
        else mvn_lanes_standard_rows(row, total, stride, i, 2);
    }
    if (!q) {
        memcpy(y, p, n * stride * sizeof *y);
        for (ptrdiff_t i = 0; i < n; i++) y[i * stride + i + 1] -= 1.0;
    }
    *squares = (total[0] + total[1]) + (total[2] + total[3]);
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

/* X <- L^-T B by back substitution, two rows and four columns at a time; of row i the columns up to
 * i + reach, fewer than `columns`. */
MVN_INLINE void mvn_lanes_back(
    const mvn_vec *b, const mvn_vec *factor, const mvn_vec *reciprocal, mvn_vec *x,
    ptrdiff_t stride, ptrdiff_t n, ptrdiff_t reach, ptrdiff_t columns) {
    for (ptrdiff_t i = n - 2; i >= 0; i -= 2) {
        const mvn_vec *l = factor + i + 1;
        ptrdiff_t last = mvn_least(i + 1 + reach, columns - 1);
        for (ptrdiff_t j = 0; j <= last; j += 4) {
            ptrdiff_t at = i * stride + j;
            mvn_vec sum[2][4];
            MVN_UNROLL for (int c = 0; c < 4; c++) {
                sum[0][c] = b[at + c];
                sum[1][c] = b[at + stride + c];
            }
            for (ptrdiff_t k = i + 2; k < n; k++) {
                MVN_UNROLL for (int c = 0; c < 4; c++) {
                    sum[0][c] -= l[k * stride] * x[k * stride + j + c];
                    sum[1][c] -= l[k * stride + 1] * x[k * stride + j + c];
                }
            }
            MVN_UNROLL for (int c = 0; c < 4; c++) {
                sum[1][c] *= reciprocal[i + 1];
                sum[0][c] = (sum[0][c] - l[(i + 1) * stride] * sum[1][c]) * reciprocal[i];
                x[at + c] = sum[0][c];
                x[at + stride + c] = sum[1][c];
            }
        }
    }
}

/* tril(A (I + Y)^T + a z^T) for [a | A] and [z | Y], both lower triangular; two by two. */
MVN_INLINE void mvn_lanes_times(
    const mvn_vec *a, const mvn_vec *y, mvn_vec *product, ptrdiff_t stride, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i += 2) {
        for (ptrdiff_t j = 0; j <= i; j += 2) {
            const mvn_vec *row = a + i * stride, *other = y + j * stride;
            mvn_vec *to = product + i * stride + j;
            mvn_vec sum[2][2] = {{row[j + 1], row[j + 2]},
                                 {row[stride + j + 1], row[stride + j + 2]}};
            for (ptrdiff_t k = 0; k <= j + 1; k++) {
                sum[0][0] += row[k] * other[k];
                sum[0][1] += row[k] * other[stride + k];
                sum[1][0] += row[stride + k] * other[k];
                sum[1][1] += row[stride + k] * other[stride + k];
            }
            sum[0][1] += row[j + 2] * other[stride + j + 2];
            sum[1][1] += row[stride + j + 2] * other[stride + j + 2];
            to[0] = sum[0][0];
            to[1] = sum[0][1];
            to[stride] = sum[1][0];
            to[stride + 1] = sum[1][1];
        }
    }
}

/* tril((I + Y)^T Y) for [z | Y]; two by two. */
MVN_INLINE void mvn_lanes_gram(
    const mvn_vec *y, mvn_vec *product, ptrdiff_t stride, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i += 2) {
        for (ptrdiff_t j = 0; j <= i; j += 2) {
            const mvn_vec *first = y + i * stride + 1, *second = first + stride;
            mvn_vec *to = product + i * stride + j;
            mvn_vec sum[2][2] = {{first[j] + first[i] * first[j], first[j + 1]},
                                 {second[j], second[j + 1]}};
            if (j < i) sum[0][1] += first[i] * first[j + 1];
            for (ptrdiff_t k = i + 1; k < n; k++) {
                const mvn_vec *row = y + k * stride + 1;
                sum[0][0] += row[i] * row[j];
                sum[0][1] += row[i] * row[j + 1];
                sum[1][0] += row[i + 1] * row[j];
                sum[1][1] += row[i + 1] * row[j + 1];
            }
            to[0] = sum[0][0];
            to[1] = sum[0][1];
            to[stride] = sum[1][0];
            to[stride + 1] = sum[1][1];
        }
    }
}

/* Adds a vector to the diagonal. */
MVN_INLINE void mvn_lanes_add_diagonal(
    mvn_vec *a, const mvn_vec *diagonal, ptrdiff_t stride, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i++) a[i * (stride + 1)] += diagonal[i];
}

/* The upper triangle from the lower one. */
MVN_INLINE void mvn_lanes_mirror(mvn_vec *a, ptrdiff_t stride, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i++) {
        for (ptrdiff_t j = 0; j < i; j++) a[j * stride + i] = a[i * stride + j];
    }
}

/* G = L^-T S L^-1 of a symmetric S, given and returned in its lower triangle; needs room for one
 * more matrix. */
MVN_INLINE void mvn_lanes_congruence(
    mvn_vec *s, mvn_vec *room, const mvn_vec *factor, const mvn_vec *reciprocal, ptrdiff_t stride,
    ptrdiff_t n) {
    mvn_lanes_mirror(s, stride, n);
    mvn_lanes_back(s, factor, reciprocal, room, stride, n, n, n);
    for (ptrdiff_t i = 0; i < n; i++) {
        for (ptrdiff_t j = 0; j < n; j++) s[j * stride + i] = room[i * stride + j];
    }
    mvn_lanes_back(s, factor, reciprocal, room, stride, n, 0, n);
    for (ptrdiff_t i = 0; i < n; i++) {
        for (ptrdiff_t j = 0; j <= i; j++) s[i * stride + j] = room[i * stride + j];
    }
}

/* scale (tril(A) + diag(d)), zeros above. */
MVN_INLINE void mvn_lanes_triangle(
    const mvn_vec *a, const mvn_vec *d, mvn_vec scale, mvn_vec *into, ptrdiff_t stride,
    ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i++) {
        for (ptrdiff_t j = 0; j < i; j++) into[i * stride + j] = scale * a[i * stride + j];
        into[i * stride + i] = scale * (a[i * stride + i] + d[i]);
        for (ptrdiff_t j = i + 1; j < n; j++) into[i * stride + j] = (mvn_vec){0};
    }
}

/* scale S of a symmetric S, given in its lower triangle. */
MVN_INLINE void mvn_lanes_symmetric(
    const mvn_vec *s, mvn_vec scale, mvn_vec *into, ptrdiff_t stride, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i++) {
        for (ptrdiff_t j = 0; j <= i; j++) {
            into[j * stride + i] = into[i * stride + j] = scale * s[i * stride + j];
        }
    }
}

MVN_INLINE void mvn_lanes_scale(
    const mvn_vec *x, ptrdiff_t stride, mvn_vec scale, mvn_vec *into, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i++) into[i] = scale * x[i * stride];
}

MVN_INLINE void mvn_lanes_multiply(
    const mvn_vec *x, const mvn_vec *y, mvn_vec *product, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i++) product[i] = x[i] * y[i];
}

/* ---- panels --------------------------------------------------------------------------------- */

/* Rows i .. i + COLUMNS - 1 of X <- L^-T X, those below being done. */
MVN_INLINE void mvn_tile_back(
    double *x, const double *l, ptrdiff_t stride, const double *reciprocal, ptrdiff_t i,
    ptrdiff_t n) {
    mvn_vec *row = (mvn_vec *)x;
    mvn_tile_f64 tile;
    MVN_UNROLL for (int c = 0; c < MVN_COLUMNS; c++) {
        MVN_UNROLL for (int v = 0; v < MVN_VECTORS; v++) {
            tile.sum[c][v] = row[(i + c) * MVN_VECTORS + v];
        }
    }
    for (ptrdiff_t k = i + MVN_COLUMNS; k < n; k++) {
        MVN_UNROLL for (int c = 0; c < MVN_COLUMNS; c++) {
            MVN_UNROLL for (int v = 0; v < MVN_VECTORS; v++) {
                tile.sum[c][v] -= row[k * MVN_VECTORS + v] * l[k * stride + i + c];
            }
        }
    }
    MVN_UNROLL for (int c = MVN_COLUMNS - 1; c >= 0; c--) {
        MVN_UNROLL for (int v = 0; v < MVN_VECTORS; v++) {
            MVN_UNROLL for (int k = c + 1; k < MVN_COLUMNS; k++) {
                tile.sum[c][v] -= tile.sum[k][v] * l[(i + k) * stride + i + c];
            }
            tile.sum[c][v] *= reciprocal[i + c];
            row[(i + c) * MVN_VECTORS + v] = tile.sum[c][v];
        }
    }
}

/* X <- L^-T X for some panels, in panel g down from the last row to row begin + g step; `n` is a
 * multiple of COLUMNS. */
static inline void mvn_panels_back(
    double *x, ptrdiff_t size, ptrdiff_t panels, const double *l, ptrdiff_t stride,
    const double *reciprocal, ptrdiff_t n, ptrdiff_t begin, ptrdiff_t step) {
    for (ptrdiff_t i = n - MVN_COLUMNS; i >= 0; i -= MVN_COLUMNS) {
        for (ptrdiff_t g = 0; g < panels && i >= begin + g * step; g++) {
            mvn_tile_back(x + g * size, l, stride, reciprocal, i, n);
        }
    }
}

/* One panel of [mu_p | L_p] - [mu_q | L_q], which lie in rows; from row `first` on. */
static inline void mvn_panel_subtract(
    double *x, const double *p, const double *q, ptrdiff_t stride, ptrdiff_t first, ptrdiff_t n) {
    for (ptrdiff_t k = first; k < n; k++) {
        MVN_UNROLL for (int r = 0; r < MVN_ROWS; r++) {
            x[k * MVN_ROWS + r] = p[k * stride + r] - q[k * stride + r];
        }
    }
}

MVN_INLINE void mvn_tile_write(mvn_tile_f64 tile, double *into, ptrdiff_t stride) {
    MVN_UNROLL for (int c = 0; c < MVN_COLUMNS; c++) {
        MVN_UNROLL for (int v = 0; v < MVN_VECTORS; v++) {
            *(mvn_loose *)(into + c * stride + v * MVN_LANES) = tile.sum[c][v];
        }
    }
}

/* Rows i .. i + COLUMNS - 1 of A B up to the diagonal's tile, A in panels, B in rows; B is 0 below
 * the row after its diagonal: column 0 of A belongs to the means. */
static inline void mvn_rows_times(
    const double *a, ptrdiff_t size, const double *b, ptrdiff_t stride, ptrdiff_t i, ptrdiff_t n,
    double *into, ptrdiff_t stride_into) {
    for (ptrdiff_t j = 0; j < i + MVN_COLUMNS; j += MVN_ROWS) {
        ptrdiff_t end = mvn_least(j + MVN_ROWS, n) + 1;
        mvn_tile_f64 tile = {{{{0}}}};
        for (ptrdiff_t begin = 0; begin < end; begin += MVN_ROWS) {
            const double *row = a + begin / MVN_ROWS * size + i * MVN_ROWS;
            const double *other = b + begin * stride + j;
            ptrdiff_t count = mvn_least(MVN_ROWS, end - begin);
            for (ptrdiff_t k = 0; k < count; k++) {
                MVN_UNROLL for (int c = 0; c < MVN_COLUMNS; c++) {
                    MVN_UNROLL for (int v = 0; v < MVN_VECTORS; v++) {
                        mvn_vec x = *(const mvn_loose *)(other + k * stride + v * MVN_LANES);
                        tile.sum[c][v] += x * row[c * MVN_ROWS + k];
                    }
                }
            }
        }
        mvn_tile_write(tile, into + j, stride_into);
    }
}

/* Rows i .. i + COLUMNS - 1 of M A up to the diagonal's tile, A in panels and lower triangular, M
 * in rows and upper triangular. */
static inline void mvn_rows_gram(
    const double *a, ptrdiff_t size, const double *m, ptrdiff_t stride, ptrdiff_t i, ptrdiff_t n,
    double *into, ptrdiff_t stride_into) {
    for (ptrdiff_t j = 0; j <= i + MVN_COLUMNS; j += MVN_ROWS) {
        const mvn_vec *x = (const mvn_vec *)(a + j / MVN_ROWS * size);
        mvn_tile_f64 tile = {{{{0}}}};
        for (ptrdiff_t k = i; k < n; k++) {
            MVN_UNROLL for (int c = 0; c < MVN_COLUMNS; c++) {
                MVN_UNROLL for (int v = 0; v < MVN_VECTORS; v++) {
                    tile.sum[c][v] += x[k * MVN_VECTORS + v] * m[c * stride + k];
                }
            }
        }
        mvn_tile_write(tile, into + j, stride_into);
    }
}

/* Rows of a matrix in panels, from and to `count` numbers in a row and up to ROWS - 1 behind. */
MVN_INLINE void mvn_row_copy(
    const double *from, ptrdiff_t step_from, double *to, ptrdiff_t step_to, ptrdiff_t count) {
    for (ptrdiff_t j = 0; j < count; j += MVN_ROWS, from += step_from, to += step_to) {
        MVN_UNROLL for (int v = 0; v < MVN_VECTORS; v++) {
            *(mvn_loose *)(to + v * MVN_LANES) = *(const mvn_loose *)(from + v * MVN_LANES);
        }
    }
}
MVN_INLINE void mvn_panels_row(
    const double *x, ptrdiff_t size, ptrdiff_t i, ptrdiff_t count, double *row) {
    mvn_row_copy(x + i * MVN_ROWS, size, row, MVN_ROWS, count);
}
MVN_INLINE void mvn_panels_put(
    double *x, ptrdiff_t size, ptrdiff_t i, ptrdiff_t count, const double *row) {
    mvn_row_copy(row, MVN_ROWS, x + i * MVN_ROWS, size, count);
}

MVN_INLINE double *mvn_block(double *x, ptrdiff_t size, ptrdiff_t i, ptrdiff_t j) {
    return x + j / MVN_ROWS * size + i * MVN_ROWS + j % MVN_ROWS;
}

/* The upper triangle of a matrix in panels from the lower one; n is a multiple of 4. */
static inline void mvn_panels_mirror(double *x, ptrdiff_t size, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i += 4) {
        for (ptrdiff_t j = 0; j < i; j += 4) {
            mvn_block_transpose(
                mvn_block(x, size, i, j), MVN_ROWS, mvn_block(x, size, j, i), MVN_ROWS);
        }
        double *block = mvn_block(x, size, i, i);
        for (int r = 0; r < 4; r++) {
            for (int c = 0; c < r; c++) block[c * MVN_ROWS + r] = block[r * MVN_ROWS + c];
        }
    }
}

/* X^T of a square X, both in panels; n is a multiple of 4. */
static inline void mvn_panels_transpose(double *x, ptrdiff_t size, double *into, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i += 4) {
        for (ptrdiff_t j = 0; j < n; j += 4) {
            mvn_block_transpose(
                mvn_block(x, size, j, i), MVN_ROWS, mvn_block(into, size, i, j), MVN_ROWS);
        }
    }
}

/* A panel's columns as rows, `stride` apart, from element `first` to n - 1; multiples of 4. */
static inline void mvn_panel_rows(
    const double *x, double *rows, ptrdiff_t stride, ptrdiff_t first, ptrdiff_t n) {
    for (ptrdiff_t k = first; k < n; k += 4) {
        for (int r = 0; r < MVN_ROWS; r += 4) {
            mvn_block_transpose(x + k * MVN_ROWS + r, MVN_ROWS, rows + r * stride + k, stride);
        }
    }
}

/* scale times `count` numbers to elements `step` bytes apart, then zeros up to element n - 1. */
#define MVN_LINE_WRITE(name, real) \
    static inline void mvn_line_write_##name( \
        const double *restrict line, char *restrict to, ptrdiff_t step, double scale, \
        ptrdiff_t count, ptrdiff_t n) { \
        if (step == (ptrdiff_t)sizeof(real)) { \
            for (ptrdiff_t j = 0; j < count; j++) ((real *)to)[j] = (real)(scale * line[j]); \
            for (ptrdiff_t j = count; j < n; j++) ((real *)to)[j] = 0; \
        } else { \
            for (ptrdiff_t j = 0; j < count; j++, to += step) { \
                *(real *)to = (real)(scale * line[j]); \
            } \
            for (ptrdiff_t j = count; j < n; j++, to += step) *(real *)to = 0; \
        } \
    }
MVN_LINE_WRITE(f32, float)
MVN_LINE_WRITE(f64, double)

#endif
