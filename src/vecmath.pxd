"""vecmath.h for fused types: name(x) is name_f32(x) or name_f64(x)."""

from libc.math cimport fabs, fabsf
from numpy cimport npy_intp

ctypedef fused real:
    float
    double

ctypedef fused wide:  # another one, as wide or not
    float
    double

cdef extern from "vecmath.h" nogil:
    float exp_f32(float x, float rest)
    double exp_f64(double x, double rest)
    double exp_pair_f64(double x, double *rest)
    float phi_f32(float x, float rest)
    double phi_f64(double x, double rest)
    float phi_near_f32(float x)
    double phi_near_f64(double x)
    float phi_and_expm1_f32(float x, float *grown)
    double phi_and_expm1_f64(double x, double *grown)
    float expm1_f32(float x, float rest)
    double expm1_f64(double x, double rest)
    float UNIT_LN2_F32
    double UNIT_LN2_F64
    float ratio_units_f32(float x, float y)
    double ratio_units_f64(double x, double y)
    double ratio_exponent "ratio_exponent_f64" (double x, double y)
    float times_power_f32(float n, float x, float y)
    double times_power_f64(double n, double x, double y)
    float at_least_f32(float low, float x)
    double at_least_f64(double low, double x)
    float atanh_tail_f32(float s)
    double atanh_tail_f64(double s)
    float plus_product_f32(float a, float b, float c)
    double plus_product_f64(double a, double b, double c)
    float residual_product_f32(float a, float b, float c)
    double residual_product_f64(double a, double b, double c)
    float from_float16(unsigned short bits)
    float from_bfloat16(unsigned short bits)
    void floats_from_float16(const unsigned short *bits, npy_intp n, float *into)
    void floats_from_bfloat16(const unsigned short *bits, npy_intp n, float *into)
    double INFINITY
    double NAN
    double LN2 "0.6931471805599453"
    double LN2_HIGH "0x1.62e42fep-1"     # products with integers of 24 bits are exact
    double LN2_LOW "0x1.f473de6af278fp-30"


cdef inline real exp(real x, real rest) noexcept nogil:
    if real is float:
        return exp_f32(x, rest)
    else:
        return exp_f64(x, rest)


cdef inline real phi(real x, real rest) noexcept nogil:
    if real is float:
        return phi_f32(x, rest)
    else:
        return phi_f64(x, rest)


cdef inline real phi_near(real x) noexcept nogil:
    if real is float:
        return phi_near_f32(x)
    else:
        return phi_near_f64(x)


cdef inline real phi_and_expm1(real x, real *grown) noexcept nogil:
    if real is float:
        return phi_and_expm1_f32(x, grown)
    else:
        return phi_and_expm1_f64(x, grown)


cdef inline real expm1(real x, real rest) noexcept nogil:
    if real is float:
        return expm1_f32(x, rest)
    else:
        return expm1_f64(x, rest)


cdef inline real times_power(real n, real x, real y) noexcept nogil:
    if real is float:
        return times_power_f32(n, x, y)
    else:
        return times_power_f64(n, x, y)


cdef inline real ratio_units(real x, real y) noexcept nogil:
    if real is float:
        return ratio_units_f32(x, y)
    else:
        return ratio_units_f64(x, y)


cdef inline real unit_ln2(real of_type) noexcept nogil:
    if real is float:
        return UNIT_LN2_F32
    else:
        return UNIT_LN2_F64


cdef inline real ratio_log(real x, real y) noexcept nogil:
    """e ln 2 for the e of ratio_units; half an ulp of ln 2."""
    return ratio_units(x, y) * unit_ln2(x)


cdef inline real match_exponent(real x, real y) noexcept nogil:
    return times_power(y, x, y)


cdef inline real at_least(real low, real x) noexcept nogil:
    if real is float:
        return at_least_f32(low, x)
    else:
        return at_least_f64(low, x)


cdef inline real atanh_tail(real s) noexcept nogil:
    if real is float:
        return atanh_tail_f32(s)
    else:
        return atanh_tail_f64(s)


cdef inline real plus_product(real a, real b, real c) noexcept nogil:
    if real is float:
        return plus_product_f32(a, b, c)
    else:
        return plus_product_f64(a, b, c)


cdef inline real residual_product(real a, real b, real c) noexcept nogil:
    if real is float:
        return residual_product_f32(a, b, c)
    else:
        return residual_product_f64(a, b, c)


cdef inline real larger(real x, real y) noexcept nogil:
    return x if x > y else y


cdef inline real smaller(real x, real y) noexcept nogil:
    return x if x < y else y


cdef inline real magnitude(real x) noexcept nogil:
    if real is float:
        return fabsf(x)
    else:
        return fabs(x)
