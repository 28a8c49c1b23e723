"""LANES rows side by side, in bands of such groups: short rows, and rows whose elements lie further
apart than the rows do.

Rows are columns here: in place, where they are long, or in a buffer, to which rows are transposed,
lines of columns copied, and all else gathered and converted. A row's bits do not depend on its
neighbours, those of a short one not on how it lies either.
"""

from numpy cimport npy_intp
from sums cimport (
    AHEAD_BYTES, COPY_BYTES, LANES, MAX_GROUPS, MAX_OPERANDS, RUN, STRIP, Ahead, Family,
    LaneParts, LaneSums, Row, clear_lanes, copy, even_margin, fill, least, transpose, two_sum,
)
from vecmath cimport INFINITY, larger, magnitude, real, smaller

cdef extern from "transpose.h" nogil:
    void copy_line(const char *line, npy_intp ahead, npy_intp n, char *into)
    void copy_lines(const char *line, npy_intp step, npy_intp count, npy_intp ahead, npy_intp n,
                    npy_intp together, char *into)
    void prefetch(const char *data, npy_intp n)
    void prefetch_far(const char *data, npy_intp n)

cdef enum:
    ROWS_AHEAD = 4             # 8 are no better

cdef enum Layout:
    COLUMNS            # elements of neighbouring rows side by side
    ROWS               # elements of each row side by side, to be transposed
    SCATTERED          # to be gathered

ctypedef struct Rows:
    Row first
    npy_intp outer[MAX_OPERANDS]     # bytes from one row to the next
    int layout[MAX_OPERANDS]
    int groups                       # of LANES rows
    int used                         # how many of these there are: all, or less than LANES
    bint gapless                     # whether each row begins where the one before ends
    bint in_lines                    # whether all operands lie in columns
    bint in_place                    # whether these are long, and not copied beforehand

ctypedef struct LaneTotals:
    LaneSums sums
    LaneSums rests               # what the rounding of these left out
    double shift[LANES]
    double peak[LANES]

ctypedef struct Band:
    Rows rows
    bint wanted[MAX_GROUPS]
    LaneParts parts[MAX_GROUPS]
    LaneTotals whole[MAX_GROUPS]     # of rows of more than one strip


cdef int layout_of(const Rows *rows, int operand, real of_type) noexcept nogil:
    if rows.used < LANES or rows.first.format != native_format(of_type):
        return Layout.SCATTERED
    if rows.outer[operand] == sizeof(real):
        return Layout.COLUMNS
    return Layout.ROWS if rows.first.step[operand] == sizeof(real) else Layout.SCATTERED


