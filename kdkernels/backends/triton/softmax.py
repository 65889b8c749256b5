"""log softmax(x / T) over rows, its gradient, and a gradient times a number."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import INF, finite, log1p64, long
from .gradient import total

EMPTY = tl.constexpr(-3.4028234663852886e38)  # the top of what has no class yet: none is below it


@triton.jit
def times(x, k, k_low):
    """x (k + k_low), rounded once for what matters of it."""
    return tl.fma(x, k, tl.where(finite(x), x, 0.0) * k_low)


@triton.jit(do_not_specialize=["vocab"])
def log_softmax_rows(X, U, OUT, vocab, k, k_low, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    """log softmax(k x) of contiguous rows, k + k_low for k, or its gradient k (u - softmax(k x) sum u)."""
    start = tl.program_id(0).to(tl.int64) * vocab
    top = tl.full([BLOCK], EMPTY, tl.float32)
    s, upstream = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for at in tl.range(0, vocab, BLOCK):
        cols = at + tl.arange(0, BLOCK)
        x = tl.load(X + start + cols, mask=cols < vocab, other=-INF, eviction_policy="evict_last").to(
            tl.float32
        )
        new = tl.maximum(top, x)
        s = s * tl.exp(times(top - new, k, k_low)) + tl.exp(times(x - new, k, k_low))
        top = new
        if BACKWARD:
            upstream += tl.load(
                U + start + cols, mask=cols < vocab, other=0.0, eviction_policy="evict_last"
            ).to(tl.float32)
    largest = tl.max(top, 0)
    lanes = s.to(tl.float64) * tl.exp(times(top - largest, k, k_low))
    every = tl.sum(lanes, 0)
    every = tl.where(every > 0.0, every, float("nan"))
    log_sum = tl.log(every)
    if every < 1.5:  # one class has nearly all: what the others have, to its own digits
        others = tl.zeros([BLOCK], tl.float32)
        for at in tl.range(0, vocab, BLOCK):
            cols = at + tl.arange(0, BLOCK)
            x = tl.load(X + start + cols, mask=cols < vocab, other=-INF).to(tl.float32)
            others += tl.where(x == largest, 0.0, tl.exp(times(x - largest, k, k_low)))
        log_sum = log1p64(total(others))
    u = total(upstream)
    for at in tl.range(0, vocab, BLOCK):
        cols = at + tl.arange(0, BLOCK)
        x = tl.load(X + start + cols, mask=cols < vocab, other=-INF, eviction_policy="evict_first").to(
            tl.float32
        )
        a = times(x - largest, k, k_low)
        if BACKWARD:
            upstream = tl.load(
                U + start + cols, mask=cols < vocab, other=0.0, eviction_policy="evict_first"
            ).to(tl.float32)
            out = (upstream - tl.exp(a) * (u / every).to(tl.float32)) * k
        else:
            out = a - log_sum.to(tl.float32)
        tl.store(OUT + start + cols, out.to(OUT.dtype.element_ty), mask=cols < vocab)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["FACTOR"])
def scale_all(X, FACTOR, count, BLOCK: tl.constexpr):
    """X *= FACTOR, a number on the device; nothing is read of X where that is 1, nearly always: few programs
    find it out."""
    factor = tl.load(FACTOR)
    if factor != 1.0:
        start = long(tl.program_id(0)) * BLOCK
        while start < count:
            cols = start + tl.arange(0, BLOCK)
            x = tl.load(X + cols, mask=cols < count)
            tl.store(X + cols, (x.to(tl.float32) * factor).to(X.dtype.element_ty), mask=cols < count)
            start += long(tl.num_programs(0)) * BLOCK
