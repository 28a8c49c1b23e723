/* Panels of one floating-point type, for mvn.h, which says what they are. PANEL_REAL is the type,
 * PANEL_BITS the integer of its size, PANEL_LANES (PANEL_SHARE times MVN_LANES) how many a vector
 * has; PANEL(name) is mvn_name with the type's suffix. PANEL_EXTRA columns are solved with those of
 * L_p - L_q, in the first panel's last rows: mu_p - mu_q and, for float, before it a probe. */

#define PANEL_ROWS (MVN_VECTORS * PANEL_LANES)

typedef PANEL_REAL PANEL(vec) __attribute__((vector_size(8 * MVN_LANES), may_alias));
typedef PANEL_REAL PANEL(loose)
    __attribute__((vector_size(8 * MVN_LANES), may_alias, aligned(sizeof(PANEL_REAL))));
typedef PANEL_BITS PANEL(bits) __attribute__((vector_size(8 * MVN_LANES), may_alias));
typedef PANEL_BITS PANEL(loose_bits)
    __attribute__((vector_size(8 * MVN_LANES), may_alias, aligned(sizeof(PANEL_REAL))));

typedef struct { PANEL(vec) sum[MVN_COLUMNS][MVN_VECTORS]; } PANEL(tile);  /* ROWS by COLUMNS */

typedef struct { const PANEL_REAL *row[MVN_COLUMNS]; } PANEL(strip);  /* COLUMNS rows of L */

MVN_INLINE PANEL(strip) PANEL(rows_of)(
    const PANEL_REAL *l, ptrdiff_t stride, ptrdiff_t j, ptrdiff_t n, const PANEL_REAL *zeros) {
    PANEL(strip) strip;
    MVN_UNROLL for (int c = 0; c < MVN_COLUMNS; c++) {
        strip.row[c] = j + c < n ? l + (j + c) * stride : zeros;
    }
    return strip;
}

/* Columns j .. j + COLUMNS - 1 of x, minus sum_k x[k] l[c][k] over begin <= k < end. */
MVN_INLINE PANEL(tile) PANEL(tile_subtract)(
    const PANEL_REAL *x, PANEL(strip) l, ptrdiff_t begin, ptrdiff_t end, ptrdiff_t j) {
    const PANEL(vec) *column = (const PANEL(vec) *)x;
    PANEL(tile) tile;
    MVN_UNROLL for (int c = 0; c < MVN_COLUMNS; c++) {
        MVN_UNROLL for (int v = 0; v < MVN_VECTORS; v++) {
            tile.sum[c][v] = column[(j + c) * MVN_VECTORS + v];
        }
    }
    for (ptrdiff_t k = begin; k < end; k++) {
        MVN_UNROLL for (int c = 0; c < MVN_COLUMNS; c++) {
            MVN_UNROLL for (int v = 0; v < MVN_VECTORS; v++) {
                tile.sum[c][v] = PANEL(less)(
                    tile.sum[c][v], column[k * MVN_VECTORS + v], l.row[c][k]);
            }
        }
    }
    return tile;
}

/* One tile of X <- X L^-T, when all columns left of `begin` are subtracted; adds the squares of
 * what is found to `squares`. */
MVN_INLINE void PANEL(tile_solve)(
    PANEL_REAL *x, PANEL(strip) l, const PANEL_REAL *reciprocal, ptrdiff_t begin, ptrdiff_t j,
    PANEL(vec) *squares) {
    PANEL(vec) *column = (PANEL(vec) *)x;
    PANEL(tile) tile = PANEL(tile_subtract)(x, l, begin, j, j);
    MVN_UNROLL for (int c = 0; c < MVN_COLUMNS; c++) {
        MVN_UNROLL for (int v = 0; v < MVN_VECTORS; v++) {
            MVN_UNROLL for (int k = 0; k < c; k++) {
                tile.sum[c][v] = PANEL(less)(tile.sum[c][v], tile.sum[k][v], l.row[c][j + k]);
            }
            tile.sum[c][v] *= reciprocal[j + c];
            column[(j + c) * MVN_VECTORS + v] = tile.sum[c][v];
            squares[v] += tile.sum[c][v] * tile.sum[c][v];
        }
    }
}

