"""The yardstick: KL(p, q) with its gradient in the form that was fastest on a GPU
(docs/results/forms_nvidia_h200.md), without options.

A row is divided into parts, a program to a part. The first sweep keeps running log-sum-exps of both rows, and
of the loss either sum p (v - z) (plain) or sum p (e^y - 1), y = (z - v) / T - K (exact); the parts exchange
these five sums through memory. The second sweep goes backwards, finds its logits in the L2 cache, and writes
(q - p) times a scale. No masks, no labels; plain is within 1e-5.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = math.log2(math.e)
T = 2.0
K = 0.01  # the exact form's reference of y, which the library samples
SLOTS = 8  # numbers of a part, of which five are used
# (lanes, classes to a lane, warps, classes to a part, whether it is the exact form)
VARIANTS = (
    (256, 8, 4, 8192, False),
    (128, 8, 4, 8192, False),
    (256, 8, 4, 16384, False),
    (256, 8, 4, 16384, True),
)


@triton.jit
def logits_at(X, columns, edge, MASK: tl.constexpr, KEEP: tl.constexpr):
    if MASK:
        return tl.load(X + columns, mask=columns < edge, other=float("-inf"), eviction_policy=KEEP).to(
            tl.float32
        )
    return tl.load(X + columns, eviction_policy=KEEP).to(tl.float32)


@triton.jit
def expm1(x, e):
    """e^x - 1, given e^x."""
    p = tl.fma(x, 1.0 / 720, 1.0 / 120)
    p = tl.fma(x, tl.fma(x, tl.fma(x, p, 1.0 / 24), 1.0 / 6), 0.5)
    return tl.where(tl.abs(x) < 0.5, tl.fma(x * x, p, x), e - 1.0)


@triton.jit
def psi(x, em):
    """e^x - 1 - x, given e^x - 1."""
    p = tl.fma(x, 1.0 / 720, 1.0 / 120)
    p = tl.fma(x, tl.fma(x, tl.fma(x, p, 1.0 / 24), 1.0 / 6), 0.5)
    return tl.where(tl.abs(x) < 0.5, x * x * p, em - x)


@triton.jit
def gap(z, v, MASK: tl.constexpr):
    """z - v; 0 beyond the row's end."""
    t = z - v
    return tl.where(t == t, t, 0.0) if MASK else t


@triton.jit
def maxima(a, b, c, d):
    return tl.maximum(a, c), tl.maximum(b, d)


