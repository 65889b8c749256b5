"""Scalars of a row in fp64, and functions that keep the digits of small differences in fp32."""

from __future__ import annotations

import types

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

from ... import terms


def _jit(f):
    """A plain function as a device function; triton looks for its language among the globals."""
    return triton.jit(types.FunctionType(f.__code__, {"tl": tl, "__name__": __name__}, f.__name__))


kl_terms, power_terms, power_closed, mixture_term, mixture_slope = (
    _jit(getattr(terms, x))
    for x in ("kl_terms", "power_terms", "power_closed", "mixture_term", "mixture_slope")
)
ratio_short, ratio_series, log_short = (
    _jit(f) for f in (terms.ratio_short, terms.ratio_series, terms.log_short)
)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOG2E_SINGLE = tl.constexpr(1.4426950216293335)  # as fp32 has it
MOST = tl.constexpr(8e6)  # integers up to here, and their sums, are floats
INF = tl.constexpr(float("inf"))
LOW = tl.constexpr(-4e6)  # the top of what has no class yet; no logit that counts is below it
BIG = tl.constexpr(1e36)
REACH = tl.constexpr(80.0)  # of an exponent whose exponential still has company in a float
ROOT_HALF = tl.constexpr(0x3F3504F3)  # the bits of sqrt(1/2)


@triton.jit
def magnitude(x):
    return tl.abs(x)


@triton.jit
def select(condition, x, y):
    return tl.where(condition, x, y)


@triton.jit
def wide(x):
    return tl.full([], 0.0, tl.float64) + x


@triton.jit
def long(x):
    """An index that offsets beyond 2^31 are made of."""
    return tl.full([], 0, tl.int64) + x


@triton.jit
def finite(x):
    return tl.abs(x) < INF


@triton.jit
def log1p64(x):
    """log(1 + x) to the last digits: the rounding of 1 + x divides out."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def expm164(x):
    near = tl.abs(x) < 0.5
    small = tl.where(near, x, 0.0)
    return tl.where(near, small + small * ratio_series(small), tl.exp(x) - 1.0)


@triton.jit
def log2_64(x):
    return tl.log(x) * LOG2E


@triton.jit
def exp2_64(x):
    return tl.exp(x / LOG2E)


@triton.jit
def log2_1p(r, FAST: tl.constexpr):
    """log2(1 + r), r >= -1/2, to 3e-7 absolute; FAST: by NVIDIA's instruction, which only its compiler
    knows."""
    if FAST:
        return libdevice.fast_log2f(1.0 + r)
    else:
        bits = (r + 1.0).to(tl.int32, bitcast=True)
        power = (bits - ROOT_HALF) >> 23
        f = (bits - (power << 23)).to(tl.float32, bitcast=True) - 1.0
        return tl.fma(f - log_short(f), LOG2E, power.to(tl.float32))


@triton.jit
def log1p_psi(r):
    """(u, psi(u)) of u = log(1 + r), r >= -1/2, each to its own digits: 1 + r is a power of 2 times what
    `log_short` takes."""
    bits = (r + 1.0).to(tl.int32, bitcast=True)
    power = (bits - ROOT_HALF) >> 23
    f = tl.where(power == 0, r, (bits - (power << 23)).to(tl.float32, bitcast=True) - 1.0)
    short = log_short(f)
    u = tl.fma(power.to(tl.float32), LN2, f - short)
    return u, tl.where(power == 0, short, r - u)