MVN_INLINE void PANEL(tile_update)(
    PANEL_REAL *x, PANEL(strip) l, ptrdiff_t begin, ptrdiff_t end, ptrdiff_t j) {
    PANEL(vec) *column = (PANEL(vec) *)x;
    PANEL(tile) tile = PANEL(tile_subtract)(x, l, begin, end, j);
    MVN_UNROLL for (int c = 0; c < MVN_COLUMNS; c++) {
        MVN_UNROLL for (int v = 0; v < MVN_VECTORS; v++) {
            column[(j + c) * MVN_VECTORS + v] = tile.sum[c][v];
        }
    }
}

/* One step of X <- X L^-T for `panels` panels of X, `size` apart, panel g being 0 left of
 * begin + g step: solves for the columns `block` .. `block` + DEPTH - 1 from `first` on, subtracts
 * what they contribute to the columns up to `last`, and adds their squares to `squares`, those of
 * the first panel apart from the others'. The caches hold a block; each sum runs in one order. `n`
 * is how many rows L has. */
static inline void PANEL(panels_solve)(
    PANEL_REAL *x, ptrdiff_t size, ptrdiff_t panels, const PANEL_REAL *factor, ptrdiff_t stride,
    ptrdiff_t n, const PANEL_REAL *zeros, const PANEL_REAL *reciprocal, ptrdiff_t begin,
    ptrdiff_t step, ptrdiff_t block, ptrdiff_t first, ptrdiff_t last, PANEL_REAL *squares) {
    ptrdiff_t end = mvn_least(block + MVN_DEPTH, last);
    for (ptrdiff_t j = mvn_most(block, first); j < last; j += MVN_COLUMNS) {
        PANEL(strip) l = PANEL(rows_of)(factor, stride, j, n, zeros);
        for (ptrdiff_t g = 0; g < panels; g++) {
            ptrdiff_t from = mvn_most(block, begin + g * step);
            if (j < from) break;
            if (j < end) {
                PANEL(vec) *sums = (PANEL(vec) *)squares + (g > 0 ? MVN_VECTORS : 0);
                PANEL(tile_solve)(x + g * size, l, reciprocal, from, j, sums);
            } else {
                PANEL(tile_update)(x + g * size, l, from, end, j);
            }
        }
    }
}

/* All bits set, then none: which columns of a row reach the diagonal. */
#define MVN_FOUR -1, -1, -1, -1
static const PANEL_BITS PANEL(reach)[2 * PANEL_ROWS] = {
    MVN_FOUR,
#if MVN_LANES * PANEL_SHARE >= 4
    MVN_FOUR,
#endif
#if MVN_LANES * PANEL_SHARE >= 8
    MVN_FOUR, MVN_FOUR,
#endif
#if MVN_LANES * PANEL_SHARE >= 16
    MVN_FOUR, MVN_FOUR, MVN_FOUR, MVN_FOUR,
#endif
};
#undef MVN_FOUR

