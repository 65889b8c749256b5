"""Where rows lie, and a tile of one: logits as their models give them, read and written 16 bytes at a time.

A tile is [lanes, run]: what is taken along a run stays in a thread.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import INF, REACH, finite, ratio_short
from .records import CAPPED, EVEN, FULL, SCALAR, SCALED, WINDOW, inner_of


@triton.jit
def row_at(row, inner, outer_stride, inner_stride, spec: tl.constexpr):
    """(offset of the row's window, place of class 0 in it): the window begins on 16 bytes unless the access
    is SCALAR."""
    R: tl.constexpr = spec.run
    start = row // inner * outer_stride + row % inner * inner_stride
    if spec.access == SCALAR:
        return start, 0
    else:
        aligned = start // R * R
        return aligned, (start - aligned).to(tl.int32) if spec.access == WINDOW else 0


@triton.jit
def transformed(x, side, ratio: tl.constexpr, TRANSFORM: tl.constexpr):
    """(softcap tanh(scale x / softcap), its derivative over scale) of logits; -inf, +inf and nan stay what
    they are.

    With e = e^{-2 u}, tanh u = (1 - e) / (1 + e) has the digits of small logits as 1 - e has them, and the
    derivative, 4 e / (1 + e)^2, those of large ones. The factors of the gradient have the scale already.
    """
    if TRANSFORM == CAPPED:
        x = x * side.scale
        w = tl.minimum(tl.maximum(x * side.steepness, -REACH), REACH)
        e = tl.exp(w)
        more = tl.where(tl.abs(w) < 0.5, w + w * ratio(w), e - 1.0)
        share = 1.0 / (2.0 + more)
        capped = tl.where(finite(x) & (side.steepness < 0.0), side.softcap * (more * share), x)
        return capped, 4.0 * e * share * share
    elif TRANSFORM == SCALED:
        return x * side.scale, 1.0
    else:
        return x, 1.0


@triton.jit
def masked_load(X, there, OTHER: tl.constexpr, KEEP: tl.constexpr, spec: tl.constexpr):
    if spec.access == FULL:
        return tl.load(X, eviction_policy=KEEP)
    else:
        return tl.load(X, mask=there, other=OTHER, eviction_policy=KEEP)


@triton.jit
def load(X, at, edge, vocab, KEEP: tl.constexpr, spec: tl.constexpr):
    """The classes of the tile that begins at place `at` of the row's window, in fp32; -inf beyond the row."""
    LANES: tl.constexpr = spec.lanes
    R: tl.constexpr = spec.run
    cols = at + tl.arange(0, LANES)[:, None] * R + tl.arange(0, R)[None, :]
    if spec.access == SCALAR:
        return tl.load(X + cols, mask=cols < vocab, other=-INF, eviction_policy=KEEP).to(tl.float32)
    else:
        # the mask is that of whole runs, which keeps the access whole; the 16 bytes that hold a class may be
        # read
        at = tl.multiple_of(at, R)
        there = at + tl.arange(0, LANES)[:, None] * R < edge + vocab
        if X.dtype.element_ty == tl.bfloat16:
            # two to a word, each one instruction from being a float; compilers take two
            H: tl.constexpr = R // 2
            words = (at // 2) + tl.arange(0, LANES)[:, None] * H + tl.arange(0, H)[None, :]
            W = X.to(tl.pointer_type(tl.int32), bitcast=True)
            pairs = masked_load(W + words, there, -8323200, KEEP, spec)  # -inf, -inf
            x = tl.join(
                (pairs << 16).to(tl.float32, bitcast=True), (pairs & -65536).to(tl.float32, bitcast=True)
            ).reshape([LANES, R])
        else:
            x = masked_load(X + cols, there, -INF, KEEP, spec).to(tl.float32)
        if spec.access == WINDOW:
            x = tl.where((cols >= edge) & (cols < edge + vocab), x, -INF)
        return x


@triton.jit
def store(G, at, edge, vocab, g, spec: tl.constexpr):
    LANES: tl.constexpr = spec.lanes
    R: tl.constexpr = spec.run
    if spec.access != SCALAR:
        at = tl.multiple_of(at, R)
    run = at + tl.arange(0, LANES)[:, None] * R
    cols = run + tl.arange(0, R)[None, :]
    g = g.to(G.dtype.element_ty)
    inside = (cols >= edge) & (cols < edge + vocab)
    if spec.access == SCALAR:
        tl.store(G + cols, g, mask=inside, eviction_policy="evict_first")
    elif spec.access == FULL:
        tl.store(G + cols, g, eviction_policy="evict_first")
    elif spec.access == EVEN:
        tl.store(G + cols, g, mask=run < edge + vocab, eviction_policy="evict_first")
    else:
        full = (run >= edge) & (run + R <= edge + vocab)
        tl.store(G + cols, g, mask=full, eviction_policy="evict_first")
        if (at < edge) | (at + spec.tile > edge + vocab):
            tl.store(G + cols, g, mask=inside & (full == 0))


@triton.jit
def pair(row, at, KEEP: tl.constexpr, spec: tl.constexpr):
    """(b, o, the slopes of their transforms) of the tile at `at`."""
    b = load(row.base.X, at, row.edge, row.vocab, KEEP, spec)
    o = load(row.other.X, at, row.edge, row.vocab, KEEP, spec)
    b, slope_b = transformed(b, row.base, ratio_short, spec.transform)
    o, slope_o = transformed(o, row.other, ratio_short, spec.transform)
    return b, o, slope_b, slope_o


@triton.jit
def student_of(b, o, slope_b, slope_o, spec: tl.constexpr):
    """(the student's logits, the slope of their transform) of what `pair` returns."""
    if spec.student_base:
        return b, slope_b
    else:
        return o, slope_o


@triton.jit
def columns(at, spec: tl.constexpr):
    LANES: tl.constexpr = spec.lanes
    R: tl.constexpr = spec.run
    return at + tl.arange(0, LANES)[:, None] * R + tl.arange(0, R)[None, :]


@triton.jit
def label_of(LABELS, side, row, edge, vocab):
    """(label, its logit as it was given): nan for a label outside the vocabulary."""
    label = tl.load(LABELS + row)
    known = (label >= 0) & (label < vocab)
    logit = tl.load(side.X + edge + label, mask=known, other=float("nan")).to(tl.float32)
    return tl.where(known, label, -1).to(tl.int32), logit


@triton.jit
def write_zeros(G, first, last, BLOCK: tl.constexpr):
    for at in tl.range(first, last, BLOCK):
        cols = at + tl.arange(0, BLOCK)
        tl.store(G + cols, tl.zeros([BLOCK], tl.float32).to(G.dtype.element_ty), mask=cols < last)


@triton.jit
def last_tile(first, last, TILE: tl.constexpr):
    return first + (last - 1 - first) // TILE * TILE


@triton.jit
def sweep(
    step: tl.constexpr, state, row, numbers, more, BACKWARDS: tl.constexpr, spec: tl.constexpr
):  # fmt: skip
    """state = step(at, state, row, numbers, more, spec) for each tile of a part.

    Every second sweep goes backwards, as the end of a part is what the sweep before it has left in the cache.
    Tiles within the row need no mask; the first tile, where the window begins before the row, and the last,
    where it ends beyond it, have a loop of their own.
    """
    TILE: tl.constexpr = spec.tile
    final = last_tile(row.first, row.last, TILE)
    inner, end = row.first, row.last
    if spec.edges:
        inner = tl.where(row.first < row.edge, row.first + TILE, row.first)
        end = tl.where(final + TILE > row.last, final, row.last)
    from_end = last_tile(inner, end, TILE)
    for forward in tl.range(inner, end, TILE):
        at = from_end - (forward - inner) if BACKWARDS else forward
        state = step(at, state, row, numbers, more, inner_of(spec))
    if spec.edges:
        start = tl.where(inner > row.first, row.first, final)
        stop = tl.where(end < row.last, row.last, inner)
        for at in tl.range(start, stop, tl.maximum(final - row.first, TILE)):
            state = step(at, state, row, numbers, more, spec)
    return state
