"""KL of one row as the kernels compute it: the first thing to read in this library.

For student logits z and teacher logits v, with p = softmax(v / T) and q = softmax(z / T), this returns

    D = sum p log(p / q)        T dD/dz = q - p

Both are small differences of large numbers where the student is near its teacher. So nothing here subtracts p
from q, or one log-softmax from another, where they are alike. With y = log(q / p) and sum q - p = 0,

    q - p = p (e^y - 1)         D = sum p (e^y - 1 - y), whose terms are all positive.

y takes the log-sum-exps of both rows, which are known only when the rows have been read. Four stages:

    reference   guess K, near log sum e^(z/T) - log sum e^(v/T), from a sample of the classes
    sums        pass 1, tile by tile: e = e^(v/T), and e (e^y - 1) with the y that K gives
    close       what K lacks is h = log1p(sum of the second / sum of the first); from now on K + h
    gradient    pass 2: the same terms with the right y are the gradient; their sum is D

Logits and terms are fp32, a row's few numbers are fp64. In the kernels the stages have these names too: see
kdkernels/backends/triton/sums.py, close.py and gradient.py (the exact form), and csrc/row/row.h. The C++
library keeps e and em = e (e^y - 1) of pass 1, and sums e psi(y) there too; what K lacks is corrected
afterwards: q - p = A em + C e, with A = e^-h / s and C = expm1(-h) / s, and D likewise (csrc/row/plain.h).
Each of its blocks of classes has a K, and so an h, of its own.
"""

import numpy as np

TILE = 256  # classes
BIG = np.float32(1e30)


def fma(x, k, shift):
    """x k + shift, rounded once, as a GPU's fused multiply-add: an offset of the logits costs no digits."""
    return (np.float64(x) * k + shift).astype(np.float32)


def psi(y):
    """e^y - 1 - y for |y| <= 1/2 to its own digits: y^2 / 2 (1 + y / 3 (1 + y / 4 (...)))."""
    s = np.float32(1)
    for n in range(9, 2, -1):
        s = 1 + y / n * s
    return y * y / 2 * s


def reference(z, v, k):
    """(M, K). M is an integer near the largest v k, which keeps exponentials within range; K is the mean of
    (z - v) k under p. A masked class (-inf, or the least number of a dtype) is no part of it."""
    some = np.linspace(0, len(v) - 1, min(len(v), 512)).astype(int)
    z, v = (np.float64(x[some]) * k for x in (z, v))
    there = np.abs(z - v) < 1e6
    e = np.exp(v[there] - v[there].max(initial=-1e30))
    return np.ceil(v.max()), (e * (z - v)[there]).sum() / max(e.sum(), 1e-30)


def terms(z, v, k, M, K):
    """(e, e (e^y - 1), e psi(y)) of a tile, y = (z - v) k - K. Each is relative to its own size."""
    e, eo = np.exp(fma(v, k, -M)), np.exp(fma(z, k, -M - K))  # eo is e e^y
    high = z - v
    back = high - z
    low = (z - (high - back)) - (v + back)  # what rounding took from z - v
    y = fma(high, k, -K) + np.where(np.isfinite(low), low, 0) * np.float32(k)
    y = np.fmin(y, BIG)  # a class that the teacher masks has e = 0 and y = inf, or nan
    near = np.abs(y) < 0.5
    small = np.where(near, y, 0)
    gap = np.where(near, e * np.expm1(small), eo - e)
    return e, gap, np.where(near, e * psi(small), gap - e * y)


def sums(z, v, k, M, K):
    """Pass 1: (M, sum e, sum e (e^y - 1)). A larger logit takes M up, and what was summed goes with it."""
    s = d = 0.0
    for i in range(0, len(v), TILE):
        new = max(M, np.ceil(np.float64(v[i : i + TILE].max()) * k))
        s, d, M = s * np.exp(M - new), d * np.exp(M - new), new
        e, gap, _ = terms(z[i : i + TILE], v[i : i + TILE], k, M, K)
        s, d = s + float(e.sum()), d + float(gap.sum())
    return M, s, d


def close(s, d, K):
    """log sum e^(z k) - log sum e^(v k): sum e e^y = s + d, and K is in y."""
    return K + np.log1p(d / s)


def gradient(z, v, k, M, K, s):
    """Pass 2: (D, q - p). The rounding h of K makes h^2 / 2 of D, as its terms are without a linear one."""
    g, f = np.empty_like(z), 0.0
    for i in range(0, len(v), TILE):
        _, gap, term = terms(z[i : i + TILE], v[i : i + TILE], k, M, K)
        g[i : i + TILE] = np.where(np.isneginf(z[i : i + TILE]), 0, gap / np.float32(s))
        f += float(term.sum())
    return f / s, g


def kl(z, v, T):
    """(D, T dD/dz) of fp32 rows."""
    with np.errstate(over="ignore", invalid="ignore"):  # of masked classes
        k = 1 / T
        M, K = reference(z, v, k)
        M, s, d = sums(z, v, k, M, K)
        if abs(d) > 0.1 * s:  # a poor guess: the sums once more, with the K that they gave
            M, s, d = sums(z, v, k, M, K := close(s, d, K))
        return gradient(z, v, k, M, close(s, d, K), s)