cdef void choose_layout(Rows *rows, int used, real of_type) noexcept nogil:
    cdef int operand
    rows.used, rows.groups = used, max(1, used // LANES)
    rows.gapless = rows.in_lines = True
    for operand in range(rows.first.n_operands):
        rows.layout[operand] = layout_of(rows, operand, of_type)
        rows.in_lines &= rows.layout[operand] == Layout.COLUMNS
        rows.gapless &= rows.layout[operand] == Layout.ROWS and (
            rows.outer[operand] == rows.first.length * <npy_intp> sizeof(real))
    rows.in_place = rows.in_lines and rows.first.length > STRIP


cdef inline int most_copied(int n_operands, npy_intp length, real of_type) noexcept nogil:
    """Groups of columns, as many as the buffer holds."""
    cdef int strip = <int> min(length, <npy_intp> STRIP)
    return min(<int> MAX_GROUPS, COPY_BYTES // (n_operands * strip * LANES * <int> sizeof(real)))


cdef inline void repeat(const real *x, int n, int groups, real *into, int width) noexcept nogil:
    """One row in place of each of so many groups of LANES."""
    cdef int i, group, lane
    for i in range(n):
        for group in range(groups):
            for lane in range(LANES):
                into[i * width + group * LANES + lane] = x[i]


cdef void gather(int format, const char *data, npy_intp outer, npy_intp step, int n, int used,
                 real *into, int width) noexcept nogil:
    """LANES rows anywhere as columns; the first instead of those from `used` on."""
    cdef real converted[LANES * STRIP]
    cdef int lane
    convert(format, data, step, n, converted)
    if outer == 0:
        repeat(converted, n, 1, into, width)
        return
    for lane in range(1, LANES):
        convert(format, data + (lane if lane < used else 0) * outer, step, n, converted + lane * n)
    transpose(converted, n, n, LANES, into, width)


cdef inline int strip_length(const Rows *rows, npy_intp start) noexcept nogil:
    return <int> min(<npy_intp> STRIP, rows.first.length - start)


cdef void load_lines(const Rows *rows, npy_intp start, int n, real *buffer, const real **x,
                     npy_intp *step) noexcept nogil:
    """Copies: lines of the cache a power of two apart would evict each other before all is read. Of
    all operands in turn, each asked for some rows ahead, beyond the last row in the next band:
    processors do not foresee the way from row to row."""
    cdef const Row *row = &rows.first
    cdef int operand, i, n_operands = row.n_operands, width = rows.groups * LANES
    cdef npy_intp ahead = min(row.length, <npy_intp> ROWS_AHEAD)
    cdef npy_intp line = width * sizeof(real), pitch = n * line
    cdef const char *data[MAX_OPERANDS]
    cdef npy_intp outer[MAX_OPERANDS]
    cdef char *into = <char *> buffer
    for operand in range(n_operands):
        outer[operand] = row.step[operand]
        data[operand] = row.data[operand] + start * outer[operand]
        x[operand], step[operand] = buffer + operand * n * width, width
    for i in range(n):
        for operand in range(n_operands):
            copy_line(data[operand], ahead * outer[operand] if start + i + ahead < row.length
                      else line - (row.length - ahead) * outer[operand], line,
                      into + operand * pitch)
            data[operand] += outer[operand]
        into += line


cdef void load_rows(const Rows *rows, int operand, npy_intp start, int n,
                    real *into) noexcept nogil:
    cdef const Row *row = &rows.first
    cdef npy_intp outer = rows.outer[operand]
    cdef const char *data = row.data[operand] + start * row.step[operand]
    cdef int group, width = rows.groups * LANES
    if rows.layout[operand] == Layout.ROWS:
        if outer == 0:
            repeat(<const real *> data, n, rows.groups, into, width)
        else:
            transpose(<const real *> data, outer // <npy_intp> sizeof(real), n, width, into, width)
        return
    for group in range(rows.groups):
        gather(row.format, data + group * LANES * outer, outer, row.step[operand], n, rows.used,
               into + group * LANES, width)


cdef inline void ask_for(Ahead *ahead, int operands, int n, real of_type) noexcept nogil:
    """Ask for what stands for n vectors of each operand, in small portions: memory delivers while
    there is arithmetic, and in a burst no load finds its place."""
    cdef int operand
    cdef npy_intp size = n * LANES * sizeof(real)
    if ahead == NULL:
        return
    for operand in range(operands):
        prefetch(ahead.data[operand], size)
        ahead.data[operand] += size


cdef inline void ask_along(Ahead *ahead, real of_type) noexcept nogil:
    """The same for a vector of two operands, wherever the next ones lie, into the second cache: 5
    to 8 % off logits from memory; others gain nothing by that."""
    cdef int operand
    if ahead == NULL:
        return
    for operand in range(2):
        prefetch_far(ahead.data[operand], LANES * sizeof(real))
        ahead.data[operand] += ahead.step[operand]


cdef inline npy_intp distance_ahead(npy_intp outer, npy_intp size, int operands) noexcept nogil:
    """Bytes from where a row of this size is read to what is asked for meanwhile: the same row
    further on, or one of those that follow, `outer` bytes apart. Processors' own requests end at
    pages of 4 KB, and what is asked for nearer than that only disturbs them: 2 KB ahead, rows of
    1000 floats take half again as long as 8 KB ahead. All that is on its way is to fit in a first
    cache."""
    cdef npy_intp distance = AHEAD_BYTES // operands
    return distance if size >= distance else (distance // max(size, <npy_intp> 1) + 1) * outer


cdef Ahead *rows_ahead(const Rows *rows, Ahead *ahead) noexcept nogil:
    """The rows of the next band, if those of this one follow each other: processors do not foresee
    the way through them. NULL: they do not, or are long."""
    cdef const Row *row = &rows.first
    cdef int operand
    if not rows.gapless or row.length > STRIP:
        return NULL
    for operand in range(row.n_operands):
        ahead.data[operand] = row.data[operand] + rows.used * rows.outer[operand]
        ahead.step[operand] = LANES * row.step[operand]
    return ahead


cdef inline void prefetch_columns(const real *x, npy_intp step, int n, int ahead) noexcept nogil:
    """Ask for so many columns after n of them: processors do not foresee the way from line to
    line. Once for each line."""
    cdef int i
    if <size_t> x % 64 >= LANES * sizeof(real):
        return
    for i in range(n, n + ahead):
        prefetch_far(<const char *> (x + i * step), LANES * sizeof(real))


cdef void load_strip(const Rows *rows, npy_intp start, int n, real *buffer, const real **x,
                     npy_intp *step) noexcept nogil:
    """n elements of each row as columns, `step` elements apart: in the buffer, or in place."""
    cdef const Row *row = &rows.first
    cdef int operand, width = rows.groups * LANES
    if rows.in_lines and not rows.in_place:
        load_lines(rows, start, n, buffer, x, step)
        return
    for operand in range(row.n_operands):
        if rows.layout[operand] == Layout.COLUMNS:
            x[operand] = <const real *> (row.data[operand] + start * row.step[operand])
            step[operand] = row.step[operand] // <npy_intp> sizeof(real)
        else:
            load_rows(rows, operand, start, n, buffer)
            x[operand], step[operand] = buffer, width
            buffer += n * width


cdef void columns(const Rows *rows, const real **x, const npy_intp *step, int n, int groups,
                  int together, real *buffer, Ahead *ahead, LaneParts *into) noexcept nogil:
    """Add n columns of groups that lie side by side: `together` of each group, then the next. The
    buffer is free where rows are read in place."""
    cdef const Row *row = &rows.first
    cdef const real *at[2]
    cdef int group
    if row.family == Family.NORMAL:
        normal_columns(x, step, n, groups, together, row, into)
    elif row.family == Family.DISCRETE:
        discrete_columns(x, step, n, groups, together, row.normalize, ahead, into)
    elif rows.in_place:
        categorical_lines(x, step, n, groups, buffer, into)
    else:
        for group in range(groups):
            at[0], at[1] = x[0] + group * LANES, x[1] + group * LANES
            categorical_columns(at, step, n, ahead, &into[group])


# Strips of LANES rows, put together side by side as add_part does it for one row.

cdef inline void add_exactly(double *sums, const double *terms, double *rests) noexcept nogil:
    cdef int lane
    for lane in range(LANES):
        sums[lane] = two_sum(sums[lane], terms[lane], &rests[lane])


cdef inline void exp_lanes(const double *x, const double *rests, double *into) noexcept nogil:
    cdef int lane
    for lane in range(LANES):
        into[lane] = clamped_exp(x[lane], rests[lane])


cdef inline void phi_lanes(const double *x, const double *rests, double *into) noexcept nogil:
    cdef int lane
    for lane in range(LANES):
        into[lane] = clamped_phi(x[lane], rests[lane])


cdef inline bint differ(const double *x, const double *y) noexcept nogil:
    cdef double apart[LANES]
    cdef int lane
    for lane in range(LANES):
        apart[lane] = 0 if x[lane] == y[lane] else 1
    return largest(apart) > 0


cdef void rebase(LaneSums *sums, LaneSums *rests, const double *shift, const double *peak,
                 const double *beta, const double *new_shift,
                 const double *new_peak) noexcept nogil:
    """Make sums relative to another shift and peak. The same bits where neither differs."""
    cdef int lane
    cdef double mixed, gain
    cdef double d[LANES]
    cdef double d_rest[LANES]
    cdef double fall[LANES]
    cdef double fall_rest[LANES]
    cdef double both[LANES]
    cdef double both_rest[LANES]
    cdef double factor[LANES]
    cdef double grown[LANES]
    cdef double between[LANES]
    for lane in range(LANES):
        d[lane] = exponent(new_shift[lane], shift[lane], beta[lane], &d_rest[lane])
        fall[lane] = exponent(peak[lane], new_peak[lane], beta[lane], &fall_rest[lane])
        both_rest[lane] = fall_rest[lane] + d_rest[lane]
        both[lane] = two_sum(fall[lane], d[lane], &both_rest[lane])
    exp_lanes(fall, fall_rest, factor)
    exp_lanes(both, both_rest, grown)
    phi_lanes(d, d_rest, between)
    for lane in range(LANES):
        gain = grown[lane] - factor[lane]  # by e^d - 1 = phi(d) + d, where it would cancel
        gain = gain if magnitude(d[lane]) > 0.5 else factor[lane] * (between[lane] + d[lane])
        mixed = factor[lane] * between[lane] * sums.weight[lane] + gain * sums.drift[lane]
        mixed = mixed if sums.weight[lane] > 0 else 0
        sums.divergence[lane] = grown[lane] * sums.divergence[lane] + mixed
        sums.drift[lane] = factor[lane] * (sums.drift[lane] + d[lane] * sums.weight[lane])
        sums.weight[lane] *= factor[lane]
        rests.divergence[lane] *= grown[lane]
        rests.drift[lane] *= factor[lane]
        rests.weight[lane] *= factor[lane]


cdef void common_peaks(const LaneTotals *whole, const LaneParts *part,
                       double *peaks) noexcept nogil:
    """The higher one of those that have a weight."""
    cdef double peak
    cdef int lane
    for lane in range(LANES):
        peak = whole.peak[lane] if whole.sums.weight[lane] > 0 else -INFINITY
        peak = larger(peak, part.peak[lane] if part.sums.weight[lane] > 0 else -INFINITY)
        peaks[lane] = peak if peak > -INFINITY else 0


cdef void shares_of(const double *peaks, const double *common, const double *beta,
                    double *shares) noexcept nogil:
    """What a weight relative to a peak is relative to the common one."""
    cdef double falls[LANES]
    cdef double zeros[LANES]
    cdef int lane
    fill(shares, 1.0)
    if differ(peaks, common):
        fill(zeros, 0.0)
        for lane in range(LANES):
            falls[lane] = (peaks[lane] - common[lane]) * beta[lane]
        exp_lanes(falls, zeros, shares)


cdef void common_shifts(const LaneTotals *whole, const LaneParts *part, const double *peaks,
                        double *shifts) noexcept nogil:
    """The whole's, as each change of it rounds all sums, while (E_P[y])^2, twice what the
    correction takes from E_P[phi(y)], is at most a 16th of that, and of 1; else the mean of all."""
    cdef double weight, drift, divergence, mean, most
    cdef double share[LANES]
    cdef double share_added[LANES]
    cdef const LaneSums *sums = &whole.sums
    cdef const LaneSums *added = &part.sums
    cdef int lane
    shares_of(whole.peak, peaks, part.beta, share)
    shares_of(part.peak, peaks, part.beta, share_added)
    for lane in range(LANES):
        weight = share_added[lane] * added.weight[lane]
        drift = share[lane] * sums.drift[lane] + share_added[lane] * added.drift[lane]
        divergence = share[lane] * sums.divergence[lane] + (
            share_added[lane] * added.divergence[lane])
        mean = weight * (part.shift[lane] - whole.shift[lane]) - drift / part.beta[lane]
        weight += share[lane] * sums.weight[lane]
        mean = mean / weight if weight > 0 else 0
        most = smaller(divergence / weight, 1.0) / 16
        shifts[lane] = whole.shift[lane] + (
            0 if (mean * part.beta[lane]) * (mean * part.beta[lane]) <= most else mean)


cdef void take_common(LaneTotals *whole, const LaneParts *part, LaneSums *added) noexcept nogil:
    """Make a whole and what is to be added to it relative to the same shifts and peaks. By the
    chain rule of divergences, nothing cancels."""
    cdef double shifts[LANES]
    cdef double peaks[LANES]
    cdef LaneSums rests
    clear_lanes(&rests)
    common_peaks(whole, part, peaks)
    common_shifts(whole, part, peaks, shifts)
    if differ(shifts, whole.shift) or differ(peaks, whole.peak):
        rebase(&whole.sums, &whole.rests, whole.shift, whole.peak, part.beta, shifts, peaks)
        copy(shifts, whole.shift)
        copy(peaks, whole.peak)
    rebase(added, &rests, part.shift, part.peak, part.beta, shifts, peaks)


cdef void add_strip(LaneTotals *whole, const LaneParts *part, bint first,
                    bint shifted) noexcept nogil:
    """`shifted`: relative to a shift and a peak of its own."""
    cdef LaneSums added = part.sums
    if first:
        whole.sums = added
        copy(part.shift, whole.shift)
        copy(part.peak, whole.peak)
        clear_lanes(&whole.rests)
        copy(added.rest, whole.rests.drift)
        return
    if shifted:
        take_common(whole, part, &added)
    add_exactly(whole.sums.weight, added.weight, whole.rests.weight)
    add_exactly(whole.sums.divergence, added.divergence, whole.rests.divergence)
    add_exactly(whole.sums.drift, added.drift, whole.rests.drift)
    add_exactly(whole.sums.drift, added.rest, whole.rests.drift)
    add_exactly(whole.sums.direct, added.direct, whole.rests.direct)


cdef inline void take_whole(const LaneTotals *whole, LaneParts *parts) noexcept nogil:
    cdef int lane
    for lane in range(LANES):
        parts.sums.weight[lane] = whole.sums.weight[lane] + whole.rests.weight[lane]
        parts.sums.divergence[lane] = whole.sums.divergence[lane] + whole.rests.divergence[lane]
        parts.sums.drift[lane] = whole.sums.drift[lane] + whole.rests.drift[lane]
        parts.sums.direct[lane] = whole.sums.direct[lane] + whole.rests.direct[lane]
        parts.sums.rest[lane] = 0
        parts.shift[lane], parts.peak[lane] = whole.shift[lane], whole.peak[lane]


# A band.

cdef inline bint all_wanted(const Band *band) noexcept nogil:
    cdef int group
    for group in range(band.rows.groups):
        if not band.wanted[group]:
            return False
    return True


cdef void sum_strip(Band *band, int n, const real **x, const npy_intp *step, int together,
                    real *buffer, Ahead *ahead) noexcept nogil:
    """The sums of n columns, of the groups that are wanted."""
    cdef const real *at[MAX_OPERANDS]
    cdef int i, group = 0, operand, groups = band.rows.groups if all_wanted(band) else 1
    while group < band.rows.groups:
        if band.wanted[group]:
            for operand in range(band.rows.first.n_operands):
                at[operand] = x[operand] + group * LANES
            for i in range(group, group + groups):
                clear_lanes(&band.parts[i].sums)
            columns(&band.rows, at, step, n, groups, together, buffer, ahead, &band.parts[group])
        group += groups


cdef inline int columns_together() noexcept nogil:
    """Of a group, of those that are read where they lie: a run; on AVX-512 half of one, 0.55 in
    place of 0.62 ns an element for weights from memory, though from the last cache floats take a
    tenth less by whole ones."""
    return min(<int> RUN, 64 // LANES)


cdef void sum_band(Band *band, real *buffer, const real **x, npy_intp *step,
                   Ahead *ahead) noexcept nogil:
    """The sums of the groups that are wanted."""
    cdef const Row *row = &band.rows.first
    cdef npy_intp start = 0
    cdef int n, group, together = columns_together() if band.rows.in_place else STRIP
    if row.length <= STRIP:
        load_strip(&band.rows, 0, <int> row.length, buffer, x, step)
        sum_strip(band, <int> row.length, x, step, <int> row.length, buffer, ahead)
        return
    while start < row.length:
        n = strip_length(&band.rows, start)
        load_strip(&band.rows, start, n, buffer, x, step)
        sum_strip(band, n, x, step, together, buffer, NULL)
        for group in range(band.rows.groups):
            if band.wanted[group]:
                add_strip(&band.whole[group], &band.parts[group], start == 0,
                          row.family == Family.CATEGORICAL)
        start += n
    for group in range(band.rows.groups):
        if band.wanted[group]:
            take_whole(&band.whole[group], &band.parts[group])


cdef bint sum_gapless(Band *band, real of_type) noexcept nogil:
    """The same from where the rows lie; False where it cannot be had."""
    cdef const Row *row = &band.rows.first
    cdef const real *x[MAX_OPERANDS]
    cdef int operand
    if row.family != Family.NORMAL or not band.rows.gapless:
        return False
    for operand in range(MAX_OPERANDS):
        x[operand] = <const real *> row.data[operand]
    return normal_gapless(x, <int> row.length, band.rows.groups, row, band.parts)


cdef inline void finish_lanes_of(const Row *row, const LaneParts *parts, int groups,
                                 double *values, double *conditions,
                                 bint even=False) noexcept nogil:
    cdef double value[LANES]
    cdef double condition[LANES]
    cdef const LaneSums *sums
    cdef int group, lane
    for group in range(groups):
        sums = &parts[group].sums
        for lane in range(LANES):
            condition[lane] = finish(
                row, &value[lane], sums.weight[lane], sums.divergence[lane],
                sums.drift[lane] + sums.rest[lane], sums.direct[lane], even)
            condition[lane] = condition[lane] if condition[lane] >= 0 else -1  # NaN too
            condition[lane] = condition[lane] if parts[group].doubtful[lane] == 0 else -1
        copy(value, values + group * LANES)
        copy(condition, conditions + group * LANES)


cdef bint all_even(const LaneParts *parts, int groups) noexcept nogil:
    cdef double margin[LANES]
    cdef const LaneSums *sums
    cdef int group, lane
    fill(margin, 0.0)
    for group in range(groups):
        sums = &parts[group].sums
        for lane in range(LANES):
            margin[lane] = smaller(
                even_margin(sums.weight[lane], sums.divergence[lane], sums.drift[lane]),
                margin[lane])
    return least(margin) >= 0


cdef void finish_lanes(const Row *row, const LaneParts *parts, int groups, double *values,
                       double *conditions) noexcept nogil:
    """As `finish`, for groups of LANES rows; each case apart, so that each is packed."""
    cdef Row fixed = row[0]
    fixed.family, fixed.normalize, fixed.length = Family.DISCRETE, True, 2
    if row.family == Family.NORMAL:
        fixed.family = Family.NORMAL
        finish_lanes_of(&fixed, parts, groups, values, conditions)
    elif not row.normalize:
        fixed.normalize = False
        finish_lanes_of(&fixed, parts, groups, values, conditions)
    elif row.length == 1:
        fixed.length = 1
        finish_lanes_of(&fixed, parts, groups, values, conditions)
    elif row.family == Family.CATEGORICAL:
        fixed.family = Family.CATEGORICAL
        finish_lanes_of(&fixed, parts, groups, values, conditions)
    elif all_even(parts, groups):
        finish_lanes_of(&fixed, parts, groups, values, conditions, True)
    else:
        finish_lanes_of(&fixed, parts, groups, values, conditions)


cdef inline void choose_ratios(LaneParts *parts, const double *conditions) noexcept nogil:
    """Of badly conditioned rows."""
    cdef int lane
    for lane in range(LANES):
        if conditions[lane] < 0:
            discrete_refine(parts.sums.weight[lane], parts.sums.divergence[lane],
                            parts.sums.drift[lane], &parts.ratio[lane])
            parts.ratio[lane] = usable(parts.ratio[lane])
    parts.scaled = True


cdef inline void finish_again(const Row *row, const LaneParts *parts, double *values,
                              double *conditions) noexcept nogil:
    """The values of rows that were badly conditioned."""
    cdef double new_values[LANES]
    cdef double new_conditions[LANES]
    cdef int lane
    finish_lanes(row, parts, 1, new_values, new_conditions)
    for lane in range(LANES):
        if conditions[lane] < 0:
            values[lane], conditions[lane] = new_values[lane], new_conditions[lane]


cdef inline bint all_good(const double *conditions) noexcept nogil:
    return least(conditions) >= 0


cdef inline void begin_parts(LaneParts *parts) noexcept nogil:
    cdef int lane
    parts.scaled = False
    for lane in range(LANES):
        parts.ratio[lane] = 1
        parts.shift[lane] = parts.peak[lane] = 0
        parts.doubtful[lane] = 0


cdef inline void begin_band(Band *band) noexcept nogil:
    cdef int group
    for group in range(band.rows.groups):
        begin_parts(&band.parts[group])
        if band.rows.first.family == Family.CATEGORICAL:  # no others are looked at
            fill(band.parts[group].apart, 1.0 if band.rows.in_place else 0.0)
        band.wanted[group] = True


cdef inline bint can_refine(const Row *row) noexcept nogil:
    return row.family == Family.DISCRETE and row.normalize


cdef void refine_band(Band *band, real *buffer, const real **x, npy_intp *step, double *values,
                      double *conditions) noexcept nogil:
    """Badly conditioned rows again, with the ratios that their sums give."""
    cdef int group
    cdef bint refine = False
    for group in range(band.rows.groups):
        band.wanted[group] = not all_good(conditions + group * LANES)
        if band.wanted[group]:
            choose_ratios(&band.parts[group], conditions + group * LANES)
            refine = True
    if not refine:
        return
    sum_band(band, buffer, x, step, NULL)
    for group in range(band.rows.groups):
        if band.wanted[group]:
            finish_again(&band.rows.first, &band.parts[group], values + group * LANES,
                         conditions + group * LANES)


cdef void band_values(Band *band, double *values, double *conditions, real of_type) noexcept nogil:
    """The values of all rows; those with a negative condition the fast formulas do not vouch
    for."""
    cdef double buffer[COPY_BYTES / 8]
    cdef const Row *row = &band.rows.first
    cdef const real *x[MAX_OPERANDS]
    cdef npy_intp step[MAX_OPERANDS]
    cdef Ahead next_band
    cdef Ahead *ahead = rows_ahead(&band.rows, &next_band)
    begin_band(band)
    if not sum_gapless(band, of_type):
        sum_band(band, <real *> buffer, x, step, ahead)
    finish_lanes(row, band.parts, band.rows.groups, values, conditions)
    if can_refine(row):
        refine_band(band, <real *> buffer, x, step, values, conditions)
