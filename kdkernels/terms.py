"""The terms of the divergences in the form that loses no digits, as plain arithmetic: the eager and the
Triton backend run the same lines, with functions like `psi` and `where` handed in. csrc/math has their C++
twin.

Per row: teacher p = softmax(v / T), student q = softmax(z / T), and d = log q - log p, always student minus
teacher. With psi(x) = e^x - 1 - x there are two families, both sums of terms of one sign, which is what keeps
their digits when d is small: at high temperature, or when the student has become the teacher.

The power family (`power_terms`, `power_closed`), of order a, with tilt b = 1 - a:

    t = p^a q^(1 - a) = p e^{b d},    R = sum t
    f(d) = (psi(d) - psi(b d) / b) / (1 - b),    F = sum p f(d) >= 0

so that R = 1 - b (1 - b) F; order 1 is F = sum p psi(d) (`kl_terms`). The family "alpha" is F, "renyi" is
-log(R) / b.

The mixture family (`mixture_term`): c_p KL(p, m) + c_q KL(q, m) with m = (1 - mix) p + mix q.
"""

from __future__ import annotations

from typing import Any, NamedTuple


def ratio_series(x):
    """psi(x) / x, psi(x) = e^x - 1 - x, for |x| <= 1/2, to the last digit of fp64."""
    s = 1 + x / 16
    s = 1 + x * s / 15
    s = 1 + x * s / 14
    s = 1 + x * s / 13
    s = 1 + x * s / 12
    s = 1 + x * s / 11
    s = 1 + x * s / 10
    s = 1 + x * s / 9
    s = 1 + x * s / 8
    s = 1 + x * s / 7
    s = 1 + x * s / 6
    s = 1 + x * s / 5
    s = 1 + x * s / 4
    s = 1 + x * s / 3
    return x * s / 2


def ratio_short(x):
    """psi(x) / x for |x| <= 1/2, to 3e-8 of itself: minimax, exact to second order. For fp32."""
    s = 0.00833348 + x * (0.0013975331 + x * 0.00019863351)
    return x * (0.5 + x * (0.16666666 + x * (0.041666 + x * s)))


def kl_terms(p, q, d, ratio, abs, where):
    """(q - p, p psi(d)) for q = p e^d, each to its own digits. ratio(d) = psi(d) / d is asked for every d,
    and used where |d| < 1/2.

    The second is what is left of p log(p / q) when sum q - p = 0 is added.
    """
    near = abs(d) < 0.5
    r, x = ratio(d), p * d
    gap = where(near, x + x * r, q - p)
    return gap, where(near, x * r, gap - x)


def power_terms(powers, tilts, ratio, abs, where, small_tilt):
    """(q - p, t - p, (1 - tilt) p f(d)) for powers (p, q = p e^d, t = p e^{tilt d}, d) and tilts (tilt, 1 /
    tilt); powers are only subtracted where they differ.

    small_tilt says that |tilt| <= 1: the third then asks for nothing that is only the first's.
    """
    p, q, t, d = powers
    tilt, inverse_tilt = tilts
    x = tilt * d
    near = abs(d) < 0.5
    close = abs(x) < 0.5
    r, u = ratio(d), ratio(x)
    y, v = p * d, p * x
    gap = where(near, y + y * r, q - p)
    powers = where(close, v + v * u, t - p)
    rest = q - p if small_tilt else gap
    return gap, powers, where(near & close, y * (r - u), rest - powers * inverse_tilt)


def power_closed(F, log_r, spread, near, log1p, expm1, where):
    """(log R, F), one from the other: from F where R is near 1, else from log R, which is the logarithm of a
    sum. spread: -b (1 - b)."""
    log_r = where(near, log1p(where(near, spread * F, 0.0)), log_r)
    return log_r, where(near, F, expm1(where(near, 0.0, log_r)) / spread)


def log_short(f):
    """f - log(1 + f) for 1 + f in [sqrt(1/2), sqrt(2)], to 1e-7 of itself: minimax, exact to second order.
    For fp32."""
    s = 0.1663188 + f * (-0.1420354 + f * (0.13082902 + f * (-0.12722263 + f * 0.07786799)))
    return f * f * (0.5 + f * (-0.33333328 + f * (0.25000563 + f * (-0.2000136 + f * s))))


class MixtureLogs(NamedTuple):
    """Of a class with o = b e^x in a mixture m, all to their own digits."""

    x: Any  # may be cut off where e^x is beyond reach: b and o say what x then does not
    m1: Any  # e^x - 1
    s: Any  # psi(x), where |x| < 1/2
    u: Any  # log1p(mix m1) = log(m / b)
    psi_u: Any
    w: Any  # x - u = log(o / m)


def mixture_term(b, o, logs, weights, abs, where, shares):
    """The term of D of a mixture (`Sides`), of weights (mix, base, other); shares as for `mixture_slope`."""
    x, m1, s, u, psi_u, w = logs
    mix, base, other = weights
    keep = 1 - mix
    if shares:
        gap = o - b
        of_base = where(abs(u) < 0.5, b * psi_u, mix * gap - b * u)
        of_other = where(abs(x) < 0.5, b * (keep * m1 * m1 + (1 + m1) * (psi_u - s)), o * w - keep * gap)
        return base * of_base + other * of_other
    else:
        n = 1 + m1
        near = b * ((base + other * n) * psi_u + other * (keep * m1 * m1 - n * s))
        return where(abs(x) < 0.5, near, other * o * w - base * b * u)


def mixture_slope(logs, weights, student_base, shares):
    """xi of a mixture: T dD/dz = q (xi - sum q xi). Arguments are those of `mixture_term`.

    shares: whether base mix and other (1 - mix) differ, as they do not for JSD; (o - b) / m then counts. The
        gradient in the teacher's logits is the student's of the mixture with p and q exchanged.
    """
    _, m1, _, u, psi_u, w = logs
    mix, base, other = weights
    keep = 1 - mix
    if student_base:
        if shares:
            back = mix * m1 * u - psi_u  # psi(-u) m / b
            return -(base * mix * u + (base * keep * back + other * keep * keep * m1) / (1 + mix * m1))
        else:
            return -base * u
    else:
        if shares:
            return other * w + mix * (base * mix - other * keep) * m1 / (1 + mix * m1)
        else:
            return other * w
