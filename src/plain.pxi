"""Calls that need no preparation: ndarrays of one dtype, float32 or float64, as they come.

One distribution alone goes straight to its kernel: NumPy's machinery for gufuncs takes longer than
the divergence of a few elements. So do rows given by their addresses, from those who need no NumPy.
"""

from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.stdint cimport uintptr_t

cdef extern from "numpy/arrayobject.h":
    object PyArray_Scalar(void *data, cnp.PyArray_Descr *dtype, object base)

cdef extern from "Python.h":
    int Py_MakePendingCalls() except -1

cdef union Result:
    float of_float
    double of_double


cdef inline bint has_nan(const real *values, npy_intp n) noexcept nogil:
    """To the end, whatever comes: in vectors."""
    cdef npy_intp i
    cdef bint nan = False
    for i in range(n):
        nan |= values[i] != values[i]
    return nan


cdef class Plain:
    """A gufunc for such arrays. Called, it gives the result, in `out` if that is given, or None
    where the long way is needed: for other arrays, for those that do not fit together, for results
    that want an explanation."""
    cdef object gufunc
    cdef const Kernel *kernel_f32
    cdef const Kernel *kernel_f64
    cdef int n_arrays                 # operands beyond these are Python floats
    cdef int core_axes[MAX_OPERANDS]  # axes that belong to one distribution
    cdef bint explains_nan            # NaN may have a cause that only the long way tells

    def __call__(self, *operands, out=None):
        cdef int number = -1, batch_axes = 0, i
        cdef cnp.ndarray x
        if len(operands) < self.n_arrays:
            return None
        for i in range(self.n_arrays):
            if not cnp.PyArray_CheckExact(operands[i]):
                return None
            x = <cnp.ndarray> operands[i]
            if not cnp.PyArray_ISBEHAVED_RO(x):
                return None
            if number < 0:
                number = cnp.PyArray_TYPE(x)
            if cnp.PyArray_TYPE(x) != number or cnp.PyArray_NDIM(x) < self.core_axes[i]:
                return None
            batch_axes = max(batch_axes, cnp.PyArray_NDIM(x) - self.core_axes[i])
        if number != cnp.NPY_FLOAT and number != cnp.NPY_DOUBLE:
            return None
        if out is not None and not self.holds(out, operands, number, batch_axes):
            return None
        if batch_axes == 0:
            return self.of_one(operands, number, out)
        if batch_axes > 1:
            return None
        return self.of_items(operands, number, out) if self.explains_nan else (
            self.of_batch(operands, out))

    cdef bint holds(self, object out, tuple operands, int number, int batch_axes):
        """Whether `out` has the dtype and the shape of the result, no larger one either."""
        cdef npy_intp batch = 1
        cdef int i
        cdef cnp.ndarray x
        if not cnp.PyArray_CheckExact(out) or not cnp.PyArray_ISBEHAVED(<cnp.ndarray> out):
            return False
        if cnp.PyArray_TYPE(<cnp.ndarray> out) != number or (
                cnp.PyArray_NDIM(<cnp.ndarray> out) != batch_axes):
            return False
        if len(operands) > self.n_arrays and type(operands[self.n_arrays]) is not float:
            return False
        for i in range(self.n_arrays if batch_axes == 1 else 0):
            x = <cnp.ndarray> operands[i]
            if cnp.PyArray_NDIM(x) > self.core_axes[i]:
                batch = max(batch, cnp.PyArray_DIM(x, 0))
        return batch_axes == 0 or cnp.PyArray_DIM(<cnp.ndarray> out, 0) == batch

    cdef object of_batch(self, tuple operands, object out):
        try:
            return self.gufunc(*operands, out=out)
        except ValueError:
            return None

    cdef bint place(self, tuple operands, const Kernel *kernel, char **data, npy_intp *sizes,
                    npy_intp *steps):
        """Addresses, sizes and strides of arrays of one batch axis or none, as the kernel's loop
        takes them; False where they do not fit together."""
        cdef int i, axis, batch_axes, n_steps = kernel.n_operands
        cdef cnp.ndarray x = <cnp.ndarray> operands[0]
        sizes[0], sizes[1] = 1, cnp.PyArray_DIM(x, cnp.PyArray_NDIM(x) - 1)
        for i in range(self.n_arrays):
            x = <cnp.ndarray> operands[i]
            batch_axes = cnp.PyArray_NDIM(x) - self.core_axes[i]
            data[i], steps[i] = cnp.PyArray_BYTES(x), 0
            if batch_axes == 1 and cnp.PyArray_DIM(x, 0) != 1:
                if sizes[0] != 1 and sizes[0] != cnp.PyArray_DIM(x, 0):
                    return False
                sizes[0], steps[i] = cnp.PyArray_DIM(x, 0), cnp.PyArray_STRIDE(x, 0)
            for axis in range(batch_axes, cnp.PyArray_NDIM(x)):
                if cnp.PyArray_DIM(x, axis) != sizes[1]:
                    return False
                steps[n_steps] = cnp.PyArray_STRIDE(x, axis)
                n_steps += 1
        return True

    cdef object of_items(self, tuple operands, int number, object out):
        """One batch axis, straight to the kernel: what NaN mean is asked before NumPy reports them.
        """
        cdef const Kernel *kernel = self.kernel_f64 if number == cnp.NPY_DOUBLE else self.kernel_f32
        cdef char *data[MAX_OPERANDS + 1]
        cdef npy_intp sizes[2]
        cdef npy_intp steps[4 * MAX_OPERANDS]
        cdef cnp.ndarray values
        cdef bint nan
        if not self.place(operands, kernel, data, sizes, steps):
            return None
        values = cnp.PyArray_EMPTY(1, sizes, number, 0)
        data[self.n_arrays] = cnp.PyArray_BYTES(values)
        steps[self.n_arrays] = cnp.PyArray_STRIDE(values, 0)
        if not gufunc_loop(data, sizes, steps, kernel):
            return None
        Py_MakePendingCalls()  # after Ctrl-C values are anything
        if number == cnp.NPY_DOUBLE:
            nan = has_nan(<double *> data[self.n_arrays], sizes[0])
        else:
            nan = has_nan(<float *> data[self.n_arrays], sizes[0])
        if nan:
            return None
        if out is None:
            return values
        cnp.PyArray_CopyInto(<cnp.ndarray> out, values)
        return out

    cdef object of_one(self, tuple operands, int number, object out):
        cdef const Kernel *kernel = self.kernel_f64 if number == cnp.NPY_DOUBLE else self.kernel_f32
        cdef char *data[MAX_OPERANDS + 1]
        cdef npy_intp sizes[2]
        cdef npy_intp steps[4 * MAX_OPERANDS]
        cdef Result result
        cdef double number_operand = 1
        cdef object temperature
        if not self.place(operands, kernel, data, sizes, steps):
            return None
        if kernel.n_operands - 1 > self.n_arrays:
            temperature = operands[self.n_arrays]
            if type(temperature) is not float:
                return self.of_batch(operands, out)
            number_operand = temperature
            data[self.n_arrays], steps[self.n_arrays] = <char *> &number_operand, 0
        data[kernel.n_operands - 1], steps[kernel.n_operands - 1] = <char *> &result, 0
        if not gufunc_loop(data, sizes, steps, kernel):
            return None
        Py_MakePendingCalls()  # after Ctrl-C the value is anything
        cdef double value = result.of_double if number == cnp.NPY_DOUBLE else result.of_float
        if value != value:  # NumPy reports bad values
            return None if self.explains_nan else self.of_batch(operands, out)
        if out is None:
            return PyArray_Scalar(&result, cnp.PyArray_DESCR(<cnp.ndarray> operands[0]), None)
        if number == cnp.NPY_DOUBLE:
            (<double *> cnp.PyArray_DATA(<cnp.ndarray> out))[0] = result.of_double
        else:
            (<float *> cnp.PyArray_DATA(<cnp.ndarray> out))[0] = result.of_float
        return out


