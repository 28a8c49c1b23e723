"""Print the polynomial coefficients of src/vecmath.h and the error each leaves.

Each polynomial interpolates its function at Chebyshev nodes in 60-digit arithmetic, which is
within a few per cent of the best approximation of that degree; coefficients are then rounded.

Run:  python tools/polynomials.py      (needs mpmath)
"""

import mpmath as mp

mp.mp.dps = 60


def exp_tail(r):
    """(exp(r) - 1 - r) / r**2, the factor Q of phi(r) = r**2 * Q(r)."""
    return mp.fsum(r**k / mp.factorial(k + 2) for k in range(60))


def atanh_tail(u):
    """(2*atanh(s) - 2*s) / s**3 as a function of u = s**2."""
    return mp.fsum(2 * u**k / (2 * k + 3) for k in range(120))


def interpolate(function, low, high, degree):
    nodes = [
        (low + high) / 2 + (high - low) / 2 * mp.cos(mp.pi * (2 * i + 1) / (2 * degree + 2))
        for i in range(degree + 1)
    ]
    vandermonde = mp.matrix([[x**k for k in range(degree + 1)] for x in nodes])
    return list(mp.lu_solve(vandermonde, mp.matrix([function(x) for x in nodes])))


def largest_relative_error(function, coefficients, low, high, points=2000):
    grid = [low + (high - low) * i / points for i in range(points + 1)]
    return max(abs(mp.polyval(coefficients[::-1], x) / function(x) - 1) for x in grid)


def report(name, function, low, high, degree):
    coefficients = interpolate(function, mp.mpf(low), mp.mpf(high), degree)
    error = largest_relative_error(function, coefficients, mp.mpf(low), mp.mpf(high))
    print(f"{name}, degree {degree} on [{low}, {high}]: relative error {mp.nstr(error, 3)}")
    for k, c in enumerate(coefficients):
        print(f"    c{k} = {float(c)!r}")


if __name__ == "__main__":
    half_ln2 = 0.3466  # exp reduces to |r| <= ln(2)/2 plus rounding
    for degree in (4, 5, 9, 10):
        report("exp_tail", exp_tail, -half_ln2, half_ln2, degree)
    for degree in (2, 6):
        report("atanh_tail", atanh_tail, 0, 0.0403, degree)