@triton.jit
def additions(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def sums(Z, V, columns, edge, running, c, k, K, EXACT: tl.constexpr, MASK: tl.constexpr):
    """Running maxima and sums of each lane, in base 2, with a tile more."""
    top_z, top_v, sum_z, sum_v, cross = running
    z, v = logits_at(Z, columns, edge, MASK, "evict_last"), logits_at(V, columns, edge, MASK, "evict_last")
    new_z, new_v = tl.maximum(top_z, tl.max(z, 1)), tl.maximum(top_v, tl.max(v, 1))
    keep_z, keep_v = tl.math.exp2((top_z - new_z) * c), tl.math.exp2((top_v - new_v) * c)
    e_z, e_v = (
        tl.math.exp2(tl.fma(z, c, -(new_z * c)[:, None])),
        tl.math.exp2(tl.fma(v, c, -(new_v * c)[:, None])),
    )
    t = gap(z, v, MASK)
    if EXACT:
        y = tl.fma(t, k, -K)
        term = e_v * expm1(y, tl.math.exp2(y * 1.4426950408889634))
    else:
        term = -e_v * t
    return (
        new_z,
        new_v,
        sum_z * keep_z + tl.sum(e_z, 1),
        sum_v * keep_v + tl.sum(e_v, 1),
        cross * keep_v + tl.sum(term, 1),
    )


@triton.jit
def exchanged(STATE, COUNT, part, parts, running, c, SLOTS: tl.constexpr, MOST: tl.constexpr):
    """(log2 of both sums, the third over the teacher's) of all parts, in fp64, once each has published its
    own."""
    for i in tl.static_range(5):
        tl.store(STATE + part * SLOTS + i, running[i])
    tl.debug_barrier()
    arrived = tl.atomic_add(COUNT, 1, sem="acq_rel") + 1
    while arrived < parts:
        arrived = tl.atomic_add(COUNT, 0, sem="acquire")
    i = tl.arange(0, MOST)
    there = i < parts
    tops_z = tl.load(STATE + i * SLOTS, mask=there, other=-1e30, cache_modifier=".cg")
    tops_v = tl.load(STATE + i * SLOTS + 1, mask=there, other=-1e30, cache_modifier=".cg")
    sums_z = tl.load(STATE + i * SLOTS + 2, mask=there, other=0.0, cache_modifier=".cg")
    sums_v = tl.load(STATE + i * SLOTS + 3, mask=there, other=0.0, cache_modifier=".cg")
    crosses = tl.load(STATE + i * SLOTS + 4, mask=there, other=0.0, cache_modifier=".cg")
    top_z, top_v = tl.max(tops_z, 0), tl.max(tops_v, 0)
    unit_z, unit_v = tl.math.exp2((tops_z - top_z) * c), tl.math.exp2((tops_v - top_v) * c)
    all_z, all_v = tl.sum((sums_z * unit_z).to(tl.float64), 0), tl.sum((sums_v * unit_v).to(tl.float64), 0)
    log_z = tl.log(all_z) * 1.4426950408889634 + top_z.to(tl.float64) * c
    log_v = tl.log(all_v) * 1.4426950408889634 + top_v.to(tl.float64) * c
    return log_z, log_v, tl.sum((crosses * unit_v).to(tl.float64), 0) / all_v


@triton.jit
def gradient(Z, V, G, columns, edge, loss, closed, c, k, scale, EXACT: tl.constexpr, MASK: tl.constexpr):
    """(q - p) scale of a tile, written; exact: the loss's terms of each lane, added."""
    log_z, log_v, shift, ratio = closed
    z, v = logits_at(Z, columns, edge, MASK, "evict_first"), logits_at(V, columns, edge, MASK, "evict_first")
    if EXACT:
        p, d = tl.math.exp2(tl.fma(v, c, -log_v)), tl.fma(gap(z, v, MASK), k, -shift)
        em = expm1(d, tl.math.exp2(d * 1.4426950408889634))
        g = p * em
        loss += tl.sum(p * psi(d, em), 1)
    else:
        g = tl.fma(tl.math.exp2(tl.fma(z, c, -log_z)), ratio, -tl.math.exp2(tl.fma(v, c, -log_v)))
    g = (g * scale).to(G.dtype.element_ty)
    if MASK:
        tl.store(G + columns, g, mask=columns < edge, eviction_policy="evict_first")
    else:
        tl.store(G + columns, g, eviction_policy="evict_first")
    return loss


@triton.jit(do_not_specialize=["parts"])
def kl_parts(
    Z, V, G, LOSS, STATE, COUNT, vocab, parts, size, c, k, K, scale, weight,
    EXACT: tl.constexpr, LANES: tl.constexpr, RUN: tl.constexpr, SLOTS: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Programs are begun in order, so that those which a program waits for have begun before it or are the
    next ones."""
    TILE: tl.constexpr = LANES * RUN
    row, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    first = part * size
    edge = tl.minimum(first + size, vocab)
    whole = first + (edge - first) // TILE * TILE
    Z, V, G = Z + row * vocab, V + row * vocab, G + row * vocab
    tile = tl.arange(0, LANES)[:, None] * RUN + tl.arange(0, RUN)[None, :]
    zero = tl.zeros([LANES], tl.float32)
    running = zero - 1e30, zero - 1e30, zero, zero, zero
    for at in tl.range(first, whole, TILE):
        running = sums(Z, V, at + tile, edge, running, c, k, K, EXACT, False)
    if whole < edge:
        running = sums(Z, V, whole + tile, edge, running, c, k, K, EXACT, True)
    top_z, top_v = tl.reduce((running[0], running[1]), 0, maxima)
    unit_z, unit_v = tl.math.exp2((running[0] - top_z) * c), tl.math.exp2((running[1] - top_v) * c)
    sum_z, sum_v, cross = tl.reduce(
        (running[2] * unit_z, running[3] * unit_v, running[4] * unit_v), 0, additions
    )
    of_part = top_z, top_v, sum_z, sum_v, cross
    log_z, log_v, cross = exchanged(
        STATE + row * parts * SLOTS, COUNT + row, part, parts, of_part, c, SLOTS, MOST
    )
    if EXACT:
        closed = log_z.to(tl.float32), log_v.to(tl.float32), (tl.log(1.0 + cross) + K).to(tl.float32), 1.0
    else:
        # relative to integer exponents: what they lack is made in fp64, so that the gradient of equal rows is
        # exactly 0
        high_z, high_v = tl.ceil(log_z), tl.ceil(log_v)
        closed = (
            high_z.to(tl.float32),
            high_v.to(tl.float32),
            0.0,
            tl.math.exp2(((high_z - log_z) - (high_v - log_v)).to(tl.float32)),
        )
        scale *= tl.math.exp2((high_v - log_v).to(tl.float32))
    loss = zero
    if whole < edge:
        loss = gradient(Z, V, G, whole + tile, edge, loss, closed, c, k, scale, EXACT, True)
    for back in tl.range(0, whole - first, TILE):
        loss = gradient(Z, V, G, whole - TILE - back + tile, edge, loss, closed, c, k, scale, EXACT, False)
    if EXACT:
        tl.atomic_add(LOSS + row, tl.sum(loss, 0) * weight, sem="relaxed")
    elif part == 0:
        tl.store(LOSS + row, ((cross * k + (log_z - log_v) * 0.6931471805599453) * weight).to(tl.float32))


def kl(
    z: Tensor, v: Tensor, scale: float, weight: float, variant: tuple[int, int, int, int, bool]
) -> tuple[Tensor, Tensor]:
    """(rows,) weight * KL at T = 2 and scale * (q - p), in the student's dtype, for contiguous (rows, V)
    logits."""
    lanes, run, warps, classes, exact = variant
    rows, vocab = z.shape
    parts = min(64, max(1, round(vocab / classes)))
    size = -(-vocab // (64 * parts)) * 64
    grad, loss = torch.empty_like(z), torch.zeros(rows, dtype=torch.float32, device=z.device)
    state, count = loss.new_empty(rows * parts * SLOTS), torch.zeros(rows, dtype=torch.int32, device=z.device)
    tensors, numbers = (
        (z, v, grad, loss, state, count),
        (vocab, parts, size, LOG2E / T, 1 / T, K, scale, weight),
    )
    kl_parts[(rows * parts,)](*tensors, *numbers, exact, lanes, run, SLOTS, 64, num_warps=warps)
    return loss, grad


class _Mean(torch.autograd.Function):
    """The mean of T^2 KL, for an upstream gradient of 1."""

    @staticmethod
    def forward(ctx, z, v, variant):
        loss, grad = kl(z.detach(), v, T / len(z), T * T / len(z), variant)
        ctx.save_for_backward(grad)
        return loss.sum()

    @staticmethod
    def backward(ctx, upstream):
        return ctx.saved_tensors[0], None, None


def variants() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """name -> loss(z, v)."""
    names = (
        f"simple {'exact' if x[4] else 'plain'} {x[0]}x{x[1]} {x[2]} warps, parts of {x[3]}" for x in VARIANTS
    )
    return {name: (lambda z, v, x=x: _Mean.apply(z, v, x)) for name, x in zip(names, VARIANTS, strict=True)}