cdef object make_plain(object gufunc, str signature, const Kernel *kernel_f32,
                       const Kernel *kernel_f64, bint explains_nan=False):
    """`signature` as that of the gufunc, with one letter an axis."""
    cdef Plain plain = Plain.__new__(Plain)
    cdef int i
    cores = [core.count(",") + 1 for core in signature.split("->")[0][1:-1].split("),(") if core]
    plain.gufunc, plain.kernel_f32, plain.kernel_f64 = gufunc, kernel_f32, kernel_f64
    plain.n_arrays, plain.explains_nan = len(cores), explains_nan
    for i in range(plain.n_arrays):
        plain.core_axes[i] = cores[i]
    return plain


def are_plain(*arrays):
    """Whether all are ndarrays of float32 or all of float64, with one axis or two."""
    cdef object x
    cdef int number = -1
    for x in arrays:
        if not cnp.PyArray_CheckExact(x) or not 0 < cnp.PyArray_NDIM(x) <= 2:
            return False
        if number < 0:
            number = cnp.PyArray_TYPE(x)
        if cnp.PyArray_TYPE(x) != number:
            return False
    return number == cnp.NPY_FLOAT or number == cnp.NPY_DOUBLE


cdef class Direct:
    """A kernel of rows for those who know where rows lie: one after the other without gaps, those
    of all arrays alike. NaN come without a word."""
    cdef const Kernel *kernel_f32
    cdef const Kernel *kernel_f64
    cdef int n_arrays
    cdef int n_numbers       # operands after them that have no core axis
    cdef int n_gradients

    def __call__(self, bint in_double, npy_intp n, npy_intp length, tuple arrays, tuple numbers,
                 uintptr_t values, tuple gradients=()):
        """The sum of the values of n rows, in double. Arrays and results are addresses, `values` 0
        where they are not wanted; numbers are floats, or addresses of n doubles."""
        cdef const Kernel *kernel = self.kernel_f64 if in_double else self.kernel_f32
        cdef npy_intp size = sizeof(double) if in_double else sizeof(float)
        cdef char *data[3 * MAX_OPERANDS]
        cdef npy_intp sizes[2]
        cdef npy_intp steps[6 * MAX_OPERANDS]
        cdef double constants[MAX_OPERANDS]
        cdef double total = 0, rest = 0
        cdef void *scratch = NULL
        cdef npy_intp row
        cdef int i, at = 0, inner = kernel.n_operands
        if len(arrays) != self.n_arrays or len(numbers) != self.n_numbers or (
                len(gradients) != self.n_gradients):
            raise TypeError("operands that the kernel does not have")
        sizes[0], sizes[1] = n, length
        for i in range(self.n_arrays):
            data[at] = <char *> <uintptr_t> arrays[i]
            steps[at], steps[inner] = length * size, size
            at, inner = at + 1, inner + 1
        for i in range(self.n_numbers):
            if type(numbers[i]) is float:
                constants[i] = numbers[i]
                data[at], steps[at] = <char *> &constants[i], 0
            else:
                data[at], steps[at] = <char *> <uintptr_t> numbers[i], sizeof(double)
            at += 1
        if values == 0:
            scratch = PyMem_Malloc(max(n, 1) * size)
            if scratch == NULL:
                raise MemoryError
            values = <uintptr_t> scratch
        data[at], steps[at] = <char *> values, size
        at += 1
        for i in range(self.n_gradients):
            data[at] = <char *> <uintptr_t> gradients[i]
            steps[at], steps[inner] = length * size, size
            at, inner = at + 1, inner + 1
        gufunc_loop(data, sizes, steps, kernel)
        report_status(0)
        for row in range(n):
            total = two_sum(total, (<double *> values)[row] if in_double else (
                <float *> values)[row], &rest)
        PyMem_Free(scratch)
        # beyond infinity the rest is not a number
        return total + rest if total - total == 0 else total


cdef object make_direct(const Kernel *kernel_f32, const Kernel *kernel_f64, int n_arrays,
                        int n_numbers, int n_gradients):
    cdef Direct direct = Direct.__new__(Direct)
    direct.kernel_f32, direct.kernel_f64 = kernel_f32, kernel_f64
    direct.n_arrays, direct.n_numbers, direct.n_gradients = n_arrays, n_numbers, n_gradients
    return direct