/* Rows first .. last - 1 of the panel of L_p - L_q that begins at its column `start`. */
MVN_INLINE void PANEL(panel_difference)(
    PANEL_REAL *x, const PANEL_REAL *p, ptrdiff_t stride_p, const PANEL_REAL *q, ptrdiff_t stride_q,
    const PANEL_REAL *shift, const PANEL_REAL *probe, ptrdiff_t start, ptrdiff_t n,
    ptrdiff_t first, ptrdiff_t last) {
    PANEL(vec) *column = (PANEL(vec) *)x;
    ptrdiff_t k = first, diagonal = mvn_least(start + PANEL_ROWS, last);
    int whole = start + PANEL_ROWS <= n;  /* rows of memory, if not of the triangle, reach so far */
    for (; k < mvn_least(start, last); k++) {
        PANEL(vec) *row = column + k * MVN_VECTORS;
        MVN_UNROLL for (int v = 0; v < MVN_VECTORS; v++) row[v] = (PANEL(vec)){0};
    }
    for (; k < diagonal; k++) {
        const PANEL_REAL *row_p = p + k * stride_p + start, *row_q = q + k * stride_q + start;
        if (whole) {
            const PANEL_BITS *reach = PANEL(reach) + PANEL_ROWS - 1 - (k - start);
            MVN_UNROLL for (int v = 0; v < MVN_VECTORS; v++) {
                PANEL(bits) mask = *(const PANEL(loose_bits) *)(reach + v * PANEL_LANES);
                PANEL(vec) difference = *(const PANEL(loose) *)(row_p + v * PANEL_LANES)
                    - *(const PANEL(loose) *)(row_q + v * PANEL_LANES);
                column[k * MVN_VECTORS + v] = (PANEL(vec))((PANEL(bits))difference & mask);
            }
        } else {
            for (ptrdiff_t r = 0; r < PANEL_ROWS; r++) {
                x[k * PANEL_ROWS + r] = start + r <= k ? row_p[r] - row_q[r] : 0.0;
            }
        }
    }
    for (; k < last; k++) {
        const PANEL_REAL *row_p = p + k * stride_p + start, *row_q = q + k * stride_q + start;
        MVN_UNROLL for (int v = 0; v < MVN_VECTORS; v++) {
            column[k * MVN_VECTORS + v] = *(const PANEL(loose) *)(row_p + v * PANEL_LANES)
                - *(const PANEL(loose) *)(row_q + v * PANEL_LANES);
        }
    }
    if (start == 0) {
        for (k = first; k < last; k++) {
            x[k * PANEL_ROWS + PANEL_ROWS - 1] = shift[k];
            if (PANEL_EXTRA == 2) x[k * PANEL_ROWS + PANEL_ROWS - 2] = probe[k];
        }
    }
}

/* `panels` panels of L_p - L_q from number `index` on, followed by zeros up to row `padded`. */
static inline void PANEL(panels_differences)(
    PANEL_REAL *x, const PANEL_REAL *p, ptrdiff_t stride_p, const PANEL_REAL *q, ptrdiff_t stride_q,
    const PANEL_REAL *shift, const PANEL_REAL *probe, ptrdiff_t index, ptrdiff_t panels,
    ptrdiff_t n, ptrdiff_t padded, ptrdiff_t size) {
    const ptrdiff_t chunk = 32, begin = index * PANEL_ROWS - MVN_COLUMNS;
    for (ptrdiff_t first = mvn_most(begin, 0); first < n; first += chunk) {
        ptrdiff_t last = mvn_least(first + chunk, n);
        for (ptrdiff_t g = 0; g < panels; g++) {
            ptrdiff_t start = mvn_most((index + g) * PANEL_ROWS - PANEL_EXTRA, 0);
            ptrdiff_t from = mvn_most(first, begin + g * PANEL_ROWS);
            if (from >= last) break;
            PANEL(panel_difference)(
                x + g * size, p, stride_p, q, stride_q, shift, probe, start, n, from, last);
        }
    }
    for (ptrdiff_t g = 0; g < panels; g++) {
        PANEL_REAL *rest = x + g * size;
        for (ptrdiff_t k = n * PANEL_ROWS; k < padded * PANEL_ROWS; k++) rest[k] = 0.0;
    }
}

#undef PANEL_ROWS
#undef PANEL_REAL
#undef PANEL_BITS
#undef PANEL_LANES
#undef PANEL_SHARE
#undef PANEL_EXTRA
#undef PANEL
